"""Recipes: committed settings of strong copies."""

from dataclasses import replace

import pytest

from scumble.attacker import students
from scumble.attacker.attacks.knockoff import cpu
from scumble.attacker.errors import AttackError
from scumble.attacker.recipes import recipe, recipes
from scumble.attacker.run import Job, configure, student_of
from scumble.training.auxiliary import TRANSFER

JOB = Job("http://localhost", "knockoff", 10, test="x")


def test_there_is_one_for_each_victim_and_kind_of_answer():
    assert set(recipes()) == {
        f"{v}-{kind}" for v in TRANSFER for kind in ("soft", "labels", "mixed")
    }


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_decides_fit_and_student(name):
    attack, _ = configure(replace(JOB, recipe=name))
    for field, value in recipe(name).fit.items():
        assert getattr(attack.fitting, field) == value
    assert recipe(name).student in students.STUDENTS
    assert student_of(replace(JOB, recipe=name)) == recipe(name).student
    assert student_of(replace(JOB, recipe=name, student="mobile")) == "mobile"


def test_settings_on_the_command_line_come_after_the_recipe():
    attack, _ = configure(replace(JOB, recipe="mnist-labels", changes=("fit.epochs=3",)))
    assert attack.fitting.epochs == 3
    assert attack.fitting.loss == recipe("mnist-labels").fit["loss"] != cpu(0).fitting.loss


def test_settings_that_need_each_other_are_taken_in_any_order():
    for changes in (("fit.smoothing=0.1", "fit.loss=ce"), ("fit.loss=ce", "fit.smoothing=0.1")):
        attack, _ = configure(replace(JOB, changes=changes))
        assert (attack.fitting.loss, attack.fitting.smoothing) == ("ce", 0.1)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (replace(JOB, recipe="mnist"), "recipe is 'mnist'; allowed: mnist-soft, mnist-labels"),
        (replace(JOB, recipe="mnist-soft", attack="dfme"), "leave out --recipe"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(job, message):
    with pytest.raises(AttackError, match=message):
        configure(job)
