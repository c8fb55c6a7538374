"""`scumble connect` writes a bundle that serves what a server answers, or says what is missing."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from app.commands.connect import connect
from app.commands.serve import check
from app.errors import ConfigError
from app.inference.bundle import Bundle
from app.inference.upstream.connect import Wishes, describe
from app.main import create_app
from app.settings import Settings
from tests.app.inference.upstream.fake import DROP, FakeUpstream, http, running
from tests.app.inference.upstream.test_upstream import IMAGES, infer, rows_of


def run(fake, models, *words):
    arguments = [fake.url, "--name", "front", "--models", str(models), *words]
    return CliRunner().invoke(connect, arguments)


@pytest.mark.parametrize(
    ("options", "words", "said"),
    [
        ({}, ["--normalize", "0..1"], "FP32 NCHW, 8x8x3, pixels / 255"),
        ({"layout": "NHWC"}, ["--normalize", "0..1"], "FP32 NHWC"),
        ({"datatype": "UINT8"}, [], "UINT8 NCHW, 8x8x3, pixels as they are"),
        ({"datatype": "FP16"}, ["--mean", "0", "--std", "1"], "FP16 NCHW"),
        ({"scale": 1 / 255}, ["--normalize", "0..255"], "/ [0.00392157]"),
        ({"answers": "logits"}, ["--normalize", "0..1"], "logits of 4 classes"),
        ({"output_datatype": "FP64"}, ["--normalize", "0..1"], "probabilities of 4 classes"),
        ({"binary": False}, ["--normalize", "0..1"], "as JSON"),
        ({"version": "3"}, ["--normalize", "0..1"], "version   3"),
        ({"version": None}, ["--normalize", "0..1"], "the server names none"),
        ({"max_batch_size": 4}, ["--normalize", "0..1"], "up to 4 images"),
        ({}, ["--normalize", "0..1", "--max-batch", "2"], "up to 2 images"),
    ],
    ids=str,
)
def test_what_is_written_serves_what_the_server_answers(tmp_path, options, words, said):
    with running(**options) as fake:
        done = run(fake, tmp_path, *words)
        assert done.exit_code == 0, done.output
        assert said in done.output
        settings = Settings(model_dir=tmp_path, model="front", engine="upstream", upstream=fake.url)
        with TestClient(create_app(settings)) as client:
            found = rows_of(infer(client))
    golden = Bundle(tmp_path / "front").golden()
    np.testing.assert_allclose(found, golden.probabilities["float32"], atol=1e-6)
    assert len(found) == len(IMAGES)


class HangsUp(FakeUpstream):
    """Answers bytes with an error of its own and closes the connection, as MLServer does."""

    failed = False

    async def _answer(self, method, path, headers, body):
        if self.failed:
            self.failed = False
            return DROP
        if "inference-header-content-length" in headers:
            self.failed = True
            return http(500, b"Internal Server Error")
        return await super()._answer(method, path, headers, body)


def test_a_server_that_hangs_up_on_bytes_is_asked_in_json(tmp_path):
    fake = HangsUp()
    fake.start()
    try:
        done = run(fake, tmp_path, "--normalize", "0..1")
    finally:
        fake.stop()
    assert done.exit_code == 0, done.output
    assert "as JSON" in done.output


def test_labels_are_read_and_must_be_as_many_as_classes(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\n")
    with running(datatype="UINT8") as fake:
        assert run(fake, tmp_path, "--labels", str(names)).exit_code == 0
        assert Bundle(tmp_path / "front").card.labels == ["a", "b", "c", "d"]
        names.write_text('["a", "b", "c"]')
        done = run(fake, tmp_path, "--labels", str(names), "--replace")
        assert "has 3 different labels; the model has 4 classes" in done.output
        assert Bundle(tmp_path / "front").card.labels == ["a", "b", "c", "d"]


REFUSED = {
    "no normalisation": ({}, [], "give --normalize imagenet|tf|0..1|0..255|caffe, or --mean"),
    "a normalisation of pixels": ({"datatype": "UINT8"}, ["--mean", "0.5"], "takes UINT8"),
    "two channels of a mean": ({}, ["--mean", "0.1,0.2"], "--mean is 0.1,0.2; allowed: 1 or 3"),
    "no deviation": ({}, ["--std", "0"], "--std is 0.0; allowed: 1 or 3 numbers above 0"),
    "an input that is not there": ({}, ["--input", "image"], "no input named 'image'"),
    "an output that is not there": ({}, ["--output", "p"], "no output named 'p'"),
    "features that are not there": ({}, ["--features", "p"], "--features is 'p'"),
    "another size": ({}, ["--size", "9"], "--size is 9x9, the input has 8x8"),
    "no size": ({}, ["--size", "0"], "'0' is not a size"),
    "probabilities that are none": (
        {"answers": "logits"},
        ["--normalize", "0..1", "--answers", "probabilities"],
        "'y' gives no probabilities",
    ),
    "a wrong token": ({"token": "t"}, [], "status 401"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_or_wrong_is_said_and_nothing_is_written(tmp_path, case):
    options, words, said = REFUSED[case]
    with running(**options) as fake:
        done = run(fake, tmp_path, *words)
    assert done.exit_code != 0
    assert said in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


def test_a_bundle_is_replaced_only_if_asked_and_never_one_with_a_network(own_models):
    with running(datatype="UINT8") as fake:
        assert run(fake, own_models).exit_code == 0
        assert "--replace" in run(fake, own_models).output
        assert run(fake, own_models, "--replace").exit_code == 0
        done = CliRunner().invoke(
            connect, [fake.url, "--name", "tiny", "--models", str(own_models), "--replace"]
        )
        assert "has a network of its own" in done.output


def test_a_bundle_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    with running(datatype="UINT8") as fake:
        assert run(fake, tmp_path).exit_code == 0
        rename = Path.rename

        def full(source, target):
            if target == tmp_path / "front" and source.name == "front":
                raise OSError(28, "No space left on device")
            return rename(source, target)

        monkeypatch.setattr(Path, "rename", full)
        fake.version = "2"
        assert run(fake, tmp_path, "--replace").exit_code != 0
    assert Bundle(tmp_path / "front").card.upstream.version == "1"
    assert [each.name for each in tmp_path.iterdir()] == ["front"]


def test_check_asks_the_upstream(tmp_path):
    with running(datatype="UINT8") as fake:
        assert run(fake, tmp_path).exit_code == 0
        words = ["--model-dir", str(tmp_path), "--model", "front", "--engine", "upstream"]
        words += ["--upstream", fake.url]
        done = CliRunner().invoke(check, words)
        assert done.exit_code == 0, done.output
        assert "engine    upstream" in done.output
        fake.seed = 8
        done = CliRunner().invoke(check, words)
        assert done.exit_code == 1
        assert "golden outputs are off by" in done.output
    done = CliRunner().invoke(check, words)
    assert "upstream unavailable" in done.output


def network(shape, **more):
    return {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": shape}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 10]}],
        **more,
    }


@pytest.mark.parametrize(
    ("shape", "wishes", "found"),
    [
        ([-1, 3, 224, 224], {}, ("NCHW", (224, 224, 3), None, 32)),
        ([-1, 240, 320, 3], {}, ("NHWC", (240, 320, 3), None, 32)),
        ([1, 1, 28, 28], {}, ("NCHW", (28, 28, 1), None, 1)),
        ([-1, 28, 28], {}, ("NHWC", (28, 28, 1), [28, 28], 32)),
        ([-1, 784], {"size": (28, 28)}, ("NHWC", (28, 28, 1), [784], 32)),
        ([-1, 3, -1, -1], {"size": (32, 48)}, ("NCHW", (32, 48, 3), None, 32)),
        ([-1, 3, 5, 3], {"layout": "NHWC"}, ("NHWC", (3, 5, 3), None, 32)),
        ([-1, 3, 8, 8], {"max_batch": 4}, ("NCHW", (8, 8, 3), None, 4)),
    ],
    ids=str,
)
def test_shapes_are_read(shape, wishes, found):
    told = describe(network(shape), {}, Wishes(**wishes))
    sides = (told.shape.height, told.shape.width, told.shape.channels)
    assert (told.sent.layout, sides, told.sent.shape, told.sent.max_batch) == found
    assert told.classes == 10


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ([-1, 784], "needed: images, or --size"),
        ([-1, 3, -1, -1], "give --size"),
        ([8, 3, 8, 8], "exactly 8 images"),
        ([-1, 4, 8, 8], "1 or 3 channels"),
        ([-1], "allowed: a batch of images"),
        ([-1, 3, 8, 8, 8], "needed: images"),
    ],
    ids=str,
)
def test_shapes_that_hold_no_images_are_refused(shape, said):
    with pytest.raises(ConfigError, match=said):
        describe(network(shape), {}, Wishes())


def test_of_several_inputs_and_outputs_one_must_be_named():
    two = network([-1, 3, 8, 8])
    two["inputs"].append({"name": "mask", "datatype": "FP32", "shape": [-1, 1, 8, 8]})
    with pytest.raises(ConfigError, match="several inputs, choose one with --input: x FP32"):
        describe(two, {}, Wishes())
    assert describe(two, {}, Wishes(input="x")).sent.input == "x"
