"""The weights of `models/cifar10/float32.onnx` as a torch file, for the peers' stock setting.

It is a state dict beside the network's definition, as every peer accepts any torch module:
TorchScript is deprecated, and an exported program would run in a different interpreter.

    python -m loadtest.peers.weights            writes runs/peers/cifar10.pt
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import onnx
import torch
from torch import Tensor

from app.inference.bundle import Bundle, golden_inputs, open_bundle
from app.inference.graph import parse
from app.settings import default_model_dir
from loadtest.peers.classifier import WEIGHTS, stock
from loadtest.peers.net import victim

TOLERANCE = 1e-4


def state_dict(bundle: Bundle) -> dict[str, Tensor]:
    """The file's tensors under the names of `victim()`'s parameters."""
    found = {
        tensor.name.replace("weight_bias", "bias"): torch.from_numpy(
            onnx.numpy_helper.to_array(tensor).copy()
        )
        for tensor in parse(bundle.onnx("float32")).graph.initializer
    }
    return {name: found[name] for name in victim().state_dict()}


def write(bundle: Bundle, out: Path = WEIGHTS) -> float:
    """Write the file, read it back, and give its largest distance from the golden outputs.

    Raises:
        RuntimeError: it answers differently from the bundle.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state_dict(bundle), out)
    golden = np.array(bundle.golden().probabilities["float32"])
    gap = float(np.abs(stock(out)(golden_inputs(bundle.card.input)) - golden).max())
    if gap > TOLERANCE:
        raise RuntimeError(f"the torch network differs from the bundle by {gap:.1e}")
    return gap


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=WEIGHTS)
def main(out: Path) -> None:
    """Write the weights and check them."""
    gap = write(open_bundle(default_model_dir(), "cifar10"), out)
    click.echo(f"{out}: within {gap:.1e} of the bundle's golden outputs")


if __name__ == "__main__":
    main()
