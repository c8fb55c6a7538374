"""The committed bundles are what their cards say and reach what the project promises."""

from pathlib import Path

import numpy as np
import pytest

from app.bundle import Bundle, golden_inputs
from app.engines import load
from scumble.data import load as load_data
from training.figures import tables
from training.measure import answers, fitted, share_right
from training.quantize import METHODS, PRESETS

ROOT = Path(__file__).parent.parent
BUNDLES = sorted(p.parent.name for p in (ROOT / "models").glob("*/card.json"))
DATA = ROOT.parent / "shared" / "data"
LEAST = {"mnist": 0.99, "cifar10": 0.91, "gtsrb": 0.98}
MOST_BYTES = 10_000_000
SAMPLE = 1000


@pytest.fixture(params=BUNDLES)
def bundle(request) -> Bundle:
    return Bundle(ROOT / "models" / request.param)


def test_all_are_there():
    assert set(LEAST) <= set(BUNDLES)


def test_files(bundle):
    found = {p.name for p in bundle.folder.iterdir()}
    assert found == {"card.json", *bundle.card.files}
    assert {"float32.onnx", "int8.onnx", "golden.json"} <= found
    for name in bundle.card.files:
        bundle.read(name)  # checks the hash
    assert sum(p.stat().st_size for p in bundle.folder.iterdir()) <= MOST_BYTES
    assert bundle.card.name == bundle.folder.name
    assert bundle.card.data_licence


@pytest.mark.parametrize("precision", ["float32", "bf16", "int8"])
def test_golden(bundle, precision):
    golden = bundle.golden()
    run = load("openvino", bundle.onnx(precision), threads=1, precision=precision)
    expected = np.array(golden.probabilities[precision])
    assert run(golden_inputs(bundle.card.input)) == pytest.approx(
        expected, abs=golden.tolerance[precision]
    )


def test_accuracy(bundle):
    accuracy = bundle.card.accuracy
    assert accuracy["float32"].value >= LEAST[bundle.card.name]
    assert accuracy["int8"].value >= accuracy["float32"].value - 0.005
    assert accuracy["int8"].data == accuracy["float32"].data
    assert accuracy["int8"].images >= 4000


def test_quantization(bundle):
    card = bundle.card.quantization
    found = card["candidates"]
    assert set(found) == {f"{m}-{p}" for m in METHODS for p in PRESETS}
    shipped = found[f"{card['method']}-{card['preset']}"]
    assert shipped["validation"] == max(c["validation"] for c in found.values())
    assert shipped["test"] == pytest.approx(bundle.card.accuracy["int8"].value, abs=1e-6)
    sizes = {n: (bundle.folder / f"{n}.onnx").stat().st_size for n in ("int8", "float32")}
    assert shipped["bytes"] == sizes["int8"]
    assert sizes["int8"] <= 0.35 * sizes["float32"]
    assert card["agreement"]["same_label"] >= 0.995


@pytest.mark.parametrize("preset", PRESETS)
def test_training_on_is_not_worse(bundle, preset):
    found = bundle.card.quantization["candidates"]
    for figure in ("validation", "test"):
        assert found[f"qat-{preset}"][figure] >= found[f"ptq-{preset}"][figure]


@pytest.mark.data
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_accuracy_on_a_sample(bundle, precision):
    data = load_data(bundle.card.name, "test", root=DATA)
    data = fitted(data.subset(np.arange(SAMPLE)), bundle.card)  # rows are in random order
    right = share_right(answers(bundle.onnx(precision), data.images, precision), data)
    stated = bundle.card.accuracy[precision].value
    assert right == pytest.approx(stated, abs=4 * (stated * (1 - stated) / SAMPLE) ** 0.5)


def test_docs_show_the_cards_figures():
    shown = (ROOT / "docs" / "training.md").read_text()
    assert tables(ROOT / "models") in shown, "run python -m training.figures"
