"""Assembly: what the settings choose is what answers, and what cannot be served does not start."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest

from app.admin.console.facts import about
from app.errors import BundleError, ConfigError
from app.inference.assembly import configure_defense, make_defense
from app.inference.bundle import open_bundle
from app.main import create_app
from app.processes.snapshot import copy_bundle
from app.settings import Settings
from scumble.defenses import make
from tests.app import probe_defenses
from tests.pictures import PNG

HEADERS = {"Content-Type": "image/png"}


def ask(client) -> np.ndarray:
    answer = client.post("/v1/predict", content=PNG, headers=HEADERS)
    return np.array(answer.json()["predictions"][0]["probabilities"])


@pytest.mark.parametrize(
    ("engine", "precision", "tolerance"),
    [
        ("openvino", "float32", 1e-6),
        ("openvino", "bf16", 0.05),
        ("openvino", "int8", 0.05),
        ("onnxruntime", "float32", 1e-5),
        ("onnxruntime", "int8", 0.05),
        ("torch", "float32", 1e-5),
        ("torch", "int8", 0.05),
    ],
)
def test_engines_and_precisions_agree(make_client, engine, precision, tolerance):
    expected = ask(make_client(engine="openvino"))
    found = ask(make_client(engine=engine, precision=precision))
    np.testing.assert_allclose(found, expected, atol=tolerance)


def test_dcp_changes_the_answer_as_its_formula_says(make_client):
    clean = ask(make_client())
    beta, gamma, nu = 1.2, 0.2, 1000
    gate = 1 / (1 + np.exp(nu * (clean.max() - beta)))
    odds = np.clip(clean / (1 - clean), 1e-12, 1 - 1e-12)
    moved = clean - gate * beta * (1 / (1 + np.exp(-gamma * np.log(odds))) - 0.5)
    found = ask(make_client(defense="dcp", defense_params={"beta": beta, "gamma": gamma}))
    np.testing.assert_allclose(found, moved / moved.sum(), atol=2e-6)
    assert np.abs(found - clean).sum() > 0.3


def test_a_defense_without_parameters_has_those_that_its_card_recommends(own_models, caplog):
    """In the service, in the keys' policies and on the console alike."""
    edit_card(own_models / "tiny", lambda card: card.update(recommended={"dcp": {"beta": 1.25}}))
    served = settings(own_models, defense="dcp")
    bundle = open_bundle(own_models, "tiny")
    caplog.set_level("INFO", "scumble")
    assert make_defense(served, bundle) == make("dcp", beta=1.25)
    assert "using the recommended parameters" in caplog.text
    assert configure_defense(served, bundle, "dcp", {}) == make("dcp", beta=1.25)
    assert about(served, own_models)["policy"] == {"defense": "dcp", "params": {"beta": 1.25}}
    caplog.clear()
    given = settings(own_models, defense="dcp", defense_params={"beta": 0.5})
    assert make_defense(given, bundle) == make("dcp", beta=0.5)
    assert caplog.text == ""


def test_recommended_parameters_are_all_or_none(own_models):
    """A strength was not measured together with another slope."""
    edit_card(own_models / "tiny", lambda card: card.update(recommended={"dcp": {"beta": 1.25}}))
    gamma = settings(own_models, defense="dcp", defense_params={"gamma": 0.1})
    with pytest.raises(ConfigError, match="needs the parameter 'beta'"):
        make_defense(gamma, open_bundle(own_models, "tiny"))


def test_the_same_image_gets_the_same_random_answer_on_every_replica(make_client):
    options = {"defense": "random", "defense_params": {"epsilon": 0.5}}
    one = make_client(secret="0123456789abcdef", **options)
    two = make_client(secret="0123456789abcdef", **options)
    np.testing.assert_array_equal(ask(one), ask(one))
    np.testing.assert_array_equal(ask(one), ask(two))


@pytest.mark.parametrize(("execution", "on_thread"), [("inline", 0), ("thread", 1)])
def test_execution_can_be_chosen(make_client, execution, on_thread):
    found = ask(make_client(batch={"execution": execution}, defense=probe_defenses.THREAD))
    np.testing.assert_array_equal(found, np.eye(4)[on_thread])
    same = ask(make_client(batch={"execution": execution}))
    np.testing.assert_array_equal(same, ask(make_client()))


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"defense": "none"}, "numpy"),
        ({"defense": "dcp", "defense_params": {"beta": 1.2}}, "graph"),
        ({"defense": "label", "engine": "onnxruntime", "precision": "int8"}, "graph"),
        ({"defense": "round", "defense_params": {"decimals": 2}}, "numpy"),
        ({"defense": "dcp", "defense_params": {"beta": 1.2, "keep_top1": True}}, "numpy"),
        ({"defense": "label", "precision": "bf16"}, "numpy"),
        ({"defense": "label", "engine": "torch"}, "numpy"),
    ],
)
def test_the_log_says_where_the_defense_runs(make_client, caplog, options, where):
    with caplog.at_level("INFO", logger="scumble"):
        make_client(**options)
    (loaded,) = [record for record in caplog.records if record.message == "loaded"]
    assert loaded.defends == where


def test_a_graph_that_is_off_is_not_served(make_client, caplog):
    params = {"defense": probe_defenses.WRONG_GRAPH, "defense_params": {"beta": 1.2}}
    served = ask(make_client(**params))
    assert "the defense runs behind the engine: its graph is off by" in caplog.text
    assert served.sum() == pytest.approx(1)


def settings(models, **overrides) -> Settings:
    return Settings(**{"model_dir": models, "model": "tiny", **overrides})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model": "huge"}, "no model 'huge' in .*available: tiny"),
        ({"defense": "magic"}, "unknown defense 'magic'.*dcp"),
        ({"defense": "dcp"}, "dcp needs the parameter 'beta'"),
        ({"defense": "dcp", "defense_params": {"beta": 1, "betta": 2}}, "no parameter 'betta'"),
        ({"defense": "dcp", "defense_params": {"beta": "x"}}, "beta must be a number"),
        ({"defense": "dcp", "defense_params": {"beta": 1, "secret": "x"}}, "no parameter"),
        ({"engine": "onnxruntime", "precision": "bf16"}, "bf16"),
    ],
)
def test_what_cannot_be_served_does_not_start(models, overrides, message):
    with pytest.raises(ConfigError, match=message):
        create_app(settings(models, **overrides))


def test_a_tampered_model_is_refused(own_models):
    with (own_models / "tiny" / "float32.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match=r"float32\.onnx has sha256"):
        create_app(settings(own_models))


OUTSIDE = ["../../../x", "..", ".", "a/b", "/etc/hostname", "a\0b", "x" * 256, "", ".hidden", "a\n"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_card_names_files_of_its_own_folder_only(own_models, tmp_path, name):
    edit_card(own_models / "tiny", lambda card: card["files"].update({name: "0" * 64}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BundleError, match=r"card\.json.*is malformed"):
        copy_bundle(settings(own_models), tmp_path / "copy")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../other", "../models/tiny", ".", "..", "/", "tiny/", "a\0b"])
def test_a_model_is_a_folder_of_the_model_folder(models, tmp_path, name):
    with pytest.raises(BundleError, match="available: tiny"):
        copy_bundle(settings(models, model=name), tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_hashed_before_it_is_copied(own_models, tmp_path):
    """Also one that this server does not need: nothing unchecked gets into the copy."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    aside = own_models / "tiny" / "int8.onnx"
    aside.unlink()
    aside.symlink_to(secret)
    with pytest.raises(BundleError, match=r"int8\.onnx has sha256"):
        copy_bundle(settings(own_models), tmp_path / "copy")
    assert not (tmp_path / "copy" / "tiny" / "int8.onnx").exists()


@pytest.mark.parametrize("file", ["card.json", "float32.onnx", "golden.json"])
def test_what_never_ends_is_no_file_of_a_bundle(own_models, file):
    (own_models / "tiny" / file).unlink()
    os.mkfifo(own_models / "tiny" / file)
    with pytest.raises(BundleError, match="not a regular file"):
        create_app(settings(own_models))


@pytest.mark.parametrize("inside", [False, True], ids=["of the graph", "of a subgraph"])
def test_a_network_with_weights_in_other_files_is_refused(own_models, inside):
    """Engines read them, from wherever the file says, and no hash covers what is there."""
    from app.inference.bundle import Bundle, write_card

    folder = own_models / "tiny"
    model = onnx.load(folder / "float32.onnx")
    tensor = model.graph.initializer[0]
    if inside:
        node = model.graph.node.add(op_type="Constant", output=["unused"])
        node.attribute.append(onnx.helper.make_attribute("value", tensor))
        tensor = node.attribute[0].t
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret")
    (folder / "float32.onnx").write_bytes(model.SerializeToString())
    write_card(folder, json.loads((folder / "card.json").read_text()))
    with pytest.raises(BundleError, match=r"weights in another file, '../../secret'"):
        Bundle(folder).read("float32.onnx")


def test_a_missing_file_is_named(own_models):
    (own_models / "tiny" / "int8.onnx").unlink()
    with pytest.raises(BundleError, match=r"int8\.onnx cannot be read"):
        create_app(settings(own_models, precision="int8"))


MALFORMED = {
    "{": "Invalid JSON: EOF while parsing",
    "{}": "format is missing; name is missing; version is missing; and 3 more",
    "[]": "it is []; allowed: an object",
    '{"format": 1}': "format is 1; allowed: 'scumble-bundle/1'; name is missing; version is mi",
}


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_card_is_named_with_what_is_wrong(own_models, text):
    path = own_models / "tiny" / "card.json"
    path.write_text(text)
    with pytest.raises(BundleError) as refused:
        create_app(settings(own_models))
    assert str(refused.value).startswith(f"{str(path)!r} is malformed: {MALFORMED[text]}")
    assert "\n" not in str(refused.value)


def test_malformed_golden_outputs_are_named_with_what_is_wrong(own_models):
    from app.inference.bundle import Bundle, write_card

    folder = own_models / "tiny"
    (folder / "golden.json").write_text('{"probabilities": {"float32": 3}, "tolerance": {}}')
    write_card(folder, json.loads((folder / "card.json").read_text()))
    with pytest.raises(BundleError, match=r"malformed: probabilities\.float32 is 3; allowed: a"):
        Bundle(folder).golden()


def edit_card(folder, change) -> None:
    path = folder / "card.json"
    card = json.loads(path.read_text())
    change(card)
    path.write_text(json.dumps(card))


def test_unknown_members_of_a_card_are_refused(own_models):
    edit_card(own_models / "tiny", lambda card: card.update(acuracy={}))
    with pytest.raises(BundleError, match="acuracy"):
        create_app(settings(own_models))


def test_wrong_outputs_fail_the_self_test(own_models):
    from app.inference.bundle import write_card

    folder = own_models / "tiny"
    golden = json.loads((folder / "golden.json").read_text())
    golden["probabilities"]["float32"][0] = golden["probabilities"]["float32"][0][::-1]
    (folder / "golden.json").write_text(json.dumps(golden))
    card = json.loads((folder / "card.json").read_text())
    write_card(folder, card)
    with pytest.raises(BundleError, match=r"fails its self-test.*off by 0\.\d+; allowed"):
        create_app(settings(own_models))


def test_settings_come_from_the_environment(monkeypatch, models):
    monkeypatch.setenv("SCUMBLE_MODEL_DIR", str(models))
    monkeypatch.setenv("SCUMBLE_MODEL", "tiny")
    assert create_app().state.service.card.name == "tiny"


def test_batches_are_limited_to_what_fits_the_watchdog(make_client, caplog):
    with caplog.at_level("INFO", logger="scumble"):
        client = make_client(defense=probe_defenses.SLOW, watchdog_s=4.8)  # a quarter is 1.2 s
    (loaded,) = [record for record in caplog.records if record.message == "loaded"]
    assert loaded.max_batch in (1, 2, 4)  # 8 images sleep for 1.2 s, and need more
    assert f"batch size limited to {loaded.max_batch} images" in caplog.text
    files = [("image", ("x.png", PNG, "image/png"))] * 9
    assert len(client.post("/v1/predict", files=files).json()["predictions"]) == 9


def test_one_image_that_takes_longer_than_a_batch_may_does_not_start(models):
    with pytest.raises(ConfigError, match=r"one image takes 0\.\d+ s; allowed: 0\.1 s, 1/4"):
        create_app(settings(models, defense=probe_defenses.SLOW, watchdog_s=0.4))


def test_bundle_prints_as_its_constructor(models):
    from app.inference.bundle import Bundle

    assert re.fullmatch(r"Bundle\('.*/tiny'\)", repr(Bundle(models / "tiny")))


IMPORTS = """
import io, sys
from PIL import Image
from starlette.testclient import TestClient
from app.main import create_app
from app.settings import Settings

files = []
MODES = {"PNG": "1 L LA P RGB RGBA I;16", "JPEG": "L RGB CMYK", "WEBP": "RGB"}
for format_, modes in MODES.items():
    for mode in modes.split():
        file = io.BytesIO()
        Image.new(mode, (20, 20)).save(file, format_)
        files.append(file.getvalue())
app = create_app(Settings(model_dir=sys.argv[1], model="tiny"))
codecs = lambda: {n for n in sys.modules if n.split(".")[0] in ("PIL", "imagecodecs", "numpy")}
with TestClient(app) as client:
    before = codecs()
    statuses = {client.post("/v1/predict", content=file).status_code for file in files}
    print(statuses, codecs() - before)
"""


def test_no_codec_is_imported_by_a_request(models):
    """A process that has run out of descriptors cannot import."""
    command = [sys.executable, "-c", IMPORTS, str(models)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{200} set()"


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (
            "app.processes.supervisor, app.admin.application, app.admin.console.preview_process",
            {"numpy", "PIL", "imagecodecs", "fastapi", "openvino"},
        ),
        (
            "app.main, app.processes.worker, app.inference.upstream.assembly",
            {"onnx", "onnxruntime", "openvino", "torch", "httpx2", "scumble.api_template"},
        ),
    ],
    ids=["supervisor", "worker in front of a V2 server"],
)
def test_a_process_imports_only_what_it_needs(modules, heavy):
    code = f"import sys, {modules}; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
