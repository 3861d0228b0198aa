"""The head on an embedding: one logit (classification) or one standardised value (regression)."""

import torch
from torch import Tensor, nn

from shared_model.encoder import EncoderSettings, weights_from

HIDDEN_DIM = 128
DROPOUT = 0.3


class Head(nn.Module):
    """Embedding -> 128 -> norm -> ReLU -> dropout 0.3 -> 1, as in SSL-DML's fine-tuning head.

    Layer norm stands where the paper has batch norm, unless the encoder is set to batch norm. Dropout is a
    registered module, so that `eval()` turns it off (the published code made one in `forward`: always on).
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.hidden = nn.Linear(settings.embedding_dim, HIDDEN_DIM)
        self.norm = nn.BatchNorm1d(HIDDEN_DIM) if settings.norm == "batch" else nn.LayerNorm(HIDDEN_DIM)
        self.dropout = nn.Dropout(DROPOUT)
        self.output = nn.Linear(HIDDEN_DIM, 1)

    def forward(self, embedding: Tensor) -> Tensor:
        """(batch, embedding_dim) -> (batch,): a logit, or a value in units of the study's scale."""
        x = self.dropout(torch.relu(self.norm(self.hidden(embedding))))  # (batch, 128)
        return self.output(x).squeeze(-1)  # type: ignore[no-any-return]


def build_head(settings: EncoderSettings, seed: int) -> Head:
    """A head that fits the encoder of these settings; its weights follow from `seed` alone."""
    with weights_from(seed):
        return Head(settings)


def standardised(value: Tensor, centre: float, scale: float) -> Tensor:
    """mmHg -> what the regression head learns. `centre`, `scale` in mmHg: the study's clinical constants.

    Never a site's mean and SD: those would be learned into the head's last bias and travel with it.
    """
    return (value - centre) / scale


def in_target_units(output: Tensor, centre: float, scale: float) -> Tensor:
    """The regression head's output -> mmHg, the inverse of `standardised`."""
    return output * scale + centre
