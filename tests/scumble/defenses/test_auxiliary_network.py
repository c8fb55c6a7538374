"""Defenses with an auxiliary network: published outputs, equations in plain Python, gradients."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scumble.defenses import DefenseError, make
from scumble.defenses.adaptive_misinformation import AdaptiveMisinformation
from scumble.defenses.grad2 import Grad2
from scumble.defenses.mad import MAD, best_set, grown_set, one_hot_cosines
from tests.strategies import probs

VECTORS = Path(__file__).parents[4] / "shared" / "vectors" / "defenses.json"
ASSISTED = ("adaptive_misinformation", "mad", "grad2")
NAMES = {"grad2": "grad2_all_ones"}

epsilons = st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0])


class Given:
    """Auxiliary networks whose rows are known beforehand."""

    def __init__(self, rows):
        self.rows = rows

    def auxiliary(self, file, output):
        assert (file, output) in [
            ("surrogate.onnx", "probabilities"),
            ("surrogate.onnx", "scores"),
            ("misinformation.onnx", "probabilities"),
        ]
        return lambda inputs: self.rows


def answer(name, p, rows, **params):
    p = np.asarray(p)
    images = np.zeros((len(p), 1, 1, 1), np.uint8)
    return make(name, bundle=Given(np.asarray(rows, p.dtype)), **params)(p, images)


# The published outputs


@pytest.mark.skipif(not VECTORS.is_file(), reason=f"the vectors are not at {VECTORS}")
@pytest.mark.parametrize("name", ASSISTED)
def test_equals_the_published_implementation(name):
    vectors = json.loads(VECTORS.read_text())
    clean = {row["id"]: row["p"] for row in vectors["rows"]}
    cases = [c for c in vectors["cases"] if c["defense"] == NAMES.get(name, name)]
    assert len(cases) > 20
    for case in cases:
        p = np.array([clean[row] for row in case["rows"]], dtype=case["dtype"])
        if name == "adaptive_misinformation":
            rows = case["misinformation"]
        else:
            s, scores = small_network(vectors["surrogates"][case["surrogate"]], case["x"])
            rows = s if name == "mad" else scores
            if "class_score" in case and name == "grad2":
                np.testing.assert_allclose(scores, case["class_score"], rtol=1e-6)
        y = answer(name, p, rows, **case["params"])
        assert y.dtype == case["dtype"]
        tolerance = vectors["tolerance"][case["dtype"]][case["defense"]]
        np.testing.assert_allclose(y, case["out"], rtol=0, atol=tolerance, err_msg=case["id"])


def small_network(weights, x):
    """(probabilities, scores) of tanh(x W0 + b0) W2 + b2, the scores by the chain rule."""
    w0, b0, w2, b2 = (np.array(weights[k]) for k in ("0.weight", "0.bias", "2.weight", "2.bias"))
    x = np.array(x)
    h = np.tanh(x @ w0.T + b0)
    z = h @ w2.T + b2
    s = np.exp(z - z.max(1, keepdims=True))
    s /= s.sum(1, keepdims=True)
    h_moved = (1 - h**2) * (x.sum(1, keepdims=True) + 1)
    z_moved = h_moved @ w2.T + h.sum(1, keepdims=True) + 1
    return s, z_moved - (s * z_moved).sum(1, keepdims=True)


# The equations, one number at a time


@st.composite
def pairs(draw, **options):
    """(p, s): rows of one shape and type, some equal, s from another draw of the same kinds."""
    p = draw(probs(**{"min_k": 2, "max_k": 12, "max_n": 6, **options}))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = draw(st.sampled_from([0.1, 1, 5, 12])) * rng.standard_normal(p.shape)
    s = np.exp(logits - logits.max(axis=1, keepdims=True))
    s = (s / s.sum(axis=1, keepdims=True)).astype(p.dtype)
    same = rng.random(len(p)) < 0.2
    s[same] = p[same]
    return p, s


def cosine(a, b):
    norms = math.sqrt(math.fsum(v * v for v in a)) * math.sqrt(math.fsum(v * v for v in b))
    return math.fsum(u * v for u, v in zip(a, b, strict=True)) / norms if norms else 0.0


def gradient(y, s, h):
    """G^T y as it is defined: sum_k y_k (e_k - s) (h, 1)^T, all K (H + 1) numbers of it."""
    total = [0.0] * (len(s) * (len(h) + 1))
    for k, weight in enumerate(y):
        part = [((i == k) - s[i]) * v for i in range(len(s)) for v in (*h, 1.0)]
        total = [a + weight * b for a, b in zip(total, part, strict=True)]
    return total


@settings(max_examples=60)
@given(pair=pairs(max_k=6, max_n=3, dtypes=(np.float64,)), epsilon=epsilons)
def test_mad_takes_the_class_whose_gradient_is_farthest(pair, epsilon):
    p, s = pair
    y = answer("mad", p, s, epsilon=epsilon)
    h = [0.3, -2.0, 1.5]
    for clean, copy, sent in zip(p.tolist(), s.tolist(), y, strict=True):
        honest = (
            gradient(clean, copy, h) if clean != copy else [0.0] * (4 * len(copy))
        )  # without its rounding
        angles = [
            cosine(gradient([float(i == k) for i in range(len(clean))], copy, h), honest)
            for k in range(len(clean))
        ]
        candidates = []
        for k, angle in enumerate(angles):
            if angle <= min(angles) + 1e-6:  # what rounding cannot tell apart
                target = np.eye(len(clean))[k]
                distance = abs(target - clean).sum()
                t = 1 if distance <= epsilon else epsilon / distance
                candidates.append(abs((1 - t) * np.array(clean) + t * target - sent).max())
        assert min(candidates) < 1e-12


def test_mad_takes_the_last_of_equal_classes():
    p, s = [[0.4, 0.3, 0.3]], [[0.2, 0.4, 0.4]]
    np.testing.assert_allclose(
        answer("mad", p, s, epsilon=0.2), [[0.4 * (1 - 1 / 7), 0.3 * 6 / 7, 0.4]]
    )
    # Equal to the surrogate's answer: every cosine counts as 0.
    np.testing.assert_allclose(answer("mad", p, p, epsilon=2), [[0, 0, 1]])


def test_mad_tells_classes_apart_where_the_surrogate_is_almost_certain():
    # The angle to class 0 is that of (9, -4, -5) to (4, -3, -1), tiny as both are.
    tiny = 1e-9
    s = np.array([[1 - 9 * tiny, 4 * tiny, 5 * tiny]])
    move = np.array([[4 * tiny, -3 * tiny, -1 * tiny]])
    expected = (9 * 4 + 4 * 3 + 5 * 1) / math.sqrt(81 + 16 + 25)
    assert one_hot_cosines(s, move)[0, 0] == pytest.approx(expected * tiny, rel=1e-6)


def sets_with(top, classes):
    others = [k for k in range(classes) if k != top]
    for size in range(classes):
        for chosen in itertools.combinations(others, size):
            yield [top, *chosen]


def uniform_over(members, classes):
    return np.array([1 / len(members) if k in members else 0.0 for k in range(classes)])


@settings(max_examples=60)
@given(pair=pairs(max_k=7, max_n=4, dtypes=(np.float64,)), epsilon=epsilons)
def test_mad_argmax_tries_every_set_around_the_top_class(pair, epsilon):
    p, s = pair
    y = answer("mad", p, s, epsilon=epsilon, keep="argmax")
    classes = p.shape[1]
    for clean, copy, sent in zip(p, s, y, strict=True):
        top = int(clean.argmax())
        targets = [uniform_over(m, classes) for m in sets_with(top, classes)]
        angles = [cosine(target - copy, clean - copy) for target in targets]
        candidates = []
        for target, angle in zip(targets, angles, strict=True):
            if angle <= min(angles) + 1e-6:
                distance = abs(target - clean).sum()
                t = 1 if distance <= epsilon else epsilon / distance
                candidates.append(abs((1 - t) * clean + t * target - sent).max())
        assert min(candidates) < 1e-12
        assert sent[top] == sent.max()
        assert abs(sent - clean).sum() <= epsilon + 1e-12


@given(pair=pairs(min_k=11, max_k=40))
def test_mad_argmax_above_ten_classes_keeps_the_top_class(pair):
    p, s = pair
    y = answer("mad", p, s, epsilon=2, keep="argmax")
    at = np.arange(len(p)), p.argmax(axis=1)
    assert (y[at] == y.max(axis=1)).all()


@settings(max_examples=60)
@given(pair=pairs(max_k=10, dtypes=(np.float64,)))
def test_a_grown_set_is_uniform_better_than_none_and_no_better_than_all(pair):
    p, s = pair
    move, top = p - s, p.argmax(axis=1)
    cosines = one_hot_cosines(s, move)
    grown, best = grown_set(s, move, top, cosines), best_set(s, move, top, cosines)
    for i, c in enumerate(top):
        assert len(set(grown[i][grown[i] > 0])) == 1
        assert grown[i][c] > 0
        found, alone, least = (
            cosine(target - s[i], move[i]) for target in (grown[i], np.eye(len(s[i]))[c], best[i])
        )
        assert least - 1e-6 <= found <= alone + 1e-6


def exchange(p, scores, epsilon):
    """The mass moved one class at a time."""
    y = list(p)
    best = max(range(len(p)), key=lambda k: (scores[k], -k))
    wanted = min(math.fsum(v for k, v in enumerate(p) if k != best), epsilon / 2)
    y[best] += wanted
    for k in sorted(range(len(p)), key=lambda k: (scores[k], k)):
        if k != best:
            taken = min(y[k], wanted)
            y[k] -= taken
            wanted -= taken
    y = [min(max(v, 1e-15), 1.0) for v in y]
    return [v / math.fsum(y) for v in y]


@given(p=probs(min_k=2, max_k=30, max_n=8), epsilon=epsilons, seed=st.integers(0, 99))
def test_grad2_moves_mass_from_the_lowest_scores_to_the_highest(p, epsilon, seed):
    scores = np.random.default_rng(seed).integers(-9, 9, p.shape).astype(p.dtype)  # with ties
    y = answer("grad2", p, scores, epsilon=epsilon)
    slack = 1e-13 + 8 * np.finfo(p.dtype).eps  # the floor adds 1e-15 per class
    for clean, ranks, sent in zip(p.tolist(), scores.tolist(), y, strict=True):
        np.testing.assert_allclose(sent, exchange(clean, ranks, epsilon), rtol=0, atol=slack)
        if epsilon:
            assert (sent > 0).all()
        assert abs(sent - clean).sum() <= epsilon + len(clean) * slack


def test_grad2_reaches_the_best_of_all_rows_within_the_distance():
    """The exchange solves max <scores, y> over |y - p|_1 <= epsilon: no random row beats it."""
    rng = np.random.default_rng(3)
    p, scores = rng.dirichlet(np.ones(5), 20), rng.standard_normal((20, 5))
    y = answer("grad2", p, scores, epsilon=0.4)
    reached = (scores * y).sum(1)
    for _ in range(300):
        other = rng.dirichlet(np.ones(5), 20)
        distance = abs(other - p).sum(1, keepdims=True)
        other = p + (other - p) * np.minimum(1, 0.4 / distance)
        assert ((scores * other).sum(1) <= reached + 1e-9).all()


@given(p=probs(min_k=2, max_k=12, max_n=6), tau=st.sampled_from([0, 0.3, 0.5, 0.9, 1, 1.1, 2]))
def test_adaptive_misinformation_equals_the_equation(p, tau):
    false = np.random.default_rng(0).dirichlet(np.ones(p.shape[1]), len(p)).astype(p.dtype)
    y = answer("adaptive_misinformation", p, false, tau=tau)
    for clean, other, sent in zip(p, false, y, strict=True):
        exponent = 1000 * (float(clean.max()) - tau)
        a = 0.0 if exponent > 700 else 1 / (1 + math.exp(exponent))
        expected = (1 - a) * clean + a * other
        np.testing.assert_allclose(sent, expected, rtol=1e-5, atol=4 * np.finfo(p.dtype).eps)


def test_adaptive_misinformation_replaces_unsure_rows_only():
    p = [[0.9, 0.1], [0.6, 0.4], [0.75, 0.25]]
    false = [[0.0, 1.0]] * 3
    y = answer("adaptive_misinformation", p, false, tau=0.75)
    np.testing.assert_allclose(y, [[0.9, 0.1], [0, 1], [0.375, 0.625]], atol=1e-12)


# What an auxiliary network may lack


@pytest.mark.parametrize(
    ("kind", "params"),
    [(AdaptiveMisinformation, {"tau": 1}), (MAD, {"epsilon": 1}), (Grad2, {"epsilon": 1})],
)
def test_what_is_missing_is_named(kind, params):
    p = np.full((2, 4), 0.25)
    images = np.zeros((2, 1, 1, 1), np.uint8)
    with pytest.raises(DefenseError, match="no auxiliary network"):
        kind(**params)(p, images)
    with pytest.raises(DefenseError, match=rf"{kind.__name__} needs {kind.file} of a bundle"):
        kind.build(None, **params)
    with pytest.raises(ValueError, match=f"{kind.__name__} needs the images behind the rows"):
        kind(network=lambda x: p, **params)(p, None)
    with pytest.raises(ValueError, match=r"returned \(2, 3\) for rows \(2, 4\)"):
        kind(network=lambda x: p[:, :3], **params)(p, images)


@pytest.mark.parametrize(("name", "params"), [("mad", {"epsilon": 9}), ("grad2", {"epsilon": 9})])
def test_a_parameter_is_refused_before_the_network_is_looked_for(name, params):
    with pytest.raises(DefenseError, match="epsilon must be a number from 0 to 2"):
        make(name, **params)


# The gradients themselves


def network_and_images(seed=0):
    import torch
    from torch import nn

    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 6)
    ).double()
    return net, torch.rand(7, 2, 6, 6, dtype=torch.float64)


@pytest.mark.torch
def test_mad_needs_no_gradient():
    """K + 1 backward passes per row through a network give the same class and row."""
    import torch

    from scumble.evaluation.published_defenses import mad_reference

    for seed in range(5):
        net, x = network_and_images(seed)
        p = (net(x) + torch.randn(7, 6)).softmax(1).detach()
        s = net(x).softmax(1).detach().numpy()
        expected = mad_reference(net, x, p, 0.7).detach().numpy()
        np.testing.assert_allclose(answer("mad", p.numpy(), s, epsilon=0.7), expected, atol=1e-12)
