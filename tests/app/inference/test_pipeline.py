"""What is measured at start: how large a batch may be, and what is compiled when."""

import math

import numpy as np
import pytest

from app.errors import ConfigError
from app.inference import engines
from app.inference.bundle import golden_inputs, open_bundle
from app.inference.pipeline import Composer, Pipeline, warm_up
from scumble.defenses import make

EXAMPLE = np.zeros((1, 2, 2, 3), np.uint8)


class SlowEngine:
    """Takes the seconds that `cost` says for a number of images, on a clock of its own."""

    def __init__(self, cost, load_s=0.0):
        self.now = 0.0
        self.cost = cost
        self.load_s = load_s
        self.batches = []
        self.prepared = []

    def clock(self):
        return self.now

    def __call__(self, batch):
        n = len(batch)
        self.now += self.cost(n) + (self.load_s if n not in self.batches else 0)
        self.batches.append(n)
        return np.full((n, 2), 0.5, np.float32)

    def prepare(self, sizes):
        self.prepared += sizes


@pytest.mark.parametrize(
    ("cost", "largest", "limit_s", "expected", "batches"),
    [
        (lambda n: 0.01 * n, 32, math.inf, (32, 0.32), [1, 1, 32, 32]),
        (lambda n: 0.01 * n, 20, 7.5, (20, 0.2), [1, 1, 20, 20]),
        (lambda n: 0.01 * n, 1, 7.5, (1, 0.01), [1, 1]),
        (lambda n: 0.55 * n, 32, 7.5, (8, 4.4), [1, 1, 8, 8]),  # 13 would fit, 8 is compiled
        (lambda n: 0.55 * n, 4, 7.5, (4, 2.2), [1, 1, 4, 4]),
        (lambda n: n**1.5, 32, 7.5, (2, 2**1.5), [1, 1, 4, 4, 2, 2]),  # 4 were estimated to fit
        (lambda n: 5.0 * n, 32, 7.5, (1, 5.0), [1, 1]),
        (lambda n: 9.0 * n, 32, 7.5, (1, 9.0), [1, 1]),  # not even one
    ],
)
def test_batches_are_as_large_as_fits_the_limit(cost, largest, limit_s, expected, batches):
    engine = SlowEngine(cost, load_s=60.0)  # the first batch of a size does not count
    size, answers = warm_up(Pipeline(engine, make("none"), engine.clock), EXAMPLE, largest, limit_s)
    found = size, answers.seconds
    assert found == pytest.approx(expected)
    assert engine.batches == batches


def test_no_batch_is_started_at_start_that_is_expected_to_exceed_the_limit():
    engine = SlowEngine(lambda n: 1.0 * n)
    assert warm_up(Pipeline(engine, make("none"), engine.clock), EXAMPLE, 1024, 7.5)[0] == 4
    assert max(engine.batches) == 4
    assert set(engine.prepared) == {1, 4}


def test_one_image_that_takes_too_long_is_refused():
    engine = SlowEngine(lambda n: 9.0 * n)
    compose = Composer(lambda _: engine, make("none"), False, limit_s=7.5, clock=engine.clock)
    with pytest.raises(ConfigError, match=r"one image takes 9 s; allowed: 7\.5 s, 1/4 of SCUMBLE"):
        compose(b"", EXAMPLE, 32)


def test_nothing_is_compiled_by_a_batch_once_the_service_is_warm(models):
    bundle = open_bundle(models, "tiny")

    def load(model):
        return engines.load("openvino", model, threads=1, precision="float32")

    compose = Composer(load, make("dcp", beta=1.2), fusible=True)
    pictures = golden_inputs(bundle.card.input)
    composed = compose(bundle.onnx("float32"), pictures, 32)
    both = (composed.fused.engine, composed.unfused.engine)
    sizes = [engine.sizes for engine in both]
    assert sizes == [[1, 16], [1]]
    for engine in both:
        for n in range(1, 33):
            engine(pictures[:1].repeat(n, 0))
    assert [engine.sizes for engine in both] == sizes
