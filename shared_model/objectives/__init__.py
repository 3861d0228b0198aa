"""What pulls embeddings together and apart: views x relation x loss."""
