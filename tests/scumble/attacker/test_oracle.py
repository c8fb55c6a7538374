"""The oracle: exact counts, a budget that holds on every path, retry, resume."""

import json
import threading
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from scumble.attacker.adapt.consistency_filter import ConsistencyFilter
from scumble.attacker.adapt.paced import Paced
from scumble.attacker.attacks.knockoff import Knockoff
from scumble.attacker.errors import (
    BudgetExhausted,
    OracleRefused,
    OracleUnavailable,
    ResumeMismatch,
    ServiceSpent,
)
from scumble.attacker.oracle import HttpOracle
from scumble.attacker.pool import Pool
from scumble.attacker.students import Fitting
from scumble.attacker.transports import HEADER, TRANSPORTS, levels

ROOT = Path(__file__).parents[3]
MODEL = {
    "name": "m",
    "version": "1",
    "labels": ["a", "b"],
    "input": {"height": 2, "width": 2, "channels": 1},
    "limits": {
        "max_body_bytes": 100_000,
        "max_images": 4,
        "max_pixels": 100,
        "max_tensor_images": 8,
    },
}


class Service:
    """A stand-in for the service over `pixels`, with a plan of what to do with each request.

    Plan: "ok" answers, "busy" refuses for now, "spent" for want of budget, "unsent" refuses the
    connection, "lost" counts the images and loses the answer, "no" refuses for good, "nan" answers
    what is no number, "crash" ends the run. After the plan everything is "ok".
    """

    def __init__(self, plan=(), side=2):
        self.model = {**MODEL, "input": {"height": side, "width": side, "channels": 1}}
        self.plan = list(plan)
        self.served = 0
        self.sizes = []
        self.slept = []

    def __call__(self, request):
        if request.url.path == "/v1/model":
            return httpx2.Response(200, json=self.model)
        length = int(request.headers[HEADER])
        shape = json.loads(request.content[:length])["inputs"][0]["shape"]
        pixels = np.frombuffer(request.content[length:], np.uint8).reshape(shape)
        step = self.plan.pop(0) if self.plan else "ok"
        if step == "busy":
            return httpx2.Response(429, headers={"Retry-After": "3"})
        if step == "spent":
            headers = {"Retry-After": "86400"}
            return httpx2.Response(429, headers=headers, json={"detail": "no images are left"})
        if step == "no":
            return httpx2.Response(422, text="no")
        if step == "unsent":
            raise httpx2.ConnectError("refused")
        if step == "crash":
            raise KeyboardInterrupt
        self.served += len(pixels)
        self.sizes.append(len(pixels))
        if step == "lost":
            raise httpx2.ReadError("lost")
        first = pixels[:, 0, 0, :].astype(np.float32) / 255
        answer = np.concatenate([first, 1 - first], 1).astype("<f4")
        if step == "nan":
            answer[0, 1] = np.nan
        output = {"name": "probabilities", "shape": list(answer.shape)}
        head = json.dumps({"outputs": [output]}).encode()
        return httpx2.Response(
            200, content=head + answer.tobytes(), headers={HEADER: str(len(head))}
        )

    def oracle(self, budget=100, **options):
        client = httpx2.Client(transport=httpx2.MockTransport(self), base_url="http://victim")
        defaults = {"transport": "pixels", "connections": 1}
        return HttpOracle(
            "http://victim",
            budget=budget,
            client=client,
            sleep=self.slept.append,
            **{**defaults, **options},
        )


def images(n, start=0):
    values = (np.arange(start, start + n) % 256).astype(np.float32) / 255
    return np.broadcast_to(values[:, None, None, None], (n, 1, 2, 2)).copy()


@pytest.mark.parametrize("connections", [1, 4])
def test_answers_come_in_order_and_in_parts(connections):
    service = Service()
    with service.oracle(connections=connections) as oracle:
        answer = oracle(images(20))
    np.testing.assert_allclose(answer[:, 0], np.arange(20) / 255, atol=1e-6)
    assert sorted(service.sizes) == [4, 8, 8]
    assert (oracle.labels, oracle.shape) == (2, (1, 2, 2))
    assert oracle.ledger.answered == service.served == 20


def test_repeats_count():
    service = Service()
    with service.oracle(budget=9) as oracle:
        for _ in range(3):
            oracle(images(3))
        assert oracle.remaining == 0
    assert service.served == 9


def test_more_than_the_budget_is_not_sent():
    service = Service()
    with service.oracle(budget=5) as oracle:
        oracle(images(3))
        with pytest.raises(BudgetExhausted, match="3 images asked for; 2 of 5 are left"):
            oracle(images(3))
    assert service.served == 3


def test_a_busy_service_is_waited_for_and_costs_nothing():
    service = Service(["busy", "unsent", "busy"])
    with service.oracle() as oracle:
        oracle(images(3))
    assert oracle.ledger.answered == service.served == 3
    assert oracle.ledger.refused == 2
    assert service.slept[0] == service.slept[2] == 3


def test_a_lost_answer_counts_and_is_asked_again():
    service = Service(["lost"])
    with service.oracle() as oracle:
        answer = oracle(images(3))
    assert answer.shape == (3, 2)
    assert (oracle.ledger.answered, oracle.ledger.lost) == (3, 3)
    assert service.served == oracle.ledger.spent == 6


def test_a_refusal_for_good_is_an_error():
    with Service(["no"]).oracle() as oracle, pytest.raises(OracleRefused, match="422"):
        oracle(images(1))


def test_an_answer_that_is_no_number_counts_and_is_an_error():
    service = Service(["nan"])
    with service.oracle() as oracle:
        with pytest.raises(OracleRefused, match="a probability is not a finite number"):
            oracle(images(3))
        assert (oracle.ledger.answered, oracle.ledger.lost) == (0, 3)
    assert oracle.ledger.spent == service.served


def test_a_budget_of_the_service_that_is_spent_ends_it_at_once_and_says_so():
    service = Service(["ok", "spent"])
    with service.oracle() as oracle:
        oracle(images(3))
        with pytest.raises(OracleUnavailable, match="gives no more: 429 no images are left"):
            oracle(images(3))
    assert service.slept == []
    assert oracle.ledger.spent == service.served == 3


def test_what_the_service_gave_before_its_budget_was_spent_is_kept():
    service = Service(["ok", "ok", "spent"])
    with service.oracle(partial=True, batch=2) as oracle:
        answers = oracle(images(6))
        assert np.isfinite(answers).all(1).tolist() == [True] * 4 + [False] * 2
        assert (oracle.remaining, oracle.budget) == (0, 100)
        assert (
            oracle.ended == "http://victim/v2/models/m/infer gives no more: 429 no images are left"
        )
        with pytest.raises(BudgetExhausted):
            oracle(images(1))
    assert service.slept == []
    assert oracle.ledger.answered == oracle.ledger.spent == service.served == 4


def test_a_service_that_never_gave_anything_is_an_error():
    with (
        Service(["spent"]).oracle(partial=True) as oracle,
        pytest.raises(ServiceSpent, match="no images are left"),
    ):
        oracle(images(3))


def test_an_account_whose_budget_is_spent_loses_its_turn():
    service, seen, left = Service(), [], {"one": 1, "two": 2, "three": 3}

    def limited(request):
        key = request.headers["Authorization"].removeprefix("Bearer ")
        seen.append(key)
        left[key] -= request.url.path != "/v1/model"
        service.plan = ["ok" if left[key] >= 0 else "spent"]
        return service(request)

    client = httpx2.Client(transport=httpx2.MockTransport(limited), base_url="http://victim")
    with HttpOracle(
        "http://victim",
        budget=40,
        transport="pixels",
        client=client,
        keys=list(left),
        batch=1,
        connections=1,
        partial=True,
    ) as oracle:
        answers = oracle(images(8))
    assert np.isfinite(answers).all(1).tolist() == [True] * 6 + [False] * 2
    assert seen.count("one") == 3  # the model, an answer and a refusal
    assert oracle.ledger.refused == 3


def test_a_refusal_beside_other_requests_is_not_believed():
    """A budget of answers is charged with all images, and gets back those that are withheld."""
    held, total, lock = 0, 12, threading.Lock()
    service, together = Service(), threading.Barrier(2, timeout=10)
    first = iter([True, True])

    def charging(request):
        nonlocal held
        if request.url.path == "/v1/model":
            return service(request)
        with lock:
            charged = held + 8 <= total
            held += 8 * charged
            wait = next(first, False)
        if wait:  # both are on their way before either is answered
            together.wait()
        if not charged:
            return httpx2.Response(429, headers={"Retry-After": "86400"}, json={"detail": "later"})
        try:
            return service(request)
        finally:
            with lock:
                held -= 8

    client = httpx2.Client(transport=httpx2.MockTransport(charging), base_url="http://victim")
    with HttpOracle(
        "http://victim", budget=100, transport="pixels", client=client, batch=8, connections=2,
        partial=True,
    ) as oracle:  # fmt: skip
        answers = oracle(images(64))
    assert np.isfinite(answers).all()
    assert oracle.ended is None
    assert oracle.ledger.refused >= 1


@pytest.mark.parametrize("modifier", [Paced(rate=1e6, burst=4), ConsistencyFilter(repeats=2)])
def test_modifiers_give_what_was_answered_before_the_end(modifier):
    service = Service(["ok", "ok", "spent"])
    with service.oracle(partial=True, batch=4) as oracle:
        answers = modifier(oracle, None)(images(12))
    assert np.isfinite(answers).all(1).sum() == 8 // getattr(modifier, "repeats", 1)


def test_a_copy_is_made_where_the_first_images_are_refused():
    """Other requests came first; a point of the curve has no answers."""
    pool = Pool("own", images(120), np.zeros(120, np.int64), 1)
    student, seen = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), []
    attack = Knockoff(curve=(0.1, 0.5), fitting=Fitting(epochs=1, batch=16))
    with Service().oracle(120) as oracle:
        attack(Refusing(oracle, 30), student, pool, lambda n, _: seen.append(n))
    assert seen == [60, 120]


class Refusing:
    """An oracle whose first rows are NaN, as where other requests came first."""

    def __init__(self, inner, rows):
        self.labels, self.shape, self.step = inner.labels, inner.shape, inner.step
        self._inner, self._rows = inner, rows

    @property
    def remaining(self):
        return self._inner.remaining

    def __call__(self, asked):
        answers = self._inner(asked)
        answers[: self._rows] = np.nan
        return answers


def test_without_a_key_the_oracle_says_what_the_service_says():
    def closed(request):
        return httpx2.Response(401, json={"detail": "an API key is needed"})

    client = httpx2.Client(transport=httpx2.MockTransport(closed), base_url="http://victim")
    with pytest.raises(OracleRefused, match="answered 401 an API key is needed"):
        HttpOracle("http://victim", budget=1, client=client)


def test_after_a_refusal_other_images_can_be_asked():
    service = Service(["ok", "no"])
    with service.oracle() as oracle:
        with pytest.raises(OracleRefused):
            oracle(images(24))
        assert oracle(images(3, 7)).shape == (3, 2)
    assert oracle.ledger.spent == service.served


def test_nobody_there():
    def refuse(request):
        raise httpx2.ConnectError("refused")

    client = httpx2.Client(transport=httpx2.MockTransport(refuse), base_url="http://victim")
    with pytest.raises(OracleUnavailable, match="no answer from http://victim"):
        HttpOracle("http://victim", budget=1, client=client, sleep=lambda s: None, retries=2)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    plan=st.lists(st.sampled_from(["ok", "busy", "unsent", "lost"]), max_size=30),
    calls=st.lists(st.integers(0, 20), max_size=8),
    budget=st.integers(0, 60),
    connections=st.sampled_from([1, 3]),
)
def test_no_path_exceeds_the_budget(plan, calls, budget, connections):
    service = Service(plan)
    oracle = service.oracle(budget=budget, connections=connections, retries=2)
    with oracle:
        for n in calls:
            try:
                oracle(images(n))
            except (BudgetExhausted, OracleUnavailable):
                break
    assert service.served <= budget
    assert service.served <= oracle.ledger.spent


def test_resume_asks_only_what_is_missing_and_gives_the_same(tmp_path):
    journal = tmp_path / "journal.sqlite"
    service = Service()
    with service.oracle() as whole:
        expected = [whole(images(10)), whole(images(10, 50))]
    service = Service(["ok", "ok", "ok", "no"])
    with service.oracle(journal=journal) as oracle:
        first = oracle(images(10))
        with pytest.raises(OracleRefused):
            oracle(images(10, 50))
    with service.oracle(journal=journal) as oracle:
        np.testing.assert_array_equal(oracle(images(10)), first)
        assert oracle.ledger.replayed == 10
        again = oracle(images(10, 50))
    np.testing.assert_array_equal(first, expected[0])
    np.testing.assert_array_equal(again, expected[1])
    assert service.served == oracle.ledger.spent == 20


@pytest.mark.parametrize("crashes", [1, 3])
def test_what_was_on_its_way_at_a_crash_counts_as_lost(crashes, tmp_path):
    journal = tmp_path / "journal.sqlite"
    for _ in range(crashes):
        with Service(["crash"]).oracle(journal=journal) as oracle, pytest.raises(KeyboardInterrupt):
            oracle(images(8))
    service = Service()
    with service.oracle(journal=journal) as oracle:
        answer = oracle(images(8))
    np.testing.assert_allclose(answer[:, 0], np.arange(8) / 255, atol=1e-6)
    assert (service.served, oracle.ledger.spent) == (8, 8 + 8 * crashes)


def test_losses_of_the_run_before_count_against_the_budget(tmp_path):
    journal = tmp_path / "journal.sqlite"
    crashing = Service(["crash"]).oracle(budget=9, journal=journal)
    with crashing as oracle, pytest.raises(KeyboardInterrupt):
        oracle(images(8))
    service = Service()
    with service.oracle(budget=9, journal=journal) as oracle:
        with pytest.raises(BudgetExhausted, match="1 are left"):
            oracle(images(8))
        assert (service.served, oracle.remaining) == (0, 1)


def test_a_journal_of_another_run_is_refused(tmp_path):
    journal = tmp_path / "journal.sqlite"
    service = Service()
    with service.oracle(journal=journal) as oracle:
        oracle(images(4))
    with service.oracle(journal=journal) as oracle, pytest.raises(ResumeMismatch):
        oracle(images(4, 7))


def test_levels_round_to_the_nearest():
    values = np.array([-1, 0, 0.4 / 255, 0.6 / 255, 1, 2], np.float32).reshape(6, 1, 1, 1)
    assert levels(values).ravel().tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("name", TRANSPORTS)
def test_every_transport_asks_the_real_service(name, serve):
    server = serve(workers=2, defense="dcp", defense_params={"beta": 1.2})
    pictures = np.random.default_rng(0).random((70, 3, 8, 8)).astype(np.float32)
    with HttpOracle(server.url, budget=200, transport="pixels") as oracle:
        expected = oracle(np.rint(pictures * 255) / np.float32(255))
    with HttpOracle(server.url, budget=200, transport=name) as oracle:
        found = oracle(np.rint(pictures * 255) / np.float32(255))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    counted = server.metrics()['scumble_images_total{model="tiny",precision="float32"}']
    assert counted == 140
    assert oracle.ledger.spent == oracle.ledger.answered == 70


def test_a_server_that_refuses_for_now_counts_the_same(serve):
    """300 images through a queue of 60: many are sent back and come again."""
    server = serve(model_dir=ROOT / "models", model="cifar10", workers=1, limits__max_queue=60)
    options = {"transport": "pixels", "batch": 50, "connections": 8, "retries": 1000}
    with HttpOracle(server.url, budget=300, **options, sleep=lambda _: time.sleep(0.02)) as oracle:
        answers = oracle(np.random.default_rng(0).random((300, 3, 32, 32), np.float32))
    assert answers.shape == (300, 10)
    assert oracle.ledger.refused > 0
    counted = server.metrics()['scumble_images_total{model="cifar10",precision="float32"}']
    assert counted == oracle.ledger.spent == 300


def test_accounts_take_turns():
    """Each request goes out under the next key; the first one asks about the model."""
    service, seen = Service(), []

    def noting(request):
        seen.append(request.headers["Authorization"])
        return service(request)

    client = httpx2.Client(transport=httpx2.MockTransport(noting), base_url="http://victim")
    keys = ["one", "two", "three"]
    with HttpOracle(
        "http://victim",
        budget=40,
        transport="pixels",
        client=client,
        keys=keys,
        batch=8,
        connections=1,
    ) as oracle:
        oracle(np.zeros((40, 1, 2, 2), np.float32))
    order = ["one", "one", "two", "three", "one", "two"]
    assert seen == [f"Bearer {key}" for key in order]
