import pytest

from app.errors import ConfigError
from app.settings import Settings, changed, load_settings, variables


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
    ("name", "value", "sentence"),
    [
        ("SCUMBLE_PORT", "ninety", "SCUMBLE_PORT is 'ninety'; allowed: an integer"),
        ("SCUMBLE_PORT", "70000", "SCUMBLE_PORT is '70000'; allowed: at most 65535"),
        ("SCUMBLE_WORKERS", "many", "SCUMBLE_WORKERS is 'many'; allowed: an integer or 'auto'"),
        ("SCUMBLE_WORKERS", "0", "SCUMBLE_WORKERS is '0'; allowed: at least 1 or 'auto'"),
        (
            "SCUMBLE_PRECISION",
            "int4",
            "SCUMBLE_PRECISION is 'int4'; allowed: 'float32', 'bf16' or 'int8'",
        ),
        (
            "SCUMBLE_DEFENSE_PARAMS",
            "{beta: 1}",
            "SCUMBLE_DEFENSE_PARAMS is '{beta: 1}', which is not valid JSON: Expecting property "
            "name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        (
            "SCUMBLE_DEFENSE_PARAMS",
            "[1]",
            "SCUMBLE_DEFENSE_PARAMS is [1]; allowed: a JSON object",
        ),
        ("SCUMBLE_BATCH__MAX_SIZE", "0", "SCUMBLE_BATCH__MAX_SIZE is '0'; allowed: at least 1"),
        ("SCUMBLE_BATCH", "[3]", "SCUMBLE_BATCH is [3]; allowed: an object; in TOML, a table"),
        (
            "SCUMBLE_BATCH",
            '{"max_sise": 3}',
            "unknown setting SCUMBLE_BATCH__MAX_SISE; did you mean SCUMBLE_BATCH__MAX_SIZE? "
            "(scumble check --all lists all settings)",
        ),
        ("SCUMBLE_CONSOLE", "maybe", "SCUMBLE_CONSOLE is 'maybe'; allowed: true or false"),
        ("SCUMBLE_SECRET", "hunter2", "SCUMBLE_SECRET is '***'; allowed: at least 16 characters"),
        ("SCUMBLE_ROOT_PATH", "/v1", "SCUMBLE_ROOT_PATH is '/v1'; allowed: a path that does not "
         "begin with /v1 or /v2, which are routes of the service"),
        ("SCUMBLE_CORS_ORIGINS", '["x"]', "SCUMBLE_CORS_ORIGINS is 'x'; allowed: "),
        (
            "SCUMBLE_STORE",
            "foo",
            "SCUMBLE_STORE is 'foo'; allowed: memory://, sqlite:///PATH, redis://HOST:PORT/DB",
        ),
        (
            "SCUMBLE_UPSTREAM_MODELS",
            '{"..": {}}',
            "SCUMBLE_UPSTREAM_MODELS is '..'; allowed: ",
        ),
        (
            "SCUMBLE_OTEL_ENDPOINT",
            "localhost:4318",
            "SCUMBLE_OTEL_ENDPOINT is 'localhost:4318'; allowed: http://HOST:PORT and "
            "https://HOST:PORT, without a query",
        ),
        (
            "SCUMBLE_CONFIG",
            "/nowhere.toml",
            "SCUMBLE_CONFIG is '/nowhere.toml': no such file or directory",
        ),
        ("SCUMBLE_CONFIG", "/", "SCUMBLE_CONFIG is '/': is a directory"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_sentence_with_what_is_allowed(monkeypatch, name, value, sentence):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    message = str(caught.value)
    assert message.startswith(sentence) if sentence.endswith(": ") else message == sentence
    assert "Input should" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('defence = "dcp"\n', "unknown setting defence; did you mean defense?"),
        ("[batch]\nmax_sise = 3\n", "unknown setting batch.max_sise; did you mean batch.max_size?"),
        ("[bach]\nmax_size = 3\n", "unknown setting bach"),
        ("model = \n", "is 'scumble.toml', which is not valid TOML: Invalid value (at line 1"),
        (b"model = '\xff'\n", "is 'scumble.toml', which is not valid TOML: 'utf-8' codec"),
        ("batch = 3\n", "SCUMBLE_BATCH is 3; allowed: an object; in TOML, a table"),
        ("[batch]\nmax_size = 'x'\n", "SCUMBLE_BATCH__MAX_SIZE is 'x'; allowed: an integer"),
    ],
)
def test_a_wrong_file_is_one_sentence_with_what_is_meant(monkeypatch, tmp_path, content, sentence):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "scumble.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setenv("SCUMBLE_CONFIG", file.name)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


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


def test_what_differs_from_the_defaults(monkeypatch, tmp_path):
    assert changed(load_settings()) == []
    file = tmp_path / "scumble.toml"
    file.write_text('model = "mnist"\nsecret = "0123456789abcdef"\n[batch]\nmax_size = 8\n')
    monkeypatch.setenv("SCUMBLE_CONFIG", str(file))
    monkeypatch.setenv("SCUMBLE_PORT", "8000")
    assert changed(load_settings(workers=2)) == [
        "SCUMBLE_CONFIG",
        "SCUMBLE_WORKERS",
        "SCUMBLE_SECRET",
        "SCUMBLE_BATCH__MAX_SIZE",
    ]
