"""Starts other model servers, each in an environment of its own."""

import json
import os
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
import numpy as np
import pytest

from loadtest.peers.processes import Running, running
from scumble.evaluation.local_server import without_settings

ROOT = Path(__file__).parents[2]
READY_S = 120
MODEL = "/v2/models/cifar10"
SERVERS = ("triton", "mlserver", "ray")
PEERS = {"ray": "rayserve"}  # where requirements lie, if not in the folder of the same name


def interpreter(name: str) -> Path:
    """The Python of runs/upstreams/NAME, or the test is skipped."""
    folder = Path("runs") / "upstreams" / name
    python = ROOT / folder / "bin" / "python"
    if not python.exists():
        requirements = f"loadtest/peers/{PEERS.get(name, name)}/requirements.txt"
        pytest.skip(
            f"no {name}: python -m venv {folder} && "
            f"{folder}/bin/pip install -r {requirements} -r deploy/upstreams/requirements.txt"
        )
    library = Path(sysconfig.get_config_var("LIBDIR"))
    if name == "triton" and not list(library.glob("libpython3.*.so*")):
        pytest.skip(f"Triton's backend needs a shared libpython, and {library} has none")
    return python


def answers(url: str) -> bool:
    """Whether a GET is answered by 200."""
    try:
        return httpx2.get(url, timeout=2, trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


@contextmanager
def upstream(
    command: list[str | Path],
    folder: Path,
    ready: Callable[[], bool],
    variables: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """A server that is ready; its processes end with the block.

    Its home is a folder with a short name: sockets lie in it, and their paths have a limit of 107
    bytes.

    Args:
        command: starts it.
        folder: its working directory, with its log.
        ready: tells whether it is.
        variables: beside those of this process.
    """
    with ExitStack() as stack:
        home = stack.enter_context(TemporaryDirectory(prefix="s-", ignore_cleanup_errors=True))
        own = {
            "HOME": home,
            "RAY_TMPDIR": home,
            "PYTHONPATH": str(ROOT),
            # Triton's backend loads the libpython that it finds.
            "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR"),
        }
        env = without_settings(os.environ) | own | dict(variables or {})
        words = [str(word) for word in command]
        server = stack.enter_context(running(words, env, folder / "server.log"))
        end = time.monotonic() + READY_S
        while not ready():
            assert server.leader.poll() is None, server.last_words(60)
            assert time.monotonic() < end, server.last_words(60)
            time.sleep(0.2)
        yield server


@contextmanager
def serving_cifar10(name: str, folder: Path, ports: list[int]) -> Iterator[Running]:
    """One of SERVERS with the network of `cifar10`, on ports for HTTP, gRPC and metrics."""
    script = ROOT / "deploy" / "upstreams" / f"serve_{name}.py"
    onnx = ROOT / "models" / "cifar10" / "float32.onnx"
    command = [interpreter(name), script, onnx, "--ports", ",".join(map(str, ports))]
    url = f"http://127.0.0.1:{ports[0]}"
    more = ("-float", "-all", "-files") if name == "triton" else ()
    models = [MODEL, *(MODEL + suffix for suffix in more)]
    with upstream(
        command, folder, lambda: all(answers(f"{url}{model}/ready") for model in models)
    ) as server:
        yield server


def infer(model: str, pixels: np.ndarray, *, binary: bool) -> np.ndarray:
    """The rows that a V2 server answers to pixels, in the only output.

    Args:
        model: its URL.
        pixels: uint8 (N, H, W, C).
        binary: send bytes after the JSON.
    """
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": list(pixels.shape)}
    if binary:
        tensor["parameters"] = {"binary_data_size": pixels.nbytes}
        head = json.dumps({"inputs": [tensor]}).encode()
        length = {"Inference-Header-Content-Length": str(len(head))}
        sent = {"content": head + pixels.tobytes(), "headers": length}
    else:
        sent = {"json": {"inputs": [{**tensor, "data": pixels.reshape(-1).tolist()}]}}
    answer = httpx2.post(f"{model}/infer", **sent, trust_env=False)
    assert answer.status_code == 200, answer.text
    (output,) = answer.json()["outputs"]
    assert output["name"] == "probabilities"
    return np.array(output["data"]).reshape(output["shape"])
