"""Training learns, and the same seed gives the same network."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from scumble.data.image_sets import Dataset
from scumble.training.train import AUGMENTS, Recipe, accuracy, as_tensors, train


@pytest.fixture(scope="module")
def digits() -> Dataset:
    found = load_digits()
    images = (found.images[..., None] * 15.9375).astype(np.uint8)
    names = tuple(str(k) for k in range(10))
    labels = found.target.astype(np.int64)
    return Dataset("digits", images, labels, names, tuple(map(str, range(len(labels)))))


RECIPE = Recipe("small_cnn", epochs=2, lr=0.1, augment="none", batch=64, ema=0.8)


def test_learns(digits):
    rest, held_out = digits.split(0.2, seed=0)
    net = train(RECIPE, rest, progress=False)
    assert not net.training
    assert accuracy(net, held_out) > 0.9


def test_same_seed_same_weights(digits):
    few = digits.subset(np.arange(200))
    recipe = Recipe("small_cnn", epochs=1, lr=0.1, augment="digits", batch=64)
    first, second = (train(recipe, few, progress=False).state_dict() for _ in range(2))
    other = train(Recipe(**{**vars(recipe), "seed": 1}), few, progress=False).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize("name", AUGMENTS)
def test_augment(name, digits):
    x, _ = as_tensors(digits.subset(np.arange(20)))
    changed = AUGMENTS[name](x, torch.Generator().manual_seed(0))
    assert changed.shape == x.shape
    assert changed.dtype == x.dtype
    assert changed.min() >= 0
    assert changed.max() <= 1 + 1e-6
    assert torch.equal(changed, x) == (name == "none")
    assert torch.equal(changed, AUGMENTS[name](x, torch.Generator().manual_seed(0)))
