"""What a private step costs beside a plain one: our loop over patients, vmap, and opacus' hooks and ghost clipping.

`python -m benchmarks.private_step`; about five minutes. The same forward passes on every side: one ECG a patient, the
paper's encoder with group norm, and a unit of the bank with two ECGs a patient. Memory is each way's own peak, in a
process of its own, above what the process held before its first step.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Callable

import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import Tensor, nn

from benchmarks.timing import compare
from client.private import Unit, clipped_sum, gradients_by_loop, gradients_by_vmap
from shared_model.encoder import EncoderSettings, build_encoder
from shared_model.heads import build_head

PAPER = EncoderSettings(preset="resnet18", dropout=0.0)
CLIP_NORM = 1.0
Step = Callable[[], None]


def say(**row: object) -> None:
    """Print one JSON line."""
    print(json.dumps(row), flush=True)


def network() -> nn.Module:
    """Encoder and head; dropout off on every side, as in private training."""
    made = nn.Sequential(build_encoder(PAPER, 1), build_head(PAPER, 1)).train()
    for layer in made.modules():
        if isinstance(layer, nn.Dropout):
            layer.eval()
    return made


def drawn(batch: int) -> tuple[Tensor, Tensor]:
    """ECGs of noise and labels: (batch, 12, 2500), (batch,)."""
    generator = torch.Generator().manual_seed(0)
    return 0.3 * torch.randn(batch, 12, 2500, generator=generator), torch.arange(batch) % 2.0


def loss_of(output: Tensor, wanted: Tensor) -> Tensor:
    """Binary cross-entropy, summed."""
    return nn.functional.binary_cross_entropy_with_logits(output, wanted, reduction="sum")


def plain(batch: int) -> Step:
    """Forward and backward of the whole batch."""
    model, (signals, wanted) = network(), drawn(batch)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss_of(model(signals), wanted).backward()  # type: ignore[no-untyped-call]

    return step


def by(gradients: Callable[..., object]) -> Callable[[int], Step]:
    """Our own clipped sum, by one way of taking gradients."""

    def make(batch: int) -> Step:
        model, (signals, wanted) = network(), drawn(batch)
        parameters = list(model.parameters())
        units: list[Unit] = [(signals[k : k + 1], wanted[k : k + 1]) for k in range(batch)]

        def unit_loss(score: Callable[[Tensor], Tensor], unit: Unit) -> Tensor:
            return loss_of(score(unit[0]), unit[1])

        def step() -> None:
            clipped_sum(parameters, gradients(model, parameters, unit_loss, units), CLIP_NORM)  # type: ignore[arg-type]

        return step

    return make


def hooks(batch: int) -> Step:
    """Opacus' per-sample gradients, then its clipping."""
    model, (signals, wanted) = GradSampleModule(network(), loss_reduction="sum"), drawn(batch)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss_of(model(signals), wanted).backward()  # type: ignore[no-untyped-call]
        samples = [parameter.grad_sample for parameter in model.parameters()]
        norms = torch.stack([sample.flatten(1).norm(dim=1) for sample in samples], 1).norm(dim=1)
        factor = (CLIP_NORM / (norms + 1e-6)).clamp(max=1.0)
        for sample in samples:
            torch.einsum("n,n...->...", factor, sample)

    return step


def ghost(batch: int) -> Step:
    """Opacus' fast gradient clipping: norms first, then a second backward pass of the weighted loss."""
    model = GradSampleModuleFastGradientClipping(
        network(), loss_reduction="sum", max_grad_norm=CLIP_NORM, use_ghost_clipping=True
    )
    signals, wanted = drawn(batch)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        losses = nn.functional.binary_cross_entropy_with_logits(model(signals), wanted, reduction="none")
        losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        factor = model.get_clipping_coef()
        model.zero_grad(set_to_none=True)
        model.disable_hooks()
        (factor * losses).sum().backward()
        model.enable_hooks()

    return step


WAYS: dict[str, Callable[[int], Step]] = {
    "plain": plain,
    "loop": by(gradients_by_loop),
    "vmap": by(gradients_by_vmap),
    "hooks": hooks,
    "ghost": ghost,
}


def peak_mb(way: str, batch: int) -> float:
    """Peak memory of two steps above what the process held before them, in a process of its own."""
    code = f"from benchmarks.private_step import own_peak; own_peak({way!r}, {batch})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def own_peak(way: str, batch: int) -> None:
    """Print this process's peak memory in MB, above that of a network that has done nothing."""
    torch.set_num_threads(1)
    step = WAYS[way](batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    step()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    """All ways at two batch sizes: ratios to the plain step."""
    torch.set_num_threads(1)
    for batch in (32, 64):
        memory = {way: peak_mb(way, batch) for way in WAYS}
        for way in ("loop", "vmap", "hooks", "ghost"):
            name = f"plain step, batch {batch}: its time is 1, and of the rival the figure"
            compare(name, plain(batch), WAYS[way](batch), way, repeats=5)
            say(benchmark=f"memory, batch {batch}", way=way, of_plain=round(memory[way] / memory["plain"], 2))


if __name__ == "__main__":
    main()
