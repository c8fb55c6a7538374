from app.access.keys import Key, KeyFile, write_keys
from app.admin.api_description import OPENAPI_FILE, leave_description
from app.admin.console.facts import client_policies


def key(name, number, **fields):
    return Key(
        id=f"{number:08x}",
        sha256=f"{number:064x}",
        client=name,
        created="2026-01-01T00:00:00+00:00",
        **fields,
    )


def test_each_client_has_the_policies_of_its_valid_keys(tmp_path):
    path = tmp_path / "keys.json"
    keys = (
        key("acme", 1, defense="dcp", defense_params={"beta": 1.2}),
        key("acme", 2, defense="label", output={"form": "label"}),
        key("acme", 3, defense="none", revoked="2026-01-02T00:00:00+00:00"),
        key("plain", 4),
    )
    write_keys(path, KeyFile(keys=keys))
    assert client_policies(path) == {
        "acme": ["dcp (beta 1.2)", "label, label"],
        "plain": ["as served"],
    }


def test_a_file_of_keys_that_cannot_be_read_shows_no_policies(tmp_path):
    assert client_policies(tmp_path / "none.json") == client_policies(None) == {}


def test_the_first_worker_leaves_the_description(tmp_path):
    leave_description(tmp_path, lambda: {"openapi": "3.1.0"})
    leave_description(tmp_path, lambda: {"openapi": "another worker's"})
    assert (tmp_path / OPENAPI_FILE).read_bytes() == b'{"openapi":"3.1.0"}'
    assert [path.name for path in tmp_path.iterdir()] == [OPENAPI_FILE]
