"""One training step of the encoder: float32 against bfloat16, ours against the machine's own matmul rate.

`python -m benchmarks.training_step`; about one minute on one core. A CUDA device is used where there is one.
"""

import json
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.timing import compare, seconds
from shared_model.encoder import EncoderSettings, build_encoder, decay_groups
from shared_model.objectives.settings import ObjectiveSettings
from shared_model.objectives.step import Batch, Parts, pretraining_step

BATCH = {"small": 64, "resnet18": 16}
Step = Callable[[], None]


def training_step(preset: str, precision: torch.dtype, device: torch.device) -> Step:
    """Forward, median-beat triplets, backward and AdamW on one batch of drawn numbers."""
    encoder = build_encoder(EncoderSettings(preset=preset), seed=1).to(device)
    optimizer = torch.optim.AdamW(decay_groups(encoder, 0.02), lr=1e-4)
    objective = ObjectiveSettings()
    batch = BATCH[preset]
    ecgs = torch.randn(batch, 12, 2500, device=device)
    described = torch.randn(batch, objective.relation.width, device=device)
    drawn = Batch(ecgs, described, torch.arange(batch, device=device))
    parts = Parts(encoder, encoder, {})
    generator = torch.Generator(device=device).manual_seed(0)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            loss, _ = pretraining_step(objective, parts, drawn, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        wait(device)

    return step


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def forward_flop(preset: str) -> float:
    """Floating-point operations (2 a multiply-add) of one ECG's forward pass: convolutions, linear layers."""
    encoder, total = build_encoder(EncoderSettings(preset=preset), seed=1).eval(), 0.0

    def count(layer: nn.Module, _: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        total += 2.0 * weight.numel() * (output.shape[-1] if isinstance(layer, nn.Conv1d) else 1)

    for layer in encoder.modules():
        if isinstance(layer, nn.Conv1d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.inference_mode():
        encoder(torch.zeros(1, 12, 2500))
    return total


def matmul_flop_per_s(precision: torch.dtype, device: torch.device, size: int = 1024) -> float:
    """Rate of a square matrix product, the best of several."""
    a, b = (torch.randn(size, size, device=device, dtype=precision) for _ in range(2))

    def product() -> None:
        a @ b
        wait(device)

    product()
    return 2.0 * size**3 / min(seconds(product) for _ in range(10))


def print_share(preset: str, precision: torch.dtype, step_s: float, device: torch.device) -> None:
    """The step's rate as a share of the matmul rate of the same run; a step costs 3 forward passes."""
    rate = 3 * forward_flop(preset) * BATCH[preset] / step_s
    row = {
        "benchmark": f"training step, {preset}, {str(precision).removeprefix('torch.')}",
        "ecg_per_s": round(BATCH[preset] / step_s, 1),
        "gflop_per_s": round(rate / 1e9, 1),
        "share_of_matmul": round(rate / matmul_flop_per_s(precision, device), 3),
    }
    print(json.dumps(row), flush=True)


def main() -> None:
    """Print one JSON line a comparison and one a share."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    for preset in BATCH:
        half = training_step(preset, torch.bfloat16, device)
        full = training_step(preset, torch.float32, device)
        row = compare(f"training step, {preset}, bfloat16", half, full, "float32", repeats=5)
        print_share(preset, torch.bfloat16, float(str(row["ours_s"])), device)
        print_share(preset, torch.float32, float(str(row["rival_s"])), device)


if __name__ == "__main__":
    main()
