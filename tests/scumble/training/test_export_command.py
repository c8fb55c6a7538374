"""A bundle's network with its defense inside: for devices that run the file without the server."""

import hashlib
import subprocess
import sys

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from app.inference import engines
from app.inference.bundle import golden_inputs, open_bundle
from app.inference.defense_artifacts import DefenseArtifacts
from app.settings import default_model_dir
from scumble.defenses import make
from scumble.training.export_command import export

MODELS = default_model_dir()
CASES = [
    ("mnist", "dcp", {"beta": 1.2, "gamma": 0.2}),
    ("mnist", "reverse_sigmoid", {"beta": 0.64}),
    ("cifar10", "dcp", {"beta": 1.0}),
    ("gtsrb", "label", {}),
    ("gtsrb", "codebook", {"form": "calibrated", "cells": 8}),
]
ROUNDED = '--param=steps=[["dcp", {"beta": 1}], ["round", {"decimals": 1}]]'


def run(*words):
    return CliRunner().invoke(export, [*words, "--models", str(MODELS)], prog_name="export")


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize(("name", "defense", "params"), CASES)
def test_the_file_answers_as_the_service_does(name, defense, params, precision, engine, tmp_path):
    words = [f"--param={key}={value}" for key, value in params.items()]
    out = tmp_path / "defended.onnx"
    done = run(name, "--defense", defense, *words, "--precision", precision, "--out", str(out))
    assert done.exit_code == 0, done.output
    bundle = open_bundle(MODELS, name)
    images = golden_inputs(bundle.card.input)
    load = lambda model: engines.load(engine, model, threads=1, precision=precision)  # noqa: E731  # one argument of three
    artifacts = DefenseArtifacts(bundle, precision=precision)
    defend = make(defense, bundle=artifacts, **params)
    expected = defend(load(bundle.onnx(precision))(images), images)
    found = load(out.read_bytes())(images)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_file_says_what_it_is(tmp_path):
    out = tmp_path / "mnist.onnx"
    done = run("mnist", "--defense", "dcp", "--param", "beta=1.2", "--out", str(out))
    content = out.read_bytes()
    assert hashlib.sha256(content).hexdigest() in done.output
    model = onnx.load_model_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    source = open_bundle(MODELS, "mnist")
    said = {prop.key: prop.value for prop in model.metadata_props}
    assert {key: said[key] for key in said if key.startswith("scumble.")} == {
        "scumble.model": "mnist 1 float32",
        "scumble.source_sha256": source.card.files["float32.onnx"],
        "scumble.defense": "DCP(beta=1.2, gamma=0.2, nu=1000.0, mode='reference')",
    }
    assert [o.name for o in model.graph.output] == ["probabilities"]


def test_its_name_says_what_is_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("mnist", "--defense", "label", "--precision", "int8")
    assert done.exit_code == 0, done.output
    assert [p.name for p in tmp_path.iterdir()] == ["mnist-int8-label.onnx"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mnist", "--defense", "mad", "--param", "epsilon=1"], "Allowed: none, dcp, reverse_sig"),
        (["mnist", "--defense=chain", ROUNDED], "cannot be part of the graph"),
        (["mnist", "--defense", "dcp", "--param", "beta=99"], "a number from 0 to 10, got 99"),
        (["mnist", "--defense", "dcp", "--param", "beta=x"], "a number from 0 to 10, got 'x'"),
        (
            ["mnist", "--defense", "dcp", "--param", "beta=1", "--param", "beta=1.2"],
            "parameter beta is given twice; allowed: once",
        ),
        (["mnist", "--defense", "dcp", "--param", "beta"], "allowed: KEY=VALUE such as beta=1.2"),
        (["mnist", "--defense", "dcp"], "needs the parameter 'beta'"),
        (["mnist", "--defense", "nope"], "unknown defense 'nope'"),
        (["nope", "--defense", "label"], "no model 'nope'"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_said(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*words)
    assert done.exit_code == 1
    assert message in done.output
    assert not list(tmp_path.iterdir())


def test_it_needs_no_torch(tmp_path):
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'pyarrow', 'onnxscript']))\n"
        "from scumble.cli import main\n"
        f"main(['export', 'mnist', '--models', {str(MODELS)!r}, '--defense', 'label'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mnist-float32-label.onnx").exists()
