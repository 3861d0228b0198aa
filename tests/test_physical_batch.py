"""A site may compute a batch in pieces: the same loss and gradient, less memory."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.site import SiteSettings
from client.tasks import refuse_chunked_batch_norm
from client.training import encode
from shared_model.encoder import EncoderSettings, build_encoder
from shared_model.errors import ExitCode, HemoFedError
from shared_model.objectives.settings import ObjectiveSettings
from shared_model.objectives.step import Batch, Parts, pretraining_step
from shared_model.study import Study


def step(encoder: nn.Module, physical_batch: int | None) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one pretraining step on 10 ECGs."""
    generator = torch.Generator().manual_seed(0)
    signals = torch.randn(10, 12, 2500, generator=generator)
    objective = ObjectiveSettings(name="ssl_dml_l2")
    described = objective.relation.describe(signals, torch.ones_like(signals, dtype=torch.bool))
    encoder.zero_grad(set_to_none=True)
    parts = Parts(encoder, lambda x: encode(encoder, x, physical_batch), {})
    loss, _ = pretraining_step(objective, parts, Batch(signals, described, torch.arange(10)), generator)
    loss.backward()
    return loss, [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("physical_batch", [1, 3, 10, 64])
def test_pieces_give_the_loss_and_gradient_of_the_whole_batch(physical_batch: int) -> None:
    encoder = build_encoder(EncoderSettings(dropout=0.0), seed=0)
    whole_loss, whole = step(encoder, None)
    loss, pieces = step(encoder, physical_batch)
    assert whole_loss.item() > 0
    torch.testing.assert_close(loss, whole_loss, rtol=1e-5, atol=1e-6)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_no_more_than_a_piece_passes_the_encoder_at_a_time() -> None:
    seen: list[int] = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return x.mean((1, 2), keepdim=True).squeeze(-1)

    encode(Counting(), torch.ones(10, 12, 50), 4)
    assert seen == [4, 4, 2]


def test_batch_norm_in_pieces_is_refused() -> None:
    settings = SiteSettings(name="north", disclosure="clear", physical_batch=8)
    with pytest.raises(HemoFedError, match="physical_batch") as caught:
        refuse_chunked_batch_norm(settings, Study(name="x", encoder=EncoderSettings(norm="batch")))
    assert caught.value.exit_code == ExitCode.BAD_SITE
    refuse_chunked_batch_norm(settings, Study(name="x"))
    # why: with batch norm the pieces really differ from the whole
    encoder = build_encoder(EncoderSettings(norm="batch", dropout=0.0), seed=0)
    whole, pieces = step(encoder, None)[0].item(), step(encoder, 3)[0].item()
    assert not np.isclose(whole, pieces, rtol=1e-4)
