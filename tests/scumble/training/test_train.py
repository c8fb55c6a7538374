"""Training learns, and the same seed gives the same network."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from scumble.data.image_sets import DIGITS, SPLIT_OFF, TORCHVISION, Dataset
from scumble.training.checkpoint import Checkpoint
from scumble.training.exposure import Exposure
from scumble.training.nets import NETS
from scumble.training.train import AUGMENTS, RECIPES, Loss, Recipe, accuracy, as_tensors, train


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


def test_exposure_makes_the_network_unsure_of_outliers_and_no_worse(digits):
    rest, held_out = digits.split(0.2, seed=0)
    noise = np.random.default_rng(0).integers(0, 256, (400, 8, 8, 1), np.uint8)
    fresh = torch.from_numpy(
        np.random.default_rng(1).integers(0, 256, (200, 1, 8, 8), np.uint8) / np.float32(255)
    )
    sure = {}
    for name, exposure in {"without": None, "with": Exposure(noise, 0.5)}.items():
        net = train(RECIPE, rest, exposure=exposure, progress=False)
        assert accuracy(net, held_out) > 0.9
        with torch.inference_mode():
            sure[name] = net(fresh).softmax(1).amax(1).mean().item()
    assert sure["with"] < 0.3 < sure["without"]


def test_exposure_has_a_least_loss_for_equal_logits():
    exposure = Exposure(np.zeros((1, 8, 8, 1), np.uint8), weight=2.0)
    even = exposure.loss(torch.zeros(3, 10))
    assert even.item() == pytest.approx(2 * np.log(10))
    assert exposure.loss(torch.eye(3, 10)) > even


@pytest.mark.parametrize(("n", "weight"), [(0, 0.5), (1, 0), (1, -1), (1, float("nan"))])
def test_no_outliers_or_no_weight_are_refused(n, weight):
    with pytest.raises(ValueError, match="allowed: at least one, of a weight above 0"):
        Exposure(np.zeros((n, 8, 8, 1), np.uint8), weight)


TINY = Recipe("small_cnn", epochs=3, lr=0.05, augment="digits", batch=64)


def interrupted_after(steps: int) -> Loss:
    """The usual loss; it is interrupted after so many steps."""
    left = iter(range(steps))

    def loss(logits, targets):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return torch.nn.functional.cross_entropy(logits, targets)

    return loss


@pytest.mark.parametrize(("steps", "outliers"), [(4, False), (6, False), (5, True)])
def test_an_interrupted_training_ends_with_the_weights_of_one_that_was_not(
    digits, tmp_path, steps, outliers
):
    few = digits.subset(np.arange(200))  # four steps an epoch
    noise = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), np.uint8)

    def exposure():
        return Exposure(noise, 0.5) if outliers else None

    whole = train(TINY, few, exposure=exposure(), progress=False).state_dict()
    checkpoint = Checkpoint(tmp_path / "t.pt", "this", every=0)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, few, loss=interrupted_after(steps), exposure=exposure(),
              checkpoint=checkpoint, progress=False)  # fmt: skip
    again = train(
        TINY, few, loss=interrupted_after(12 - steps), exposure=exposure(), checkpoint=checkpoint,
        progress=False,
    ).state_dict()  # fmt: skip
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_checkpoint_is_written_once_a_minute_and_read_by_the_same_training(tmp_path):
    now = [0.0]
    path = tmp_path / "folder" / "t.pt"
    checkpoint = Checkpoint(path, "this", clock=lambda: now[0])
    for second, written in ((0, 0), (59, 0), (60, 60), (100, 60), (120, 120)):
        now[0] = second
        checkpoint.write(lambda: {"at": now[0]})
        assert checkpoint.read() == {"at": written}
    assert Checkpoint(path, "another").read() is None
    path.write_bytes(path.read_bytes()[:50])
    assert checkpoint.read() is None
    checkpoint.remove()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("net", NETS)
def test_networks_take_small_images(net):
    network = NETS[net](3, 7)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_resnet18_is_of_the_usual_width():
    assert sum(weight.numel() for weight in NETS["resnet18"](3, 10).parameters()) == 11_173_962


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_name_networks_sets_and_augmentations_that_are_there(name):
    recipe = RECIPES[name]
    assert recipe.net in NETS
    assert recipe.augment in AUGMENTS
    assert (recipe.data or name) in {*TORCHVISION, *SPLIT_OFF, DIGITS}
