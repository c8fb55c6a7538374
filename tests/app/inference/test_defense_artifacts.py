"""Auxiliary networks: loaded from the bundle, asked about the images that the service got."""

import numpy as np
import onnxruntime as ort
import pytest
from starlette.testclient import TestClient

from app.errors import BundleError, ConfigError
from app.inference.bundle import Bundle, golden_inputs
from app.inference.defense_artifacts import DefenseArtifacts
from app.main import create_app
from app.settings import Settings
from scumble.defenses import DefenseError, make
from tests.pictures import encoded, picture
from tests.tiny import LABELS, SHAPE, make_bundle

PARAMS = {
    "adaptive_misinformation": {"tau": 1.1},
    "mad": {"epsilon": 1.2},
    "grad2": {"epsilon": 0.6},
}
FILES = {
    "adaptive_misinformation": ("misinformation.onnx", "probabilities"),
    "mad": ("surrogate.onnx", "probabilities"),
    "grad2": ("surrogate.onnx", "scores"),
}
PICTURES = [picture(seed=i) for i in range(5)]
PIXELS = np.stack([np.asarray(p) for p in PICTURES])
PLANAR = PIXELS.transpose(0, 3, 1, 2).astype(np.float32, order="C") / np.float32(255)

each_defense = pytest.mark.parametrize("name", PARAMS)


@pytest.fixture(scope="module")
def equipped(tmp_path_factory):
    """A model folder whose bundle `tiny` has auxiliary networks."""
    folder = tmp_path_factory.mktemp("equipped")
    make_bundle(folder, auxiliary=True)
    return folder


@pytest.fixture
def bundle(equipped):
    return Bundle(equipped / "tiny")


def straight(folder, file, output, pixels=PIXELS):
    """What ONNX Runtime gives for the whole file, nothing cut away."""
    session = ort.InferenceSession((folder / "tiny" / file).read_bytes())
    return session.run([output], {"pixels": pixels})[0]


def served(models, name, body, **settings):
    options = {"model_dir": models, "model": "tiny", "defense": name, **settings}
    with TestClient(create_app(Settings(**options))) as client:
        return body(client)


def by_images(client):
    """One picture each, and then all in one request."""
    files = [("image", ("x.png", encoded(p), "image/png")) for p in PICTURES]
    answers = [client.post("/v1/predict", files=[f]) for f in files]
    answers.append(client.post("/v1/predict", files=files))
    found = [line["probabilities"] for a in answers for line in a.json()["predictions"]]
    single, together = np.array(found[:5]), np.array(found[5:])
    np.testing.assert_allclose(single, together, atol=1e-6)
    return together


def by_tensors(array):
    def ask(client):
        datatype = "UINT8" if array.dtype == np.uint8 else "FP32"
        given = {
            "name": "pixels",
            "shape": list(array.shape),
            "datatype": datatype,
            "data": array.reshape(-1).tolist(),
        }
        answer = client.post("/v2/models/tiny/infer", json={"inputs": [given]})
        assert answer.status_code == 200, answer.text
        return np.reshape(answer.json()["outputs"][0]["data"], (len(array), len(LABELS)))

    return ask


@each_defense
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
def test_served_answers_are_the_formula_with_the_files_rows(equipped, name, engine):
    clean = straight(equipped, "float32.onnx", "probabilities")
    rows = straight(equipped, *FILES[name])

    class Known:
        def auxiliary(self, file, output):
            assert (file, output) == FILES[name]
            return lambda _: rows

    expected = make(name, bundle=Known(), **PARAMS[name])(clean, PIXELS)
    assert (abs(expected - clean).sum(1) > 0.05).all()
    for body in (by_images, by_tensors(PIXELS), by_tensors(PLANAR)):
        found = served(equipped, name, body, defense_params=PARAMS[name], engine=engine)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@each_defense
def test_guard_and_chain_pass_the_images_on(equipped, name):
    clean = straight(equipped, "float32.onnx", "probabilities")
    params = {"steps": [["round", {"decimals": 4}], [name, {**PARAMS[name], "keep_top1": True}]]}
    found = served(equipped, "chain", by_tensors(PLANAR), defense_params=params)
    assert (found.argmax(1) == clean.argmax(1)).all()
    assert (abs(found - clean).sum(1) > 1e-3).all()


@pytest.mark.parametrize("engine", ["auto", "openvino", "onnxruntime", "torch"])
@pytest.mark.parametrize("name", FILES)
def test_both_forms_give_the_files_rows_whatever_the_batch(equipped, bundle, engine, name):
    network = DefenseArtifacts(bundle, engine).auxiliary(*FILES[name])
    expected = straight(equipped, *FILES[name])
    scale = abs(expected).max()
    for batch in (PIXELS, PLANAR, PLANAR.astype(np.float64)):
        np.testing.assert_allclose(network(batch), expected, atol=1e-5 * scale)
        np.testing.assert_array_equal(network(batch)[1:2], network(batch[1:2]))


@each_defense
def test_a_bundle_without_the_file_says_how_to_make_it(models, name):
    file = FILES[name][0]
    with pytest.raises(
        ConfigError,
        match=rf"needs {file}, which .*tiny.*`python -m scumble.training.auxiliary tiny`",
    ):
        served(models, name, by_images, defense_params=PARAMS[name])
    with pytest.raises(DefenseError, match=file):
        make(name, bundle=DefenseArtifacts(Bundle(models / "tiny")), **PARAMS[name])


def test_a_tampered_file_is_refused(tmp_path):
    folder = make_bundle(tmp_path, auxiliary=True)
    with (folder / "surrogate.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match=r"surrogate\.onnx has sha256"):
        served(tmp_path, "mad", by_images, defense_params=PARAMS["mad"])


def test_an_output_that_is_not_there_is_named(bundle):
    with pytest.raises(ConfigError, match=r"no output 'scores'; available: probabilities"):
        DefenseArtifacts(bundle).auxiliary("misinformation.onnx", "scores")


def test_golden_pictures_reach_the_network(bundle):
    network = DefenseArtifacts(bundle).auxiliary("surrogate.onnx", "probabilities")
    rows = network(golden_inputs(SHAPE))
    np.testing.assert_allclose(rows.sum(1), 1, atol=1e-5)
