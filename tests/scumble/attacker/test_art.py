"""ART's attacks against an oracle; the same lines as in docs/reference/attacks.md."""

import numpy as np
import pytest
import torch

from scumble.attacker import art, attacks, students
from tests.scumble.attacker.stand_ins import FunctionOracle, linear_victim, noise_pool

extraction = pytest.importorskip(
    "art.attacks.extraction", reason="ART is not installed: adversarial-robustness-toolbox"
)
PyTorchClassifier = pytest.importorskip("art.estimators.classification").PyTorchClassifier


@pytest.mark.parametrize("name", ["KnockoffNets", "CopycatCNN"])
def test_an_attack_of_art_trains_a_copy_within_the_budget(name):
    oracle = FunctionOracle(linear_victim(), 300)
    student = students.make("small_cnn", oracle.shape, oracle.labels, seed=0)
    before = [weight.clone() for weight in student.parameters()]
    attack = getattr(extraction, name)(
        art.black_box(oracle), batch_size_fit=32, batch_size_query=64, nb_epochs=2, nb_stolen=300
    )
    attack.extract(noise_pool().images, thieved_classifier=art.copy(student, oracle))
    assert 0 < oracle.asked <= 300
    assert any(
        not torch.equal(old, new) for old, new in zip(before, student.parameters(), strict=True)
    )
    assert np.isfinite(students.predict(student, noise_pool(5).images)).all()


@pytest.mark.parametrize(("name", "soft"), [("ArtKnockoffNets", True), ("ArtCopycatCNN", False)])
def test_knockoff_learns_probabilities_and_copycat_labels(name, soft, monkeypatch):
    learned = []
    fit = PyTorchClassifier.fit

    def watched(self, x, y, **more):
        learned.append(y)
        return fit(self, x, y, **more)

    monkeypatch.setattr(PyTorchClassifier, "fit", watched)
    oracle = FunctionOracle(linear_victim(), 200)
    student = students.make("small_cnn", oracle.shape, oracle.labels, seed=0)
    attack = attacks.make(f"docs/examples/art_attacks.py:{name}", seed=1)
    attack(oracle, student, noise_pool(300), lambda *_: None)
    (answers,) = learned
    assert bool(((answers > 0.01) & (answers < 0.99)).any()) is soft


@pytest.mark.parametrize("name", ["ArtKnockoffNets", "ArtCopycatCNN"])
def test_the_example_makes_attacks_of_them(name):
    attack = attacks.make(f"docs/examples/art_attacks.py:{name}", seed=1)
    oracle, pool = FunctionOracle(linear_victim(), 200), noise_pool(300)
    student = students.make("small_cnn", oracle.shape, oracle.labels, seed=0)
    seen = []
    attack(oracle, student, pool, lambda queries, copy: seen.append((queries, copy.training)))
    assert oracle.asked == 200
    assert seen == [(200, False)]
