"""What gathers before it is handed over loses nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, Histogram

from app.telemetry.metrics import BATCH, BufferedGauge, BufferedHistogram

FAMILY = "h"


@given(st.lists(st.lists(st.floats(0, 5000) | st.sampled_from(BATCH), max_size=30), max_size=5))
def test_buffered_observations_are_what_the_library_would_have_seen(rounds):
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    buffered = BufferedHistogram(Histogram(FAMILY, "x", buckets=BATCH, registry=ours))
    direct = Histogram(FAMILY, "x", buckets=BATCH, registry=theirs)
    for values in rounds:
        for value in values:
            buffered.observe(value)
            direct.observe(value)
        buffered.flush()
    for one, other in zip(ours.collect(), theirs.collect(), strict=True):
        for a, b in zip(one.samples, other.samples, strict=True):
            assert (a.name, a.labels) == (b.name, b.labels)
            if not a.name.endswith("_created"):
                np.testing.assert_allclose(a.value, b.value, rtol=1e-12)


@pytest.mark.parametrize("amount", [float("inf"), float("nan")])
def test_what_is_not_finite_is_counted_and_later_observations_as_well(amount):
    registry = CollectorRegistry()
    buffered = BufferedHistogram(Histogram(FAMILY, "x", buckets=BATCH, registry=registry))
    for value in (amount, 1.0):
        buffered.observe(value)
        buffered.flush()
    assert registry.get_sample_value("h_count") == 2
    assert registry.get_sample_value("h_bucket", {"le": "1.0"}) == 1


@given(st.lists(st.lists(st.integers(-50, 50), max_size=10), max_size=5))
def test_a_level_ends_where_the_library_would(rounds):
    registry = CollectorRegistry()
    level = BufferedGauge(Gauge("g", "x", registry=registry))
    for amounts in rounds:
        for amount in amounts:
            level.add(amount)
        level.flush()
    assert registry.get_sample_value("g") == sum(map(sum, rounds))
