"""Defenses of keys are warm before their keys count."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from app.access.keys import KeyFile
from app.access.policies import Policies
from app.errors import ConfigError
from scumble.defenses import Defense
from scumble.defenses.none import NoDefense
from tests.app.access.test_admission import row

PIXELS = np.zeros((2, 8, 8, 3), np.uint8)
TENSORS = np.zeros((2, 3, 8, 8), np.float32)
ROWS = np.full((2, 4), 0.25, np.float32)


@dataclass(frozen=True, kw_only=True)
class Recorded(Defense):
    """Remembers its batches, and takes seconds for each on a clock of its own."""

    seconds: list[float] = field(default_factory=list)
    batches: list[tuple[str, int]] = field(default_factory=list)
    now: list[float] = field(default_factory=lambda: [0.0])

    def __call__(self, probs, inputs):
        assert len(probs) == len(inputs)
        self.batches.append((inputs.dtype.name, len(inputs)))
        self.now[0] += self.seconds.pop(0) if self.seconds else 0.0
        return probs


def policies(defense, server=None, **options) -> Policies:
    return Policies(
        lambda name, params: defense,
        server=("none", {}),
        default=server or NoDefense(),
        sizes=(1, 2, 4),
        **options,
    )


KEYED = KeyFile(keys=(row("a", defense="round"), row("b", defense="round")))


def test_a_defense_answers_examples_before_its_key_counts():
    defense, server = Recorded(), Recorded()
    made = policies(defense, server)
    made.warm_up(PIXELS, ROWS)
    grants = made(KEYED)
    assert defense.batches == [("uint8", 1), ("uint8", 2), ("uint8", 4)]
    assert all(grant.defense is defense for grant in grants.values())
    made(KEYED)  # one that is there already is warm
    assert len(defense.batches) == 3
    assert server.batches == []  # its engine's own warm-up has it


def test_once_tensors_are_served_all_defenses_answer_those_too():
    defense = Recorded()
    made = policies(defense)
    made.warm_up(PIXELS, ROWS)
    made(KEYED)
    del defense.batches[:]
    made.warm_up(TENSORS, ROWS)
    assert defense.batches == [("float32", 1), ("float32", 2), ("float32", 4)]
    made(KeyFile())
    made(KEYED)
    assert len(defense.batches) == 3 + 6


@pytest.mark.parametrize(
    ("seconds", "refused"),
    [
        ([], None),
        ([60.0, 1.0, 1.0, 1.0], None),  # it loads something at first
        ([1.0, 60.0, 1.0, 60.0, 1.0], None),
        (
            [1.0, 60.0, 50.0],
            r"takes 50 s for 2 image\(s\), and the engine 0 s; allowed: 7.5 s together, 1/4 of S",
        ),
    ],
)
def test_a_defense_that_takes_longer_than_a_batch_may_is_refused(seconds, refused):
    defense = Recorded(seconds=seconds)
    made = policies(defense, limit_s=7.5, clock=lambda: defense.now[0])
    made.warm_up(PIXELS, ROWS)
    if refused is None:
        assert len(made(KEYED)) == 2
    else:
        with pytest.raises(ConfigError, match=f"key 'id-a': defense 'round': {refused}"):
            made(KEYED)


@pytest.mark.parametrize(("engine_s", "refused"), [(6.0, False), (7.0, True)])
def test_the_time_of_the_engine_counts_beside_that_of_a_defense(engine_s, refused):
    defense = Recorded(seconds=[1.0] * 9)
    made = policies(defense, limit_s=7.5, clock=lambda: defense.now[0])
    made.warm_up(PIXELS, ROWS, engine_s)
    if refused:
        with pytest.raises(ConfigError, match=r"takes 1 s for 1 image\(s\), and the engine 7 s"):
            made(KEYED)
    else:
        assert len(made(KEYED)) == 2


def test_a_defense_that_fails_on_an_example_is_refused_and_the_old_ones_stay():
    class Broken(NoDefense):
        def __call__(self, probs, inputs):
            raise ZeroDivisionError("of mine")

    made = policies(Broken())
    made.warm_up(PIXELS, ROWS)
    with pytest.raises(ConfigError, match=r"key 'id-a'.*fails on 1 image\(s\): ZeroDivisionError"):
        made(KEYED)
