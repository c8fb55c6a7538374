"""One body for all attacks, then what is particular to each."""

import dataclasses
from dataclasses import replace

import httpx2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scumble.attacker import students
from scumble.attacker.adapt.base import Mapped, Remembered
from scumble.attacker.attacks import ATTACKS, DATA_FREE, make
from scumble.attacker.attacks.copycat import Copycat
from scumble.attacker.attacks.dfme import Dfme
from scumble.attacker.attacks.fixmatch import FixMatch
from scumble.attacker.attacks.ideal import Ideal
from scumble.attacker.attacks.jbda import Jbda
from scumble.attacker.attacks.knockoff import Bandit, Knockoff
from scumble.attacker.attacks.mask_seeking import MaskSeeking, Seeker
from scumble.attacker.attacks.maze import Maze, Memory
from scumble.attacker.attacks.zeroth import PAPER_STEP, default_step, estimate
from scumble.attacker.errors import AttackError
from scumble.attacker.generators import Generator, images
from scumble.attacker.observer import blind
from scumble.attacker.oracle import HttpOracle
from scumble.attacker.students import Fitting
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
    "fixmatch": (FixMatch(fitting=replace(FIT, loss="ce"), mu=1, threshold=0.5), 2),
    "ideal": (Ideal(batch=16, g_steps=1, s_steps=2, width=8, nz=16, memory=200, views=4), 16),
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


def test_rounds_map_the_answers_again_with_a_better_copy():
    """The queries are the same; the answers of the second fit come from the first copy's view."""
    victim, seen = linear_victim(), []

    class Doubtful(Mapped):
        def __init__(self, oracle, student):
            def answer(rows, images):
                seen.append(students.predict(student, images))
                return rows

            super().__init__(Remembered(oracle), answer)

    student = students.make("small_cnn", SHAPE, LABELS, seed=0)
    inner = FunctionOracle(victim, 300)
    attack = Knockoff(fitting=FIT, ask=300, rounds=2)
    attack(Doubtful(inner, student), student, noise_pool(), blind)
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


@pytest.mark.parametrize("name", ["knockoff", "jbda", "copycat", "mask_seeking", "fixmatch"])
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
    x, y = memory.draw(200, torch.Generator().manual_seed(0))
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
    ("change", "message"),
    [
        ({"loss": "hinge"}, "loss is 'hinge'; allowed: soft, centred"),
        ({"augment": "x"}, "augment is 'x'; allowed: none"),
        ({"epochs": 0}, "epochs is 0; allowed: more than 0"),
    ],
)
def test_a_fitting_says_what_it_takes(change, message):
    with pytest.raises(AttackError, match=message):
        Fitting(**change)


@pytest.mark.parametrize("name", [*students.STUDENTS, "auto"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_students_start_from_weights_of_their_own_kind(name, shape, tmp_path):
    first = students.make(name, shape, 10, seed=0)
    torch.save(first.state_dict(), tmp_path / "copy.pt")
    again = students.make(name, shape, 10, seed=1, weights=tmp_path / "copy.pt")
    x = torch.rand(2, *shape)
    torch.testing.assert_close(again.eval()(x), first.eval()(x))
    with pytest.raises(AttackError, match="do not fit"):
        students.make(name, shape, 11, seed=1, weights=tmp_path / "copy.pt")


def test_an_unknown_student_names_the_known():
    with pytest.raises(AttackError, match="student is 'vgg'; allowed: auto, small_cnn"):
        students.make("vgg", SHAPE, 2, seed=0)


def test_no_answers_is_an_error():
    with pytest.raises(AttackError, match="0 of 150 answers can be used"):
        steal(SMALL["knockoff"][0], FunctionOracle(linear_victim(), 300, drop=1.0))


@pytest.mark.parametrize(("name", "profile"), [("knockof", "cpu"), ("dfme", "gpu")])
def test_unknown_attacks_and_profiles_name_the_known(name, profile):
    with pytest.raises(AttackError, match=r"allowed: (knockoff|paper), "):
        make(name, profile)
