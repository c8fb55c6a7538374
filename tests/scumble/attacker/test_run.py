"""`scumble attack` from the command line to result.json, against real servers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scumble.attacker import students
from scumble.attacker.attacks import DATA_FREE
from scumble.attacker.attacks.dfme import Dfme
from scumble.attacker.attacks.knockoff import Knockoff
from scumble.attacker.errors import AttackError, BadResult, ResumeMismatch
from scumble.attacker.pool import pool
from scumble.attacker.result import Result, read
from scumble.attacker.run import Job, claim, configure, data
from scumble.attacker.settings import parse
from scumble.attacker.settings import replace as change
from scumble.cli import main
from scumble.data.image_sets import Dataset, load, numbered_as
from scumble.evaluation.steal import CELLS
from tests.tiny import LABELS

ROOT = Path(__file__).parents[3]
STEAL = ROOT / "docs" / "results" / "records" / "steal"

# attack -> options that make it short; 8 x 8 pixels in colour, 4 classes
SHORT = {
    "knockoff": ["--budget", "90", "--set", "fit.epochs=2", "--set", "attack.curve=[0.5]"],
    "knockoff, adaptive": [
        *["--budget", "90", "--set", "fit.epochs=2", "--set", "attack.strategy=adaptive"],
        *["--set", "attack.ask=16"],
    ],
    "dfme": ["--budget", "100", "--set", "attack.batch=4", "--set", "attack.width=8"],
    "maze": ["--budget", "100", "--set", "attack.batch=4", "--set", "attack.width=8"],
    "jbda": ["--budget", "90", "--set", "fit.epochs=2", "--set", "attack.seeds=20"],
    "copycat": ["--budget", "90", "--set", "fit.epochs=2"],
    "mask_seeking": ["--budget", "90", "--set", "fit.epochs=2", "--set", "attack.ask=16"],
    "coverage": ["--budget", "90", "--set", "fit.epochs=2", "--set", "attack.ask=16"],
    "fixmatch": ["--budget", "90", "--set", "fit.epochs=2"],
    "ideal": ["--budget", "100", "--set", "attack.batch=16", "--set", "attack.width=8"],
    "disguide": ["--budget", "100", "--set", "attack.batch=16", "--set", "attack.width=8"],
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A data set of 120 noisy pictures in four class folders."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for kind in ("red", "green", "blue", "grey"):
        (root / kind).mkdir()
        for i in range(30):
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(root / kind / f"{i}.png")
    return root


def attack(url, folder, out, name="knockoff", *options):
    words = ["attack", url, "--attack", name.partition(",")[0], "--test", str(folder)]
    words += ["--student", "small_cnn", "--out", str(out), "--no-progress", *SHORT[name]]
    if name not in DATA_FREE:
        words += ["--queries", str(folder)]
    return CliRunner().invoke(main, [*words, *options])


@pytest.mark.server
@pytest.mark.parametrize("name", SHORT)
def test_every_attack_runs_end_to_end(name, serve, folder, tmp_path):
    server = serve(workers=2, defense="dcp", defense_params={"beta": 1.2})
    done = attack(server.url, folder, tmp_path, name, "--admin", server.admin)
    assert done.exit_code == 0, done.output
    result = read(tmp_path / "result.json")
    ledger = result.ledger
    assert ledger.spent == ledger.answered == ledger.server <= ledger.budget
    assert ledger.difference == ledger.lost == ledger.replayed == 0
    assert ledger.test == 120
    metrics = server.metrics()
    assert metrics['scumble_images_total{model="tiny",precision="float32"}'] == ledger.spent + 120
    assert (result.victim.name, result.victim.defense) == ("tiny", "dcp")
    assert len(result.victim.sha256) == 64
    assert result.transport == "png"
    assert result.seeds == {"attack": 0, "student": 0}
    assert [point.queries for point in result.curve][-1] == ledger.spent
    assert result.curve[-1].accuracy == result.scores.accuracy
    assert f"{result.scores.accuracy:.2%}" in done.output
    again = students.make("small_cnn", (3, 8, 8), 4, seed=0, weights=tmp_path / "copy.pt")
    test = pool(numbered_as(load(str(folder)), LABELS), (3, 8, 8))
    accuracy = (students.predict(again, test.images).argmax(1) == test.labels).mean()
    assert accuracy == pytest.approx(result.scores.accuracy)


@pytest.mark.server
@pytest.mark.parametrize("adapt", ["argmax", "top_k", "average", "invert,argmax"])
def test_modifiers_are_part_of_the_result(adapt, serve, folder, tmp_path):
    server = serve(defense="dcp", defense_params={"beta": 1.2})
    extra = ["--set", "invert.beta=1.2"] if "invert" in adapt else []
    done = attack(
        server.url, folder, tmp_path, "knockoff", "--adapt", adapt, "--admin", server.admin, *extra
    )
    assert done.exit_code == 0, done.output
    result = read(tmp_path / "result.json")
    assert [modifier.name for modifier in result.adapt] == adapt.split(",")
    if extra:
        assert result.adapt[0].settings["beta"] == 1.2
    assert result.ledger.difference == 0
    assert result.ledger.spent == (88 if adapt == "average" else 90)  # 4 repeats of 22 images


@pytest.mark.server
def test_a_copy_is_made_of_what_a_key_gives(serve, folder, tmp_path):
    keys = tmp_path / "keys.json"
    for client, more in (("guest", ["--total-images", "40"]), ("owner", [])):
        words = ["keys", "add", "--file", str(keys), "--client", client, *more]
        made = CliRunner().invoke(main, words)
        (tmp_path / client).write_text(made.stdout)
    server = serve(workers=1, keys_file=str(keys))
    accounts = ["--keys", str(tmp_path / "guest"), "--owner-token", str(tmp_path / "owner")]
    done = attack(
        server.url, folder, tmp_path / "run", "knockoff", "--admin", server.admin, "--batch", "8",
        *accounts,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    ledger = read(tmp_path / "run" / "result.json").ledger
    assert (ledger.budget, ledger.spent, ledger.server) == (90, 40, 40)
    assert ledger.test == 120
    assert "429 budget exceeded" in ledger.ended
    assert "40 of 90; counted by the server: 40" in done.output
    assert [p.queries for p in read(tmp_path / "run" / "result.json").curve][-1] == 40


@pytest.mark.server
def test_a_killed_run_goes_on_and_gives_the_same_copy(serve, folder, tmp_path):
    server = serve(workers=1)
    options = ["--transport", "tensor", "--threads", "1"]
    options += ["--budget", "2000"]
    whole = attack(server.url, folder, tmp_path / "whole", "dfme", *options)
    assert whole.exit_code == 0, whole.output
    words = [sys.executable, "-m", "scumble.cli", "attack", server.url, "--attack", "dfme"]
    words += ["--test", str(folder), "--student", "small_cnn", "--out", str(tmp_path / "cut")]
    words += ["--no-progress", *SHORT["dfme"], *options, "--admin", server.admin]
    process = subprocess.Popen(words, cwd=ROOT)
    journal = tmp_path / "cut" / "journal.sqlite-wal"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.stat().st_size > 50000):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "result.json").exists()
    cut = attack(server.url, folder, tmp_path / "cut", "dfme", *options, "--admin", server.admin)
    assert cut.exit_code == 0, cut.output
    ledger = read(tmp_path / "cut" / "result.json").ledger
    assert ledger.replayed > 0
    # What was on its way at that moment may have been counted by the service, or not.
    assert 0 <= ledger.difference <= ledger.lost
    if not ledger.lost:
        weights = [torch.load(tmp_path / name / "copy.pt") for name in ("whole", "cut")]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.server
def test_a_finished_or_other_run_is_not_overwritten(serve, folder, tmp_path):
    server = serve()
    assert attack(server.url, folder, tmp_path).exit_code == 0
    before = (tmp_path / "result.json").read_bytes()
    done = attack(server.url, folder, tmp_path)
    assert done.exit_code == 1
    assert "holds this run, done; name another folder with --out" in done.output
    other = attack(server.url, folder, tmp_path, "knockoff", "--seed", "5")
    assert "its seed is 0, not 5" in other.output
    assert (tmp_path / "result.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapt", "sharpen"], "unknown modifier 'sharpen'; allowed: argmax"),
        (["--set", "fit.epoch=3"], "fit has no 'epoch'; allowed: epochs"),
        (["--set", "fit.batch=many"], "fit.batch is 'many'; allowed: a valid integer"),
        (["--set", "fit.loss=x"], "loss is 'x'; allowed: soft, centred"),
        (["--set", "epochs=3"], "setting is 'epochs=3'; allowed: name.field=value"),
        (["--set", "fit.lr=1", "--set", "fit.lr=1"], "fit.lr is set twice; allowed: once"),
        (["--adapt", "top_k,argmax,top_k"], "modifier 'top_k' is given twice; allowed: once"),
        (["--set", "invert.beta=1"], "unknown name 'invert' in --set; allowed: attack, fit"),
        (["--adapt", "top_k", "--set", "top_k.n=1"], "top_k has no parameter 'n'; allowed: k"),
        (["--test", "nowhere"], "no data set 'nowhere'"),
        (["--test", "strokes"], "strokes has no labels; allowed to measure on: labelled images"),
        (["--queries", "strokes[5:3]"], "'strokes[5:3]' has no images: strokes has 100000"),
        (["--queries", "digits[5:5]"], "'digits[5:5]' has no images"),
        (["--queries", ""], "data set is ''; allowed: NAME[:PART]"),
        (["--set", "attack.seed=5"], "attack.seed is set by --seed alone"),
        (["--set", "fit.seed=5"], "fit.seed is set by --seed alone"),
        (["--set", "fit.lr=NaN"], "lr is nan; allowed: more than 0"),
        (["--set", "attack.rounds=2"], "attack.rounds needs answers that can be given again"),
        (["--set", "attack.rounds=2", "--adapt", "invert,average"], "average comes after them"),
        (["--adapt", "diluted"], "diluted needs what honest clients send"),
        (["--adapt", "diluted", "--set", "diluted.benign=5"], "benign must be text, got 5"),
        (["--adapt", "diluted", "--set", "diluted.benign=nowhere"], "no data set 'nowhere'"),
        (
            ["--adapt", "oracle_mask", "--set", "oracle_mask.clean=http://192.0.2.1"],
            "clean must be a service on this machine, got 'http://192.0.2.1'",
        ),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_asked(
    options, message, folder, tmp_path, serve
):
    server = serve()
    done = attack(server.url, folder, tmp_path / "out", "knockoff", *options)
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output
    assert server.metrics()['scumble_images_total{model="tiny",precision="float32"}'] == 0


def test_nobody_there_and_nobody_asked(folder, tmp_path):
    done = attack("http://127.0.0.1:9", folder, tmp_path, "knockoff")
    assert done.exit_code == 1
    assert "no answer from http://127.0.0.1:9" in done.output
    done = attack("http://example.com", folder, tmp_path, "knockoff")
    assert done.exit_code == 1
    assert "example.com is not this machine" in done.output


def test_a_data_free_attack_needs_no_images_and_others_say_so(serve, folder, tmp_path):
    server = serve()
    words = ["attack", server.url, "--attack", "jbda", "--budget", "20", "--test", str(folder)]
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path), "--no-progress"])
    assert done.exit_code == 1
    assert "give a data set with --queries" in done.output


def test_the_data_folder_of_the_run_is_that_of_its_modifiers(tmp_path):
    job = Job("http://localhost", "knockoff", 10, test="x", adapt=("diluted",), root=tmp_path)
    assert configure(job)[1][0].root == str(tmp_path)
    job = replace(job, changes=("diluted.root=other", "diluted.benign=mnist"))
    assert configure(job)[1][0].root == "other"


@pytest.mark.parametrize("option", [["--seed", "-1"], ["--seed", "99999999999999999999"]])
def test_a_seed_has_a_range(option, tmp_path):
    done = attack("http://127.0.0.1:9", tmp_path, tmp_path / "out", "knockoff", *option)
    assert done.exit_code == 2
    assert "is not in the range" in done.output


def test_changes_reach_attack_fit_and_modifiers():
    job = Job(
        "http://localhost",
        "knockoff",
        10,
        test="x",
        adapt=("top_k", "argmax"),
        changes=("fit.epochs=2", "attack.ask=5", "top_k.k=2", "attack.curve=[0.5, 1]"),
    )
    attack, modifiers = configure(job)
    assert isinstance(attack, Knockoff)
    assert (attack.fitting.epochs, attack.ask, attack.curve) == (2, 5, (0.5, 1.0))
    assert modifiers[0].k == 2
    paper, _ = configure(replace(job, changes=(), adapt=(), profile="paper"))
    assert (paper.fitting.epochs, paper.fitting.optimizer, paper.fitting.batch) == (50, "sgd", 64)
    with pytest.raises(AttackError, match="dfme does not fit a transfer set"):
        configure(replace(job, attack="dfme", changes=("fit.epochs=2",), adapt=()))


@given(st.lists(st.text(max_size=20), max_size=3))
def test_any_text_is_a_setting_or_an_error(texts):
    try:
        found = parse(texts)
    except AttackError:
        assert not all(re.fullmatch(r"[^.=]+\.[^=]+=.*", text, re.DOTALL) for text in texts)
    else:
        assert sum(len(fields) for fields in found.values()) <= len(texts)


@given(
    st.sampled_from(["batch", "lr_s", "milestones", "views", "nope"]),
    st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.lists(st.floats(), max_size=3)),
)
def test_a_field_takes_its_type_or_says_no(field, value):
    with suppress(AttackError):
        found = change(Dfme(), "attack", {field: value})
        assert isinstance(getattr(found, field), type(getattr(Dfme(), field)))


def test_a_folder_belongs_to_one_job(tmp_path):
    job = Job("http://localhost:1", "dfme", 100, test="x")
    claim(job, tmp_path)
    claim(job, tmp_path)
    with pytest.raises(ResumeMismatch, match="its budget is 100, not 200"):
        claim(replace(job, budget=200), tmp_path)


def test_results_are_checked(tmp_path):
    path = tmp_path / "result.json"
    with pytest.raises(BadResult, match="not a result of an attack"):
        read(path)
    (found,) = list(STEAL.glob("knockoff-mnist.json"))
    whole = json.loads(found.read_text())
    for member in ("seeds", "ledger", "transport", "victim", "curve"):
        path.write_text(json.dumps({key: whole[key] for key in whole if key != member}))
        with pytest.raises(BadResult, match=member):
            read(path)
    path.write_text(json.dumps(whole | {"extra": 1}))
    with pytest.raises(BadResult, match="extra"):
        read(path)


@pytest.mark.parametrize("path", sorted(STEAL.glob("*.json")), ids=lambda p: p.stem)
def test_committed_results_are_whole(path):
    result = read(path)
    assert isinstance(result, Result)
    assert result.ledger.difference == 0
    assert result.ledger.spent <= result.ledger.budget
    assert result.victim.sha256
    cell = CELLS[path.stem]
    assert (result.victim.name, result.attack.name) == (cell.victim, cell.attack)
    assert (result.ledger.budget, result.transport) == (cell.budget, cell.transport)


def pictures(images):
    labels = np.zeros(len(images), np.int64)
    return Dataset("x", images, labels, ("a",), tuple(map(str, labels)))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 32, 20)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_pool_has_the_victims_shape(shape, channels):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, channels), np.uint8)
    found = pool(pictures(images), shape)
    assert found.images.shape == (5, *shape)
    assert found.images.dtype == np.float32
    assert abs(found.images.mean() - images.mean() / 255) < 0.02
    if (channels, 8, 8) == shape:
        np.testing.assert_allclose(found.images, images.transpose(0, 3, 1, 2) / 255, atol=1e-7)


def test_names_choose_the_part_of_a_data_set(folder, tmp_path):
    assert len(data(str(folder), "test", None)) == 120
    some = data(str(folder), "test", None, limit=7)  # sorted by class, so not the first ones
    assert (len(some), len(set(some.labels))) == (7, 4)
    first = data("digits:test", "test", None, limit=7)
    np.testing.assert_array_equal(first.images, data("digits:test", "test", None).images[:7])


TEMPLATE = """
[model]
name = "theirs"
labels = ["red", "green", "blue", "grey"]
shape = [3, 8, 8]

[request]
path = "/v1/predict"
encoding = "base64"
body = '{"instances": [{"b64": "$image"}]}'

[response]
path = "predictions.0.probabilities"
form = "list"
scale = "probabilities"
"""


@pytest.mark.server
def test_an_api_is_attacked_by_its_description(serve, folder, tmp_path):
    server = serve()
    (tmp_path / "theirs.toml").write_text(TEMPLATE)
    options = ["--template", str(tmp_path / "theirs.toml"), "--admin", server.admin]
    done = attack(server.url, folder, tmp_path / "out", "knockoff", *options)
    assert done.exit_code == 0, done.output
    result = read(tmp_path / "out" / "result.json")
    assert (result.victim.name, result.transport) == ("theirs", "template:theirs")
    assert result.ledger.spent == result.ledger.server == 90
    (tmp_path / "bad.toml").write_text(TEMPLATE.replace("base64", "smoke"))
    options = ["--template", str(tmp_path / "bad.toml")]
    done = attack(server.url, folder, tmp_path / "other", "knockoff", *options)
    assert done.exit_code == 1
    assert "smoke" in done.output
