"""The circuit breaker, with a clock of the test's."""

import asyncio
import time

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from app.errors import TooLate, Unavailable
from app.inference.upstream.circuit import CAP_S, FAILURES, FIRST_S, Circuit
from app.inference.upstream.client import UpstreamClient
from app.inference.upstream.network_interface import OtherNetwork
from app.inference.upstream.v2_messages import write_request
from app.telemetry.metrics import Metrics
from tests.app.inference.upstream.fake import running


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def opened():
    clock = Clock()
    circuit = Circuit(clock=clock)
    for _ in range(FAILURES):
        assert circuit.closed
        circuit.failed()
    assert not circuit.closed
    return circuit, clock


def test_failures_in_a_row_open_it_and_an_answer_between_them_does_not():
    circuit = Circuit(clock=Clock())
    for _ in range(5):
        for _ in range(FAILURES - 1):
            circuit.failed()
        circuit.succeeded()
    assert circuit.closed
    opened()


def test_a_check_is_due_after_a_pause_that_doubles_up_to_a_second():
    circuit, clock = opened()
    pauses = []
    for _ in range(8):
        start = clock.now
        while not circuit.check_due:
            clock.now += 0.05
        pauses.append(clock.now - start)
        circuit.failed()
    assert pauses[0] <= FIRST_S + 0.06
    assert pauses == sorted(pauses)
    assert pauses[-1] <= CAP_S + 0.06  # recovery within two seconds


def test_failures_of_requests_in_flight_do_not_put_off_the_check():
    circuit, clock = opened()
    for _ in range(10):
        circuit.failed()
    clock.now += FIRST_S
    assert circuit.check_due


def test_a_late_answer_does_not_close_it_and_a_check_does():
    circuit, clock = opened()
    circuit.succeeded()
    assert not circuit.closed
    circuit.close()
    assert circuit.closed
    assert not circuit.check_due
    for _ in range(FAILURES):
        circuit.failed()
    clock.now += FIRST_S
    assert circuit.check_due  # the pauses begin again


def test_it_can_be_opened_at_once():
    circuit = Circuit(clock=Clock())
    circuit.open()
    assert not circuit.closed


@pytest.mark.anyio
@pytest.mark.parametrize("own", [True, False])
async def test_odd_answers_to_tensors_of_a_client_open_no_circuit(own):
    """`own`: the tensors are the client's, passed through, and not those of the service."""

    def odd(answer):
        raise OtherNetwork("another shape")

    with running() as fake:
        client = UpstreamClient([fake.url], Metrics(CollectorRegistry()))
        (replica,) = client.replicas
        replica.verified = True
        await client.open()
        try:
            images = np.zeros((1, 3, 8, 8), np.float32)
            body, headers = write_request({"x": ("FP32", images)}, ["y"])
            for _ in range(FAILURES):
                with pytest.raises(Unavailable):
                    await client.ask("/infer", body, headers, odd, refusals=own)
        finally:
            await client.close()
    assert replica.usable == own


@pytest.mark.anyio
async def test_an_answer_over_a_new_connection_waits_for_the_check_until_the_deadline():
    check = asyncio.create_task(asyncio.Event().wait())
    with running() as fake:
        client = UpstreamClient([fake.url], Metrics(CollectorRegistry()))
        (replica,) = client.replicas
        replica.verified, replica.recheck = True, lambda _: check
        await client.open()
        try:
            images = np.zeros((1, 3, 8, 8), np.float32)
            body, headers = write_request({"x": ("FP32", images)}, ["y"])
            until = time.perf_counter() + 2
            async with asyncio.timeout(20):
                with pytest.raises(TooLate):
                    await client.ask("/infer", body, headers, lambda answer: answer, until=until)
        finally:
            check.cancel()
            await client.close()
    assert replica.usable
    assert len(fake.requests) == 1
