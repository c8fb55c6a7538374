"""The bundle `mobilenet` for benchmarks: torchvision's mobilenet_v2 at 224x224, float32 and int8.

    python -m loadtest.mobilenet            writes runs/bench/models/mobilenet
    python -m loadtest.bench --cases runs/bench/models/mobilenet:int8

Its weights are random, so its times are realistic and its answers mean nothing. Batch norms are set
with synthetic pictures, as activations would otherwise shrink to zero.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch

from app.inference.bundle import InputShape
from scumble.training.bundle_export import export_bundle, finish
from scumble.training.quantize import ptq
from scumble.training.sources import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    normalized,
    numbers,
    torchvision_model,
)

FOLDER = Path("runs/bench/models/mobilenet")
SHAPE = InputShape(height=224, width=224, channels=3)
CLASSES = 1000


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=FOLDER, show_default=True)
def main(folder: Path) -> None:
    """Make the bundle."""
    size = make(folder)
    click.echo(f"{folder}: {size:,} bytes int8")


def make(folder: Path) -> int:
    """Make the bundle; the bytes of its int8 network."""
    torch.manual_seed(0)
    network = torchvision_model("mobilenet_v2", CLASSES)
    network = normalized(network, numbers(IMAGENET_MEAN), numbers(IMAGENET_STD))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 224, 224, 3), np.uint8)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # the mean over all batches
    with torch.no_grad():
        network.train()(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    card = {
        "name": folder.name,
        "version": "1",
        "labels": [str(k) for k in range(CLASSES)],
        "preprocessing": {"fit": "crop", "ratio": 0.875},
        "training": {"command": "python -m loadtest.mobilenet", "weights": "random"},
        "data_licence": "",
    }
    made = export_bundle(network.eval(), folder, SHAPE, card)
    int8 = ptq((folder / "float32.onnx").read_bytes(), pixels, "server")
    (folder / "int8.onnx").write_bytes(int8)
    finish(folder, made.model_dump(exclude={"files", "format"}))
    return len(int8)


if __name__ == "__main__":
    main()
