import json

import pytest

from app.system.installation import install_command, versions

EDITABLE = {"url": "file:///home/a%20b/scumble", "dir_info": {"editable": True}}
FOLDER = {"url": "file:///home/a%20b/scumble", "dir_info": {}}


@pytest.mark.parametrize(
    ("direct_url", "command"),
    [
        ("", "pip install 'scumble[train]'"),
        (json.dumps(FOLDER), "pip install 'scumble[train]'"),
        (json.dumps(EDITABLE), "pip install --editable '/home/a b/scumble[train]'"),
    ],
    ids=["index", "folder", "clone"],
)
def test_the_command_matches_the_installation(direct_url, command):
    assert install_command("train", direct_url) == command


def test_a_distribution_that_is_missing_has_no_version():
    found = versions(("numpy", "no-such-distribution"))
    assert found["no-such-distribution"] == "not installed"
    assert found["numpy"][0].isdigit()
