"""The circuit breaker, with a clock of the test's."""

from app.inference.upstream.circuit import CAP_S, FAILURES, FIRST_S, Circuit


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
