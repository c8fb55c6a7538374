"""Adaptive attackers: what holds for all of them, and that each undoes what it should."""

import numpy as np
import pytest
import torch
from torch import nn

from scumble import defenses
from scumble.attacker.adapt import KEEP, MODIFIERS, apply, check_again, make
from scumble.attacker.adapt.base import again
from scumble.attacker.adapt.diluted import DilutedOracle
from scumble.attacker.adapt.paced import PacedOracle
from scumble.attacker.adapt.perturbation_formulas import KnownDefense
from scumble.attacker.adapt.posteriors import draw
from scumble.attacker.errors import AttackError, BudgetExhausted

# Every modifier at least once, small enough for a test.
ROWS = [
    ("argmax", {}),
    ("top_k", {"k": 2}),
    ("confidence_filter", {"beta": 0.5}),
    ("average", {"repeats": 3}),
    ("average", {"repeats": 2, "augment": False}),
    ("invert", {"beta": 0.9, "pairs": 2000}),
    ("invert", {"beta": 0.9, "prior": "student"}),
    ("invert", {"defense": "reverse_sigmoid", "beta": 3, "odds": "lee2018", "pairs": 2000}),
    ("recover", {"pairs": 600, "epochs": 1, "hidden": [16]}),
    ("margin_filter", {"share": 0.3}),
    ("modelguard", {}),
    ("consistency_filter", {"repeats": 2}),
    ("answered", {}),
    ("paced", {"rate": 1e6}),
]
every_modifier = pytest.mark.parametrize(
    ("name", "params"), ROWS, ids=[f"{name} {params}" for name, params in ROWS]
)


class Service:
    """A plain function for a service: the rows, or those of the images; NaN where bit is set."""

    shape = (1, 4, 4)

    def __init__(self, labels=10, *, rows=None, defense=None, budget=1000, step=0.0, thrown=()):
        self.labels = labels if rows is None else rows.shape[1]
        self.step = step
        self.asked = []
        self._rows = rows
        self._defense = defense
        self._budget = budget
        self._thrown = thrown
        self._weights = np.random.default_rng(5).standard_normal((16, self.labels)) * 4

    @property
    def remaining(self):
        return self._budget - sum(map(len, self.asked))

    def __call__(self, images):
        if len(images) > self.remaining:
            raise BudgetExhausted("too many")
        self.asked.append(images)
        rows = softmax(images.reshape(len(images), 16) @ self._weights)
        if self._rows is not None:
            rows = self._rows[: len(images)]
        if self._defense:
            rows = self._defense(rows)
        answers = rows.astype(np.float32)
        answers[[i for i in self._thrown if i < len(images)]] = np.nan
        return answers


class Opinion(nn.Module):
    """A student that says the given logits, in order."""

    def __init__(self, logits):
        super().__init__()
        self._left = torch.from_numpy(logits)

    def forward(self, images):
        now, self._left = self._left.tensor_split([len(images)])
        return now


def softmax(logits):
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def images(n, seed=0):
    return np.random.default_rng(seed).random((n, 1, 4, 4)).astype(np.float32)


def network(labels):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, labels), nn.BatchNorm1d(labels))


def l1(a, b):
    return np.abs(a - b).sum(axis=1)


def logits(classes, n=300, seed=3):
    return 4 * np.random.default_rng(seed).standard_normal((n, classes))


def invert(clean, known, student, *, decimals=7, **params):
    """What `invert` makes of the answers to clean rows, and the answers."""
    service = Service(rows=known(clean).round(decimals))
    made = make("invert", defense=known.defense, beta=known.beta, odds=known.odds, **params)
    return made(service, student)(images(len(clean))), service(images(len(clean)))


def test_every_modifier_has_a_row():
    # oracle_mask needs a real service: tests/scumble/evaluation/test_referee.py
    # and diluted a data set, below.
    assert {name for name, _ in ROWS} == set(MODIFIERS) - {"oracle_mask", "diluted"}


@every_modifier
@pytest.mark.parametrize("labels", [3, 10, 43])
def test_answers_are_probabilities_or_nan(labels, name, params):
    service = Service(labels, thrown=[0, 7])
    oracle = make(name, **params)(service, network(labels))
    answers = oracle(images(20))
    assert (answers.shape, answers.dtype) == ((20, labels), np.float32)
    thrown = np.isnan(answers)
    assert (thrown.all(axis=1) == thrown.any(axis=1)).all()
    if name != "average":  # there one repeat may be thrown away and another not
        assert thrown[[0, 7 // params.get("repeats", 1)]].all()
    kept = answers[~thrown.any(axis=1)]
    assert len(kept) > 3
    assert (kept >= 0).all()
    np.testing.assert_allclose(kept.sum(axis=1), 1, atol=1e-5)


@every_modifier
def test_an_answer_of_nothing_but_nan_stays_so(name, params):
    service = Service(thrown=range(60))
    answers = make(name, **params)(service, network(10))(images(9))
    assert np.isnan(answers).all()
    assert answers.shape == (9, 10)


@every_modifier
def test_no_images_no_answers(name, params):
    oracle = make(name, **params)(Service(), network(10))
    assert oracle(images(0)).shape == (0, 10)


@every_modifier
def test_the_oracle_is_described_and_the_budget_kept(name, params):
    service = Service(budget=20, step=1 / 255)
    oracle = make(name, **params)(service, network(10))
    assert (oracle.labels, oracle.shape, oracle.step) == (10, (1, 4, 4), 1 / 255)
    cost = params.get("repeats", 1)
    assert oracle.remaining == 20 // cost
    oracle(images(4))
    assert service.remaining == 20 - 4 * cost
    assert oracle.remaining == (20 - 4 * cost) // cost
    before = len(service.asked)
    with pytest.raises(BudgetExhausted):
        oracle(images(oracle.remaining + 1))
    assert len(service.asked) == before
    oracle(images(oracle.remaining))


@every_modifier
def test_the_same_seed_gives_the_same_answers_and_leaves_no_trace(name, params):
    student = network(10)
    student[2].eval()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = make(name, **params)(Service(), student)(images(30))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (student.training, student[2].training) == (True, False)
    torch.manual_seed(2)
    again = make(name, **params)(Service(), student)(images(30))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("armax", {}, "unknown modifier 'armax'; allowed: argmax, top_k, confidence_filter, "),
        ("argmax", {"k": 1}, "argmax has no parameter 'k'; allowed: none"),
        ("average", {"n": 1}, "average has no parameter 'n'; allowed: repeats, augment, seed"),
        ("top_k", {"k": 0}, "TopK: k must be an integer from 1 to 1000000, got 0"),
        ("top_k", {"k": True}, "TopK: k must be an integer from 1 to 1000000, got True"),
        ("average", {"augment": 2}, "Average: augment must be one of False, True, got 2"),
        ("invert", {"gamma": 1}, "Invert: gamma must be a number from 0.001 to 0.999, got 1"),
        ("invert", {"beta": float("nan")}, "Invert: beta must be a number from 0 to 10, got nan"),
        ("invert", {"odds": "lee"}, "Invert: odds must be one of 'clamped', 'lee2018', got 'lee'"),
        ("invert", {"scales": 4}, "Invert: scales must be one or more numbers above 0, got 4"),
        ("recover", {"hidden": [8, 0.5]}, "Recover: hidden must hold integers above 0"),
    ],
)
def test_bad_parameters_are_refused(name, params, message):
    with pytest.raises(AttackError) as caught:
        make(name, **params)
    assert message in str(caught.value)


def test_the_first_modifier_is_nearest_to_the_service():
    row = np.array([[0.5, 0.3, 0.2]])
    filtered = apply([make("confidence_filter", beta=0.7), "argmax"], Service(rows=row), network(3))
    assert np.isnan(filtered(images(1))).all()
    labels = apply(["argmax", make("confidence_filter", beta=0.7)], Service(rows=row), network(3))
    assert labels(images(1)).tolist() == [[1, 0, 0]]
    service = Service(rows=row)
    assert apply([], service, network(3)) is service


def test_argmax_and_top_k_keep_the_first_of_equals():
    service = Service(rows=np.array([[0.2, 0.4, 0.4, 0.0], [0.25, 0.25, 0.25, 0.25]]))
    assert make("argmax")(service, network(4))(images(2)).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    kept = make("top_k", k=2)(service, network(4))(images(2))
    np.testing.assert_allclose(kept, [[0, 0.5, 0.5, 0], [0.5, 0.5, 0, 0]])


def test_top_k_of_more_than_all_is_refused():
    with pytest.raises(AttackError, match="k must be an integer from 1 to 3, got 5"):
        make("top_k", k=5)(Service(3), network(3))


def test_the_filter_keeps_just_what_dcp_left_alone():
    clean = softmax(logits(10))
    service = Service(rows=clean, defense=lambda p: defenses.make("dcp", beta=0.7)(p, None))
    answers = make("confidence_filter", beta=0.7)(service, network(10))(images(300))
    kept = ~np.isnan(answers).any(axis=1)
    np.testing.assert_array_equal(kept, clean.max(axis=1) > 0.73)
    np.testing.assert_allclose(answers[kept], clean[kept], atol=1e-6)
    assert np.isnan(make("confidence_filter")(service, network(10))(images(300))).all()


def test_repeats_are_asked_in_one_call_and_differ_by_what_the_service_sees():
    service = Service(step=1 / 255)
    make("average", repeats=5)(service, network(10))(images(7))
    (asked,) = service.asked
    assert asked.shape == (35, 1, 4, 4)
    assert asked.dtype == np.float32
    assert (asked >= 0).all()
    assert (asked <= 1).all()
    np.testing.assert_array_equal(asked[::5], images(7))
    inner = asked[1::5, :, 1:3, 1:3]
    moves = [
        np.abs(inner - images(7)[:, :, 1 + down : 3 + down, 1 + right : 3 + right])
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
    ]
    nearest = np.min([move.max(axis=(1, 2, 3)) for move in moves], axis=0)
    assert (nearest < 1.01 / 255).all()
    assert len(np.unique(asked.reshape(35, -1), axis=0)) == 35


def test_averaging_undoes_noise_keyed_to_the_image():
    keyed = defenses.make("random", epsilon=0.8, secret=b"key")
    clean = np.array([[0.9, 0.05, 0.05, 0, 0, 0]] * 50)
    picture = images(50)

    class Keyed(Service):
        def __call__(self, asked):
            self.asked.append(asked)
            return keyed(np.tile(clean[:1], (len(asked), 1)), asked).astype(np.float32)

    answers = make("average", repeats=20)(Keyed(6), network(6))(picture)
    same = make("average", repeats=20, augment=False)(Keyed(6), network(6))(picture)
    assert (same > 0.35).sum() == 100  # the top class, and all of the noise on another
    assert (answers > 0.35).sum() == 50


@pytest.mark.parametrize("classes", [3, 10, 43])
@pytest.mark.parametrize("odds", ["clamped", "lee2018"])
@pytest.mark.parametrize("beta", [0, 0.3, 0.7, 1, 1.5, 4])
def test_own_maps_are_those_of_the_service(beta, odds, classes):
    rng = np.random.default_rng(0)
    top = np.linspace(1 / classes, 1, 50)[:, None]
    edges = np.concatenate([top, np.tile((1 - top) / (classes - 1), classes - 1)], axis=1)
    half = np.zeros((1, classes))
    half[0, :2] = 0.5
    at_beta = np.full((1, classes), (1 - min(beta, 1)) / (classes - 1))
    at_beta[0, 0] = min(beta, 1)
    rows = np.concatenate(
        [draw(500, classes, (1, 8, 30), rng), np.eye(classes), edges, half, at_beta]
    )
    mode = "reference" if odds == "clamped" else odds
    for gamma in (0.1, 0.2, 0.9):
        for own, theirs in (
            (
                KnownDefense("dcp", beta, gamma, 1000, odds),
                defenses.make("dcp", beta=beta, gamma=gamma, mode=mode),
            ),
            (
                KnownDefense("reverse_sigmoid", beta, gamma, 1000, odds),
                defenses.make("reverse_sigmoid", beta=beta, gamma=gamma, odds=odds),
            ),
        ):
            np.testing.assert_allclose(own(rows), theirs(rows, None), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("beta", "gamma", "fold", "least"),
    [(0.7, 0.2, 0.0323, 0.1469), (1.0, 0.2, 0.0480, 0.1931), (1.5, 0.1, 0.0379, 0.1581)],
)
def test_the_fold_is_where_the_least_is_added_to(beta, gamma, fold, least):
    known = KnownDefense("reverse_sigmoid", beta, gamma, 1000, "clamped")
    found = known.fold(np.array([beta]))
    assert found[0] == pytest.approx(fold, abs=2e-4)
    assert known.raised(found, np.array([beta]))[0] == pytest.approx(least, abs=1e-4)
    near = np.linspace(0.001, 0.499, 1000)
    assert (known.raised(near, np.array([beta])) >= known.raised(found, np.array([beta]))).all()


@pytest.mark.parametrize("odds", ["clamped", "lee2018"])
@pytest.mark.parametrize("defense", ["dcp", "reverse_sigmoid"])
def test_slopes_are_those_of_the_maps(defense, odds):
    known = KnownDefense(defense, 0.8, 0.2, 1000, odds)
    p = np.array([1e-6, 0.01, 0.3, 0.499, 0.501, 0.9])
    m = np.array([0.5, 0.795, 0.8, 0.802, 0.9, 0.99])
    c = np.array(0.8)
    step = p * 1e-6
    numeric = (known.raised(p + step, c) - known.raised(p - step, c)) / (2 * step)
    np.testing.assert_allclose(known.raised_slope(p, c), numeric, rtol=1e-5)
    numeric = (known.strength(m + 1e-7) - known.strength(m - 1e-7)) / 2e-7
    np.testing.assert_allclose(known.strength_slope(m), numeric, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [3, 10, 43])
@pytest.mark.parametrize("odds", ["clamped", "lee2018"])
@pytest.mark.parametrize(
    ("defense", "beta"),
    [("dcp", 0.7), ("dcp", 1), ("dcp", 1.2), ("reverse_sigmoid", 0.64)],
)
def test_with_a_good_prior_inversion_is_exact(defense, beta, odds, classes):
    known = KnownDefense(defense, beta, 0.2, 1000, odds)
    z = logits(classes, 200)
    noise = 0.05 * np.random.default_rng(0).standard_normal(z.shape)
    clean = softmax(z)
    found, answers = invert(clean, known, Opinion(_moved(z + noise, known, clean)), prior="student")
    moved = answers.max(axis=1) <= known.open_above
    assert np.median(l1(found, clean)[moved]) < 1e-3
    assert l1(found, clean)[moved].mean() < 0.1 * l1(answers, clean)[moved].mean()
    np.testing.assert_array_equal(found[~moved], answers[~moved])


def _moved(prior, known, clean):
    """The logits of rows that the defense moves: of the others the student is not asked."""
    answers = known(clean).round(7).astype(np.float32)
    return prior[answers.max(axis=1) <= known.open_above]


def test_rows_in_the_gate_and_with_empty_tails_are_found():
    known = KnownDefense("dcp", 1.0, 0.2, 1000, "clamped")
    top = np.array([0.6, 0.97, 0.99, 0.995, 0.999, 0.9999])
    clean = np.zeros((6, 5))
    clean[:, 1], clean[:, 3] = top, 1 - top
    prior = np.log(clean + 1e-9)
    prior[:, 3] -= 0.3
    found, answers = invert(clean, known, Opinion(prior), prior="student")
    assert (l1(answers, clean) > 0.9).all()
    np.testing.assert_allclose(found, clean, atol=2e-4)


@pytest.mark.parametrize(
    ("classes", "beta", "prior", "mean", "median"),
    [
        (10, 0.9, "student", 0.25, 0.1),
        (10, 1.0, "student", 0.2, 0.005),
        (10, 1.5, "student", 0.25, 0.001),
        (43, 1.0, "student", 0.3, 0.1),
        (10, 0.9, "table", 0.55, 0.55),
        (10, 1.0, "table", 0.45, 0.4),
        (43, 1.0, "table", 0.85, 0.75),
    ],
)
def test_inversion_with_six_decimals(classes, beta, prior, mean, median):
    known = KnownDefense("dcp", beta, 0.2, 1000, "clamped")
    z = logits(classes)
    z = z[softmax(z).max(axis=1) < beta]
    clean = softmax(z)
    half_trained = Opinion(z + np.random.default_rng(1).standard_normal(z.shape))
    found, answers = invert(clean, known, half_trained, prior=prior, pairs=20_000, decimals=6)
    assert l1(answers, clean).mean() > 1
    assert l1(found, clean).mean() < mean
    assert np.median(l1(found, clean)) < median


def test_an_answer_with_no_clean_row_keeps_the_prior():
    impossible = np.array([[0.34, 0.33, 0.33] + [0.0] * 7], np.float32)
    prior = np.random.default_rng(0).standard_normal((1, 10))
    oracle = make("invert", prior="student", trust=0)(Service(rows=impossible), Opinion(prior))
    np.testing.assert_allclose(oracle(images(1)), softmax(prior), rtol=1e-6)


def test_recovery_helps_against_defenses_that_it_is_not_told():
    clean = softmax(logits(10, 1000))
    service = Service(rows=clean)
    oracle = make("recover", pairs=10_000, epochs=8)(service, network(10))
    assert l1(oracle(images(1000)), clean).mean() < 0.15
    for name, params in (
        ("dcp", {"beta": 0.9}),
        ("dcp", {"beta": 1.0}),
        ("reverse_sigmoid", {"beta": 0.64}),
        ("reverse_sigmoid", {"beta": 0.64, "odds": "lee2018"}),
    ):
        defended = defenses.make(name, **params)(clean, None)
        service._rows = defended
        service.asked.clear()
        recovered = oracle(images(1000))
        assert l1(recovered, clean).mean() < 0.65 * l1(defended, clean).mean(), (name, params)


def test_classes_are_treated_alike():
    clean = softmax(logits(10, 40))
    swapped = np.random.default_rng(0).permutation(10)
    known = KnownDefense("dcp", 1.0, 0.2, 1000, "clamped")
    for modifier in (
        make("invert", pairs=2000),
        make("recover", pairs=600, epochs=1, hidden=[16]),
    ):
        one = modifier(Service(rows=known(clean)), network(10))(images(40))
        other = modifier(Service(rows=known(clean[:, swapped])), network(10))(images(40))
        np.testing.assert_allclose(one[:, swapped], other, atol=1e-3)


def perturbed(clean, size=0.05):
    """A bounded perturbation that moves `size` from the top class to the second."""
    rows = clean.copy()
    ordered = np.argsort(-rows, axis=1)
    each = np.arange(len(rows))
    rows[each, ordered[:, 0]] -= size
    rows[each, ordered[:, 1]] += size
    return rows


def test_labels_with_a_clear_lead_are_those_that_were_not_changed():
    clean = softmax(logits(10, n=1000))
    answers = perturbed(clean)
    wrong = answers.argmax(1) != clean.argmax(1)
    share = float(wrong.mean())
    assert 0.02 < share < 0.3
    kept = make("margin_filter", share=0.3)(Service(rows=answers), nn.Identity())(images(1000))
    there = ~np.isnan(kept).any(1)
    assert there.mean() == pytest.approx(0.7)
    assert wrong[there].mean() < share / 2


def guarded(clean, height=0.48):
    """ModelGuard-W for confident rows: the top falls to `height`, the least likely class rises."""
    rows = clean.copy()
    each, top, least = np.arange(len(rows)), rows.argmax(1), rows.argmin(1)
    rows[each, top], rows[each, least] = height, height - 1e-4
    rows[each, np.argsort(rows, axis=1)[:, 0]] += 1 - rows.sum(1)
    return rows


def test_modelguards_confident_rows_are_restored():
    clean = np.full((50, 10), 0.001)
    clean[np.arange(50), np.arange(50) % 10] = 0.991
    answers = guarded(clean)
    assert l1(answers, clean).mean() > 0.9
    found = make("modelguard")(Service(rows=answers), network(10))(images(50))
    assert np.median(l1(found, clean)) < 0.1


def test_the_copy_decides_whether_a_further_class_is_given_back():
    clean = np.full((40, 10), 0.002)
    clean[:, 3] = 0.982
    answers = clean.copy()
    answers[:, 3], answers[:, 8], answers[:, 9] = 0.42, 0.4199, 0.1461
    found = {}
    for name, belief in (("sure", 8.0), ("unfit", 0.0)):
        prior = np.zeros((40, 10))
        prior[:, 3] = belief
        prior[:, 0] += 1e-3 if not belief else 0
        student = Opinion(prior)
        found[name] = make("modelguard")(Service(rows=answers), student)(images(40))
    assert l1(found["sure"], clean).mean() < 0.02
    assert l1(found["unfit"], clean).mean() > 0.2


def test_a_copy_that_has_learned_nothing_is_no_prior():
    """The table is used until the copy gives the labels; once it does, the copy is."""
    known = KnownDefense("dcp", 1.2, 0.2, 1000.0, "clamped")
    clean = softmax(logits(10))
    moved = known(clean)
    unfit = Opinion(np.zeros((300, 10)))
    by_table, _ = invert(clean, known, unfit, prior="table", pairs=5000)
    by_unfit, _ = invert(clean, known, unfit, prior="student", pairs=5000)
    by_fit, _ = invert(clean, known, Opinion(np.log(clean)), prior="student", pairs=5000)
    np.testing.assert_array_equal(by_table, by_unfit)
    assert l1(by_fit, clean).mean() < l1(by_table, clean).mean() / 2
    assert (by_fit.argmax(1) == clean.argmax(1)).mean() >= (
        moved.argmax(1) == clean.argmax(1)
    ).mean()


def test_answers_are_mapped_again_without_a_query():
    known = KnownDefense("dcp", 1.2, 0.2, 1000.0, "clamped")
    clean = softmax(logits(10, n=200))
    service = Service(rows=known(clean))
    student = Opinion(np.zeros((200, 10)))
    oracle = apply(
        [make("invert", beta=1.2, prior="student", pairs=5000), make("margin_filter", share=0.1)],
        service,
        student,
    )
    first = oracle(images(200))
    student._left = torch.from_numpy(np.log(clean))
    second = again(oracle, images(200))
    assert len(service.asked) == 1
    kept = ~np.isnan(first).any(1) & ~np.isnan(second).any(1)
    assert l1(second, clean)[kept].mean() < l1(first, clean)[kept].mean() / 2


@pytest.mark.parametrize("modifiers", [[], ["argmax"], ["average"]])
def test_answers_that_nobody_keeps_cannot_be_mapped_again(modifiers):
    oracle = apply(modifiers, Service(), network(10))
    with pytest.raises(AttackError, match="rounds needs answers that can be given again"):
        again(oracle, images(3))


class Fickle(Service):
    """Answers one class, but every second image of the set `drawn` at random, by its pixels."""

    def __call__(self, images):
        rows = super().__call__(images)
        drawn = images[:, 0, 0, 0] > 0.5
        labels = (images.sum((1, 2, 3)) * 9999).astype(int) % self.labels
        rows[:] = np.eye(self.labels, dtype=np.float32)[np.where(drawn, labels, 0)]
        return rows


def test_labels_that_a_small_change_changes_are_discarded():
    service, shown = Fickle(), images(60)
    shown[:30, 0, :2, :2], shown[30:, 0, :2, :2] = 0.1, 0.9
    found = make("consistency_filter", repeats=4)(service, network(10))(shown)
    assert sum(map(len, service.asked)) == 240
    assert np.isfinite(found[:30]).all()
    assert np.isnan(found[30:]).any(1).mean() > 0.8


def test_what_is_withheld_is_discarded():
    rows = softmax(logits(10, n=20))
    rows[5:9] = 0.1
    found = make("answered")(Service(rows=rows), network(10))(images(20))
    assert np.flatnonzero(np.isnan(found).any(1)).tolist() == [5, 6, 7, 8]


def test_a_mask_needs_the_undefended_service():
    with pytest.raises(AttackError, match="oracle_mask needs the undefended service"):
        make("oracle_mask")(Service(), network(10))


@pytest.mark.parametrize("clean", ["http://192.0.2.1:8000", "https://example.com", "ftp://x", "?"])
def test_the_truth_is_asked_of_this_machine_alone(clean):
    """The consent that `scumble attack` checks was given for another address."""
    with pytest.raises(AttackError, match=r"must be a service on this machine|the URL"):
        make("oracle_mask", clean=clean)
    assert make("oracle_mask", clean="http://localhost:8000").clean == "http://localhost:8000"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "allowed without them: 0"),
        (["argmax", "average"], "allowed without them: 0"),
        (["invert", "average"], "average comes after them; allowed: before them"),
        (["invert", "margin_filter", "diluted"], "diluted comes after them"),
        (["invert"], None),
        (["diluted", "average", "modelguard", "argmax"], None),
        (["FILE.py:Mine", "average"], None),
    ],
)
def test_whether_answers_can_be_mapped_again_is_known_before_they_are_paid_for(names, message):
    if message is None:
        check_again(names)
    else:
        with pytest.raises(AttackError, match=message):
            check_again(names)


def test_what_is_known_before_is_what_happens():
    for kept in KEEP:
        for other in set(MODIFIERS) - {*KEEP, "recover", "oracle_mask", "diluted"}:
            chain = apply([kept, other], Service(budget=1000), network(10))
            chain(images(3))
            try:
                check_again([kept, other])
            except AttackError:
                with pytest.raises(AttackError, match="rounds needs answers"):
                    again(chain, images(3))
            else:
                again(chain, images(3))


def test_diluted_queries_are_a_share_of_all_and_only_they_are_answered():
    service = Service(budget=1000)
    benign = images(50, seed=9)
    hidden = DilutedOracle(service, benign, 0.1, seed=0)
    shown = images(30)
    assert hidden.remaining == 100
    np.testing.assert_allclose(hidden(shown), Service()(shown), rtol=1e-6)
    (sent,) = service.asked
    assert (len(sent), hidden.remaining) == (300, 70)
    own = {image.tobytes() for image in shown}
    places = [i for i, image in enumerate(sent) if image.tobytes() in own]
    assert len(places) == 30
    assert max(places) > 200  # among the others, not before them
    with pytest.raises(BudgetExhausted):
        hidden(images(71))
    assert len(service.asked) == 1


def test_a_diluted_attack_needs_what_honest_clients_send():
    with pytest.raises(AttackError, match="diluted needs what honest clients send"):
        make("diluted")(Service(), network(10))
    service = Service()
    made = make("diluted", benign="digits:test", share=0.5)(service, network(10))
    made(images(4))
    assert service.asked[0].shape == (8, 1, 4, 4)


def test_a_paced_attack_waits_between_its_bursts():
    class Clock:
        def __init__(self):
            self.now, self.waited = 0.0, []

        def __call__(self):
            return self.now

        def sleep(self, seconds):
            self.waited.append(round(seconds, 6))
            self.now += seconds

    clock, service = Clock(), Service()
    slow = PacedOracle(service, 10, 5, clock=clock, sleep=clock.sleep)
    shown = images(12)
    np.testing.assert_allclose(slow(shown), Service()(shown), rtol=1e-6)
    assert [len(part) for part in service.asked] == [5, 5, 2]
    assert clock.waited == [0.5, 0.5]
    clock.now += 100
    slow(shown[:1])
    assert clock.waited == [0.5, 0.5]


def test_modelguard_is_undone_where_it_hid_most():
    """The answers of the defense itself: confident rows come back, and labels are kept."""
    clean = softmax(2 * logits(10, n=400))
    clean = clean[clean.max(1) > 0.6]
    answers = defenses.make("modelguard_w", epsilon=1.0)(clean, None)
    found = make("modelguard")(Service(rows=answers), network(10))(images(len(clean)))
    assert np.median(l1(answers, clean)) > 0.9
    assert np.median(l1(found, clean)) < 0.3
    assert (found.argmax(1) == clean.argmax(1)).all()
