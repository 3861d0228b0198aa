"""What runs at the coordinating centre."""
