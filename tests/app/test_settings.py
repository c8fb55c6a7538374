import pytest

from app.errors import ConfigError
from app.settings import Settings, load_settings, variables


def test_environment_nested_and_json(monkeypatch):
    monkeypatch.setenv("SCUMBLE_DEFENSE", "dcp")
    monkeypatch.setenv("SCUMBLE_DEFENSE_PARAMS", '{"beta": 1.2, "gamma": 0.2}')
    monkeypatch.setenv("SCUMBLE_BATCH__MAX_SIZE", "8")
    settings = load_settings()
    assert settings.defense == "dcp"
    assert settings.defense_params == {"beta": 1.2, "gamma": 0.2}
    assert settings.batch.max_size == 8


def test_arguments_win_over_environment_over_file(monkeypatch, tmp_path):
    file = tmp_path / "scumble.toml"
    file.write_text('model = "file"\nport = 1\nadmin_port = 1\n[limits]\nmax_images = 3\n')
    monkeypatch.setenv("SCUMBLE_CONFIG", str(file))
    monkeypatch.setenv("SCUMBLE_PORT", "2")
    monkeypatch.setenv("SCUMBLE_ADMIN_PORT", "2")
    settings = load_settings(admin_port=3)
    assert (settings.model, settings.port, settings.admin_port) == ("file", 2, 3)
    assert settings.limits.max_images == 3


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("SCUMBLE_DEFENCE", "SCUMBLE_DEFENSE"),
        ("scumble_modell", "SCUMBLE_MODEL"),
        ("SCUMBLE_BATCH__MAXSIZE", "SCUMBLE_BATCH__MAX_SIZE"),
        ("SCUMBLE_LIMITS__MAX_IMAGE", "SCUMBLE_LIMITS__MAX_IMAGES"),
    ],
)
def test_unknown_variable_stops_the_start(monkeypatch, name, close):
    monkeypatch.setenv(name, "dcp")
    with pytest.raises(ConfigError, match=f"unknown setting {name}; did you mean {close}"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SCUMBLE_PORT", "ninety", "SCUMBLE_PORT is 'ninety'"),
        ("SCUMBLE_PORT", "70000", "SCUMBLE_PORT is '70000'"),
        ("SCUMBLE_WORKERS", "many", "SCUMBLE_WORKERS"),
        ("SCUMBLE_WORKERS", "0", "SCUMBLE_WORKERS"),
        ("SCUMBLE_PRECISION", "int4", "SCUMBLE_PRECISION is 'int4'"),
        ("SCUMBLE_DEFENSE_PARAMS", "{beta: 1}", "defense_params"),
        ("SCUMBLE_DEFENSE_PARAMS", "[1]", "SCUMBLE_DEFENSE_PARAMS"),
        ("SCUMBLE_BATCH__MAX_SIZE", "0", "SCUMBLE_BATCH__MAX_SIZE is '0'"),
        ("SCUMBLE_CONFIG", "/nowhere.toml", "SCUMBLE_CONFIG is '/nowhere.toml'"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        load_settings()


def test_unknown_key_in_the_file_is_refused(monkeypatch, tmp_path):
    file = tmp_path / "scumble.toml"
    file.write_text('defence = "dcp"\n')
    monkeypatch.setenv("SCUMBLE_CONFIG", str(file))
    with pytest.raises(ConfigError, match="SCUMBLE_DEFENCE"):
        load_settings()


def test_malformed_file_is_refused(monkeypatch, tmp_path):
    file = tmp_path / "scumble.toml"
    file.write_text("model = \n")
    monkeypatch.setenv("SCUMBLE_CONFIG", str(file))
    with pytest.raises(ConfigError):
        load_settings()


def test_a_short_secret_is_refused_without_showing_it(monkeypatch):
    monkeypatch.setenv("SCUMBLE_SECRET", "hunter2")
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["foo", "", "postgres://host/b", "memory:///x", "file:///b.db"])
def test_a_store_that_does_not_exist_is_refused_also_without_budgets(monkeypatch, url):
    monkeypatch.setenv("SCUMBLE_STORE", url)
    with pytest.raises(ConfigError, match=r"SCUMBLE_STORE is .*allowed: memory://, sqlite:///PATH"):
        load_settings()


def test_secret_never_prints():
    assert "0123456789abcdef" not in repr(Settings(secret="0123456789abcdef"))


def test_every_field_has_a_description():
    assert all(variables().values())


def test_workers_auto_is_the_number_of_cores():
    assert Settings(workers="auto").worker_count >= 1
    assert Settings(workers=3).worker_count == 3
