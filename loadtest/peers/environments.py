"""A virtual environment for each peer, made where it is missing: runs/peers/NAME."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click

from loadtest.peers.classifier import ROOT

HERE = Path(__file__).parent
RUNS = ROOT / "runs" / "peers"


def environment(name: str, requirements: Path, sees: Path | None = None) -> Path:
    """A virtual environment under runs/peers, made where it is missing or its list has changed.

    Raises:
        RuntimeError: pip refused; the message has what it said.
    """
    folder = RUNS / name
    stamp = folder / "installed.txt"
    wanted = requirements.read_text()
    if stamp.is_file() and stamp.read_text() == wanted:
        return folder
    click.echo(f"installing {name} in {folder}")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)  # noqa: S603 - ours
    if sees is not None:
        # torch takes 6 GB: it is installed once, and a path file puts its environment behind the
        # peer's own packages. The rest of this machine's packages stay out of sight.
        (site(folder) / "shared.pth").write_text(f"{site(sees)}\n")
    pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--requirement", str(requirements)]
    done = subprocess.run(pip, check=False, capture_output=True, text=True)  # noqa: S603 - ours
    if done.returncode:
        raise RuntimeError(f"{name} cannot be installed: {done.stderr[-2000:]}")
    stamp.write_text(wanted)
    return folder


def site(folder: Path) -> Path:
    """Where an environment keeps its packages."""
    return folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


def interpreter(name: str, *, torch: bool = True) -> str:
    """The Python of a peer's environment, which is made first if it has to be.

    Args:
        name: of the peer.
        torch: it has torch, as the setting `stock` needs.
    """
    if torch:
        shared, own = environment("torch", HERE / "requirements.txt"), name
    else:
        shared, own = environment("engines", HERE / "engines.txt"), f"{name}-engines"
    folder = environment(own, HERE / name / "requirements.txt", sees=shared)
    return str(folder / "bin" / "python")


def versions(name: str, package: str) -> dict[str, str]:
    """What a peer runs with."""
    script = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    names = [package, "numpy", "openvino", "pillow", "torch"]
    command = [interpreter(name), "-c", script, *names]
    output = subprocess.run(command, check=True, capture_output=True).stdout  # noqa: S603 - ours
    found: dict[str, str] = json.loads(output)
    return found
