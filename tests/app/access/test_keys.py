"""The file of keys and `scumble keys`: hashed, replaced in one step, checked before it counts."""

import json
import re
import resource
import stat
import threading
from datetime import UTC, datetime

import pytest
from click.testing import CliRunner

from app.access.keys import (
    Key,
    KeyFile,
    add_key,
    digest,
    new_key,
    read_keys,
    revoke_key,
    write_keys,
)
from app.access.policies import Policies
from app.errors import ConfigError
from app.settings import load_settings
from scumble.cli import main
from scumble.defenses.none import NoDefense

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def record(key: str = "k", **changes) -> Key:
    plain = {
        "id": "one",
        "sha256": digest(key.encode()).hex(),
        "client": "acme",
        "created": "2026-01-01T00:00:00+00:00",
    }
    return Key.model_validate(plain | changes)


def run(*arguments, **environment):
    return CliRunner().invoke(main, ["keys", *map(str, arguments)], env=environment)


def test_a_key_has_256_random_bits():
    assert new_key(bytes) == "scumble_" + "A" * 43
    assert new_key() != new_key()


def test_the_file_is_its_owners_and_holds_no_key(tmp_path):
    path = tmp_path / "keys.json"
    done = run("add", "--file", path, "--client", "acme")
    assert done.exit_code == 0, done.output
    (key,) = re.findall("scumble_[A-Za-z0-9_-]{43}", done.output)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key not in path.read_text()
    assert read_keys(path).keys[0].sha256 == digest(key.encode()).hex()
    assert [p.name for p in tmp_path.iterdir()] == ["keys.json"]


def test_all_options_reach_the_file_and_the_list_but_no_hash(tmp_path):
    path = tmp_path / "keys.json"
    options = [
        *("--client", "acme", "--defense", "dcp", "--output", "top_k", "--k", "3"),
        *("--window-images", "100", "--window-s", "60", "--total-images", "5000"),
        *("--window-clean", "70", "--total-clean", "900"),
        *("--on-store-failure", "open", "--route", "/v1/predict"),
    ]
    done = run("add", *options, "--defense-params", '{"beta": 1.2}', SCUMBLE_KEYS_FILE=str(path))
    assert done.exit_code == 0, done.output
    (key,) = read_keys(path).keys
    assert (key.defense, key.defense_params) == ("dcp", {"beta": 1.2})
    assert key.output.model_dump() == {"form": "top_k", "k": 3, "decimals": None}
    assert key.limits.model_dump() == {
        "window_images": 100,
        "window_s": 60,
        "total_images": 5000,
        "window_clean": 70,
        "total_clean": 900,
    }
    assert (key.on_store_failure, key.routes) == ("open", ("/v1/predict",))
    listed = run("list", "--file", path).output
    for word in (
        key.id,
        "acme",
        "dcp",
        "top_k 3",
        "100 images in 60 s",
        "5000 images",
        "70 answers in 60 s",
        "/v1",
    ):
        assert word in listed
    assert key.sha256 not in listed


def test_a_revoked_key_stays_and_is_revoked_once(tmp_path):
    path = tmp_path / "keys.json"
    add_key(path, record())
    assert revoke_key(path, "one", NOW).revoked == "2026-01-02T03:04:05+00:00"
    again = revoke_key(path, "one", datetime(2027, 1, 1, tzinfo=UTC))
    assert again.revoked == "2026-01-02T03:04:05+00:00"
    assert read_keys(path).keys == (again,)
    assert run("revoke", "--file", path, "two").exit_code == 1


def test_keys_added_at_once_are_all_there(tmp_path):
    path = tmp_path / "keys.json"
    threads = [
        threading.Thread(target=add_key, args=(path, record(str(n), id=f"k{n}"))) for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.id for key in read_keys(path).keys} == {f"k{n}" for n in range(20)}


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "keys.json"
    add_key(path, record())
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_keys(path, KeyFile())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["keys.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--client", "a b"], "client"),
        (["--client", "a", "--defense", "magic"], "unknown defense 'magic'"),
        (["--client", "a", "--defense", "dcp"], "dcp needs the parameter 'beta'"),
        (["--client", "a", "--defense-params", "{"], "--defense-params is"),
        (["--client", "a", "--defense-params", '{"beta": 1}'], "without a defense"),
        (["--client", "a", "--defense-params", '{"n": 100000000000000000000}'], "64 bits"),
        (["--client", "a", "--defense-params", '{"n": NaN}'], "finite"),
        (["--client", "a", "--defense-params", "9" * 5000], "--defense-params is"),
        (["--client", "a", "--defense-params", "[" * 200_000], "--defense-params is"),
        (["--client", "a", "--output", "top_k"], "top_k needs k"),
        (["--client", "a", "--k", "3"], "full takes no k"),
        (["--client", "a", "--output", "rounded", "--decimals", "9"], "--decimals is 9"),
        (["--client", "a", "--window-s", "0"], "--window-s is 0; allowed: at least 1"),
        (["--client", "a", "--total-images", "-1"], "--total-images is -1; allowed: at"),
        (["--client", "a", "--route", "v1"], "--route is 'v1'; allowed: text"),
    ],
)
def test_what_a_server_would_refuse_is_not_added(tmp_path, models, arguments, message):
    path = tmp_path / "keys.json"
    done = run(
        "add",
        "--file",
        path,
        *arguments,
        SCUMBLE_MODEL_DIR=str(models),
        SCUMBLE_MODEL="tiny",
    )
    assert done.exit_code == 1
    assert message in done.output
    assert not path.exists()


def test_a_key_that_contradicts_one_of_the_same_client_is_not_added(tmp_path):
    path = tmp_path / "keys.json"
    add_key(path, record(limits={"total_images": 5}))
    before = path.read_bytes()
    done = run("add", "--file", path, "--client", "acme", "--total-images", "6")
    assert done.exit_code == 1
    assert re.search("keys 'one' and '[0-9a-f]{8}' of client 'acme'", done.output)
    assert path.read_bytes() == before
    # A file that contradicts itself can still be read, and mended.
    rows = [record(limits={"total_images": 5}), record("l", id="two", limits={"total_images": 6})]
    write_keys(path, KeyFile(keys=rows))
    assert run("list", "--file", path).exit_code == 0
    assert run("revoke", "--file", path, "two").exit_code == 0
    assert run("add", "--file", path, "--client", "acme", "--total-images", "5").exit_code == 0


def test_no_file_is_named():
    assert "use --file or set SCUMBLE_KEYS_FILE" in run("list").output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Invalid JSON"),
        ("[]", "object"),
        ('{"version": 2}', "version"),
        ('{"keys": [{}]}', "keys.0.id"),
        ('{"keyz": []}', "keyz"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path, text, message):
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_keys(path)


UNPORTABLE = {
    "integer beyond 64 bits": ('{"decimals": 100000000000000000000}', "64 bits"),
    "negative integer beyond 64 bits": ('{"a": [{"b": -9223372036854775809}]}', "64 bits"),
    "infinity": ('{"beta": 1e400}', "finite"),
    "not a number": ('{"beta": NaN}', "finite"),
    "too deep": ('{"a": ' + "[" * 16 + "]" * 16 + "}", "nested more than 16 deep"),
    "far too deep": ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "recursion limit"),
}


@pytest.mark.parametrize("which", UNPORTABLE)
def test_parameters_that_json_cannot_carry_are_a_sentence(tmp_path, which):
    """Serialising them again used to raise an unexpected exception."""
    params, message = UNPORTABLE[which]
    path = tmp_path / "keys.json"
    plain = record(defense="round", defense_params={"decimals": 2}).model_dump_json()
    path.write_text('{"keys": [' + plain.replace('{"decimals":2}', params) + "]}")
    with pytest.raises(ConfigError, match=message):
        read_keys(path)


@pytest.mark.parametrize("which", UNPORTABLE)
def test_the_servers_own_parameters_are_checked_alike(monkeypatch, which):
    monkeypatch.setenv("SCUMBLE_DEFENSE_PARAMS", UNPORTABLE[which][0])
    with pytest.raises(ConfigError, match=r"SCUMBLE_DEFENSE_PARAMS|defense_params|recursion"):
        load_settings()


def test_a_failure_of_any_kind_leaves_the_built_defenses():
    default = NoDefense()
    made = []

    def configure(name, params):
        if name == "broken":
            raise TypeError("not foreseen")
        made.append(name)
        return NoDefense()

    policies = Policies(configure, server=("none", {}), default=default)
    good = record(defense="round")
    grants = policies(KeyFile(keys=(good,)))
    with pytest.raises(TypeError):
        policies(KeyFile(keys=(record("x", id="x", defense="other"), record(defense="broken"))))
    again = policies(KeyFile(keys=(good,)))
    built = bytes.fromhex(good.sha256)
    assert again[built].defense is grants[built].defense
    assert made == ["round", "other"]


@pytest.mark.parametrize("field", ["id", "sha256"])
def test_doubles_are_refused(tmp_path, field):
    path = tmp_path / "keys.json"
    keys = [record("a", id="a"), record("b", id="b")]
    rows = [key.model_dump() for key in keys]
    rows[1][field] = rows[0][field]
    path.write_text(json.dumps({"keys": rows}))
    with pytest.raises(ConfigError, match=f"two keys have the same {field}"):
        read_keys(path)
