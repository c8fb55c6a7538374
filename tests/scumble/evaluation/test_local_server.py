"""Servers as child processes: what they are given is all that they get."""

import os

import httpx2
import numpy as np
import pytest

from scumble.evaluation.local_server import serving, without_settings
from tests.pictures import PNG


def test_no_spelling_of_a_setting_is_handed_on():
    environ = {"SCUMBLE_DEFENSE": "dcp", "scumble_model": "x", "Scumble_Port": "1", "PATH": "/bin"}
    assert without_settings(environ) == {"PATH": "/bin"}


@pytest.mark.server
def test_a_child_gets_exactly_the_settings_that_it_is_given(models, monkeypatch):
    """A reader of the README has exported a defense, and starts what is called undefended."""
    given = {"model_dir": models, "model": "tiny", "workers": 1}
    exported = {
        "SCUMBLE_DEFENSE": "label",
        "SCUMBLE_PRECISION": "int8",
        "scumble_engine": "onnxruntime",
        "SCUMBLE_KEYS_FILE": "/nowhere",
        "SCUMBLE_NO_SUCH_SETTING": "stops a start",
    }
    answers = []
    for environ in ({}, exported):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        with serving(**given) as server:
            answer = httpx2.post(
                f"{server.url}/v1/predict",
                content=PNG,
                headers={"Content-Type": "image/png"},
                trust_env=False,
            )
            assert answer.status_code == 200, answer.text
            answers.append(answer.json()["predictions"][0]["probabilities"])
    assert all(os.environ[name] == value for name, value in exported.items())
    np.testing.assert_array_equal(answers[0], answers[1])
    assert max(answers[1]) < 1, "not the label alone"
