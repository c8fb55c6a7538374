"""Auxiliary models: what they learn, what is written, and that the weights come back."""

import shlex

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from app.inference.bundle import AUXILIARY_FILES, Bundle, InputShape, golden_inputs
from app.inference.defense_artifacts import DefenseArtifacts
from scumble.data.digits import digits
from scumble.defenses import make
from scumble.evaluation.published_defenses import grad2_reference, grad2_scores, mad_reference
from scumble.training.auxiliary import auxiliary, surrogate_of, untruth
from scumble.training.bundle_export import export_bundle

pytestmark = pytest.mark.torch

SHAPE = InputShape(height=28, width=28, channels=1)
CARD = {"name": "own", "version": "1", "labels": [str(k) for k in range(10)]}
WORDS = "own --transfer digits --train digits --test digits --images 600 --epochs 18 --seed 1"


def victim():
    """A linear reader of scikit-learn's digits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))
    data, _ = digits().split(0.5, seed=0)
    x = torch.from_numpy(data.images.transpose(0, 3, 1, 2) / np.float32(255))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        loss = nn.functional.cross_entropy(net(x), torch.from_numpy(data.labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model folder with the bundle `own` after `python -m scumble.training.auxiliary own`."""
    folder = tmp_path_factory.mktemp("models")
    export_bundle(victim(), folder / "own", SHAPE, CARD)
    done = CliRunner().invoke(auxiliary, [*WORDS.split(), "--models", str(folder)])
    assert done.exit_code == 0, done.output
    assert "the surrogate agrees with the victim on" in done.output
    return folder


@pytest.fixture
def bundle(models):
    return Bundle(models / "own")


def test_both_models_learn_and_the_card_says_so(bundle, models):
    made = bundle.card.auxiliary
    expected = f"python -m scumble.training.auxiliary {WORDS} --models {models}"
    assert shlex.split(made["command"]) == shlex.split(expected)
    surrogate, liar = made["surrogate"], made["misinformation"]
    assert surrogate["agreement"] > 0.5
    assert liar["test"] < 0.01
    for part, file in zip((surrogate, liar), AUXILIARY_FILES, strict=True):
        assert part["bytes"] == len(bundle.read(file)) < 350_000
        assert part["images"] == 600
        assert part["recipe"]["epochs"] == 18
        assert part["recipe"]["seed"] == 1
        assert "sha256" in part["data"]
    assert bundle.card.labels == CARD["labels"]
    bundle.golden()


def test_the_weights_come_back_and_give_the_files_answers(bundle):
    net = surrogate_of(bundle)
    pixels = golden_inputs(SHAPE)
    x = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float() / 255
    networks = DefenseArtifacts(bundle)
    probs = networks.auxiliary("surrogate.onnx", "probabilities")(pixels)
    np.testing.assert_allclose(probs, net(x).softmax(1).detach(), atol=1e-5)
    scores = networks.auxiliary("surrogate.onnx", "scores")(pixels)
    expected = grad2_scores(net, x).numpy()
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-3 * abs(expected).max())


@pytest.mark.parametrize(
    ("name", "reference"), [("mad", mad_reference), ("grad2", grad2_reference)]
)
def test_served_defense_equals_the_published_form(bundle, name, reference):
    test, _ = digits().split(0.9, seed=1)
    pixels = test.images[:40]
    x = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float() / 255
    p = np.random.default_rng(0).dirichlet(np.ones(10), len(x)).astype(np.float32)
    y = make(name, epsilon=0.8, bundle=DefenseArtifacts(bundle))(p, pixels)
    expected = reference(surrogate_of(bundle), x, torch.from_numpy(p), 0.8).detach().numpy()
    # Two of its classes may be equal up to float32, and then either is right.
    same = abs(y - expected).max(1) < 1e-4
    assert same.mean() >= 0.95


def test_no_trace_of_this_machine_in_the_files(bundle):
    for file in AUXILIARY_FILES:
        model = onnx.load_model_from_string(bundle.read(file))
        assert not any(n.metadata_props or n.doc_string for n in model.graph.node)
        assert not any(i.external_data for i in model.graph.initializer)


def test_a_new_network_removes_the_auxiliary_models_of_the_old(tmp_path):
    (tmp_path / "own").mkdir()
    for file in AUXILIARY_FILES:
        (tmp_path / "own" / file).write_bytes(b"of another network")
    card = export_bundle(victim(), tmp_path / "own", SHAPE, CARD)
    assert not {*AUXILIARY_FILES} & {*card.files}


def test_untruth_is_least_where_the_truth_is_least_likely():
    logits = torch.tensor([[0.0, 0.0], [3.0, -3.0], [-9.0, 9.0], [99.0, -99.0]])
    losses = torch.stack([untruth(row[None], torch.tensor([0])) for row in logits])
    expected = [np.log(2), np.log1p(np.exp(6)), 0.0, -np.log(1e-12)]
    np.testing.assert_allclose(losses, expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("none --transfer digits", "no model 'none'"),
        ("own", "give --transfer; only mnist, cifar10, gtsrb"),
        ("own --transfer nothing --train digits --test digits", "no data set 'nothing'"),
        ("own --transfer digits", "no image set is known that 'own' was trained on"),
    ],
)
def test_one_line_for_a_mistake(models, words, message):
    done = CliRunner().invoke(auxiliary, [*words.split(), "--models", str(models)])
    assert done.exit_code in (1, 2)
    assert message in done.output
