"""The fit of a copy: its losses, and what makes it stronger."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from scumble.attacker import students
from scumble.attacker.errors import AttackError
from scumble.attacker.losses import LOSSES
from scumble.attacker.students import Best, Fitting, fit, mixture
from scumble.training import autocast
from tests.scumble.attacker.stand_ins import LABELS, SHAPE, linear_victim, noise_pool

FIT = Fitting(epochs=2, batch=32, loss="ce")


def fitted(fitting, answers=None, n=200):
    images = noise_pool(n).images
    if answers is None:
        answers = linear_victim()(torch.from_numpy(images)).softmax(1).numpy()
    student = students.make("small_cnn", SHAPE, LABELS, seed=0)
    fit(student, images, answers, fitting)
    return student


def weights(student):
    return torch.cat([value.flatten().float() for value in student.state_dict().values()])


@pytest.mark.parametrize(
    "changes",
    [
        *({"loss": loss} for loss in LOSSES),
        {"smoothing": 0.1},
        {"mixup": 0.4},
        {"holdout": 0.2},
        {"holdout": 0.2, "patience": 1},
        {"augment": "scaled"},
        {"augment": "scaled_upright"},
    ],
    ids=str,
)
def test_every_way_to_fit_gives_the_same_copy_for_the_same_seed(changes):
    how = replace(FIT, **changes)
    first = fitted(how)
    torch.manual_seed(99)
    assert torch.equal(weights(first), weights(fitted(how)))
    assert torch.isfinite(weights(first)).all()
    assert not torch.equal(weights(first), weights(fitted(replace(how, seed=1))))


@pytest.mark.parametrize("loss", ["gce", "small_loss", "elr"])
def test_noise_robust_losses_say_less_of_a_wrong_label_than_cross_entropy(loss):
    """How strongly a class that the copy is sure of is unlearned, late in the fit."""
    answers = torch.eye(4)[torch.zeros(16, dtype=torch.long)].clamp_min(1e-12)

    def slope(name):
        logits = torch.zeros(16, 4)
        logits[:, 0] = 4
        logits[0] = torch.tensor([-4.0, 4, 0, 0])  # this copy is sure of another class
        logits.requires_grad_()
        made = LOSSES[name](16, 4, 0.1)
        for _ in range(20):  # what the copy said before counts for `elr`
            made(logits.detach(), answers, torch.arange(16), 0.9)
        made(logits, answers, torch.arange(16), 0.9).backward()
        return float(logits.grad[0, 1])

    assert slope(loss) < slope("ce") / 2


def test_losses_of_labels_do_not_see_the_probabilities():
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.ones(LABELS), 200).astype(np.float32)
    sure = np.eye(LABELS, dtype=np.float32)[rows.argmax(1)]
    assert torch.equal(weights(fitted(FIT, rows)), weights(fitted(FIT, sure)))
    soft = replace(FIT, loss="soft")
    assert not torch.equal(weights(fitted(soft, rows)), weights(fitted(soft, sure)))


class Fixed(torch.nn.Module):
    def __init__(self, right):
        super().__init__()
        self.right = torch.nn.Parameter(torch.tensor(float(right)))

    def forward(self, x):
        at = torch.arange(len(x)) < self.right
        return torch.stack([at.float(), (~at).float()], 1)


def test_the_copy_that_agrees_best_with_held_out_answers_is_kept():
    best = Best(torch.zeros(10, *SHAPE), torch.eye(2)[torch.zeros(10, dtype=torch.long)])
    for right, kept, waited in [(3, 3, 0), (8, 8, 0), (5, 8, 1), (8, 8, 2), (9, 9, 0)]:
        best.see(Fixed(right))
        assert (best.weights["right"], best.waited) == (kept, waited)


def test_a_fit_without_progress_ends_early():
    """On noise the agreement soon stops rising: the fit takes fewer steps than all epochs have."""
    rng = np.random.default_rng(0)
    noise = rng.dirichlet(np.ones(LABELS), 100).astype(np.float32)
    how = replace(FIT, epochs=40, holdout=0.3)
    seen = []
    original = students.AUGMENTS["none"]
    counting = {"none": lambda x, generator: (seen.append(len(x)), original(x, generator))[1]}
    tables = students.AUGMENTS
    students.AUGMENTS = tables | counting
    try:
        fitted(how, noise, n=100)
        whole = len(seen)
        seen.clear()
        fitted(replace(how, patience=3), noise, n=100)
    finally:
        students.AUGMENTS = tables
    assert len(seen) < whole == 40 * 3


def test_mixed_images_keep_more_of_themselves_than_of_the_other():
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        share, order = mixture(0.4, 7, rng)
        assert 0.5 <= share <= 1
        assert sorted(order.tolist()) == list(range(7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"smoothing": 1.0}, "smoothing is 1.0; allowed: 0 to less than 1"),
        ({"noise": -0.1}, "noise is -0.1; allowed: 0 to less than 1"),
        ({"holdout": 1}, "holdout is 1; allowed: 0 to less than 1"),
        ({"mixup": -1}, "mixup is -1; allowed: 0 and more"),
        ({"patience": 2}, "patience is 2; allowed with a holdout"),
        ({"batch": 1}, "batch is 1; allowed: 2 and more"),
        ({"epochs": 0}, "epochs is 0; allowed: 1 and more"),
        ({"lr": 0}, "lr is 0; allowed: more than 0"),
        ({"lr": math.inf}, "lr is inf; allowed: more than 0"),
        ({"lr": math.nan}, "lr is nan; allowed: more than 0"),
        ({"weight_decay": -5}, "weight_decay is -5; allowed: 0 and more"),
        ({"mixup": math.nan}, "mixup is nan; allowed: 0 and more"),
        ({"ema": 1}, "ema is 1; allowed: 0 to less than 1"),
        ({"warmup": 2}, "warmup is 2; allowed: 0 to 1"),
        ({"smoothing": 0.1, "loss": "centred"}, "allowed with the loss centred: 0"),
    ],
)
def test_a_fit_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(AttackError, match=message):
        replace(FIT, **change)


def test_a_holdout_leaves_something_to_learn():
    with pytest.raises(AttackError, match="leaves 1 of 20 answers to learn; at least 2 needed"):
        fitted(replace(FIT, holdout=0.95), n=20)


def test_layers_work_in_bfloat16_only_where_that_is_fast():
    assert autocast.fast_bfloat16("cuda")
    x = torch.ones(2, 2)
    with autocast.autocast("cpu"):
        kind = torch.nn.Linear(2, 2)(x).dtype
    fast = autocast.fast_bfloat16("cpu")
    assert kind == (torch.bfloat16 if fast else torch.float32)


def test_elr_forgets_answers_whose_places_were_taken():
    loss = LOSSES["elr"](4, 3, 0.0)
    rows, answers = torch.arange(4), torch.eye(3)[[0, 1, 2, 0]]
    first = loss(torch.ones(4, 3), answers, rows, 0.0)
    again = loss(torch.ones(4, 3), answers, rows, 0.0)
    assert first != again
    loss.forget(rows)
    assert loss(torch.ones(4, 3), answers, rows, 0.0) == first
