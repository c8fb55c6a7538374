"""The scripts in deploy/upstreams serve `cifar10` over V2 as its bundle's engine answers it.

Each server runs in an environment under runs/upstreams, or its tests are skipped; the reason of the
skip has the command that makes the environment.
"""

import httpx2
import numpy as np
import pytest

from app.inference.bundle import Bundle, golden_inputs
from tests.ports import free_ports
from tests.upstreams.servers import MODEL, ROOT, SERVERS, infer, serving_cifar10

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def cifar10():
    return Bundle(ROOT / "models" / "cifar10")


@pytest.mark.parametrize("name", SERVERS)
def test_the_server_answers_as_the_embedded_engine(cifar10, tmp_path, name):
    pixels = golden_inputs(cifar10.card.input)
    expected = cifar10.golden().probabilities["float32"]
    ports = free_ports(3)
    model = f"http://127.0.0.1:{ports[0]}{MODEL}"
    with serving_cifar10(name, tmp_path, ports):
        described = httpx2.get(model, trust_env=False).json()
        in_json = infer(model, pixels, binary=False)
        in_bytes = in_json if name == "mlserver" else infer(model, pixels, binary=True)
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}
    rows = {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}
    assert (described["name"], described["inputs"], described["outputs"]) == (
        "cifar10",
        [tensor],
        [rows],
    )
    np.testing.assert_allclose(in_json, expected, atol=1e-3)
    np.testing.assert_array_equal(in_bytes.astype(np.float32), in_json.astype(np.float32))
