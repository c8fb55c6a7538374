"""All settings, from `SCUMBLE_*` variables and an optional TOML file.

Precedence: arguments, environment, the TOML file named by `SCUMBLE_CONFIG`, defaults. An unknown
`SCUMBLE_*` variable is an error: `SCUMBLE_DEFENCE=dcp` must never start an undefended server.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import secrets
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from app.errors import ConfigError
from app.precision import Precision
from app.system.cores import available_cores
from app.system.json_values import Parameters, parse
from app.system.urls import HIDDEN, masked, redacted, split
from app.system.validation import allowed

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

PREFIX = "SCUMBLE_"
# As browsers send it: lower case, without a trailing slash.
ORIGIN = r"^(\*|[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?)$"
NESTED = "__"
STORE_SCHEMES = frozenset({"memory", "sqlite", "redis", "rediss", "unix"})
STORES = "allowed: memory://, sqlite:///PATH, redis://HOST:PORT/DB"
COLLECTORS = "allowed: http://HOST:PORT and https://HOST:PORT, without a query"
MODEL_PATH = r"(/[^/]+)*/v2/models/[^/]+(/versions/[^/]+)?/?"
BASE_PATH = r"(/[^/]+)*/?"
UPSTREAMS = (
    "allowed: http://HOST:PORT/v2/models/NAME or https://, optionally /versions/VERSION, several "
    "with commas or spaces between; with SCUMBLE_UPSTREAM_TEMPLATE, http://HOST:PORT; "
    "SCUMBLE_UPSTREAM_TOKEN has the token"
)
# Part of a path: a name of dots alone would lead elsewhere.
ModelName = Annotated[str, Field(pattern=r"^\.*[A-Za-z0-9_-][A-Za-z0-9_.-]*$", max_length=128)]
URLS = frozenset({"store", "otel_endpoint"})  # settings that may contain a password
SECRETS = frozenset({"secret", "upstream_token"})


class Section(BaseModel):
    """A nested group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BatchSettings(Section):
    """Micro-batching, per worker."""

    max_size: int = Field(default=32, ge=1, le=1024, description="images per call of the engine")
    max_wait_us: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="how long a busy worker waits for more images, in microseconds",
    )
    target_p99_ms: float = Field(
        default=0.0,
        ge=0,
        le=60_000,
        description="limit batch sizes to meet this latency; 0: no limit",
    )
    execution: Literal["auto", "inline", "thread"] = Field(
        default="auto",
        description="engine on the event loop or on a thread; auto decides at warm-up",
    )


class LimitSettings(Section):
    """Limits that are checked before anything is decoded."""

    max_body_bytes: int = Field(default=10 * 2**20, ge=1, description="bytes of a request body")
    max_images: int = Field(default=32, ge=1, le=1024, description="encoded images per request")
    max_tensor_images: int = Field(
        default=1024, ge=1, description="images of a tensor request, if the body has room"
    )
    max_pixels: int = Field(
        default=4_000_000, ge=1, description="width x height that is decoded of an image"
    )
    max_jpeg_pixels: int = Field(
        default=25_000_000,
        ge=1,
        description="width x height of a JPEG that is decoded at a reduced size, if more than that",
    )
    max_request_pixels: int = Field(
        default=8_000_000, ge=1, description="decoded, of all images of a request together"
    )
    max_decode_bytes: int = Field(
        default=64 * 2**20,
        ge=1,
        description="bytes of encoded images waiting for decoding per worker; more get 503",
    )
    max_queue: int = Field(
        default=4096, ge=1, description="images waiting per worker; more get 503"
    )
    deadline_ms: float = Field(
        default=0.0,
        ge=0,
        le=3_600_000,
        description="a request that waits longer for inference gets 504; 0: no limit",
    )


class HttpSettings(Section):
    """Limits on the time and memory that connections take."""

    header_timeout_s: float = Field(
        default=10.0, gt=0, le=3600, description="for the headers of a request to arrive"
    )
    body_timeout_s: float = Field(
        default=60.0, gt=0, le=3600, description="for a whole request to arrive"
    )
    write_timeout_s: float = Field(
        default=30.0, gt=0, le=3600, description="for the client to read pending data"
    )
    keep_alive_s: int = Field(
        default=5, ge=1, le=3600, description="an idle connection is closed after this"
    )
    max_headers: int = Field(default=100, ge=1, le=10_000, description="headers of a request")
    max_header_bytes: int = Field(
        default=16_384, ge=256, le=2**20, description="bytes of path and headers together"
    )
    max_bodies_bytes: int = Field(
        default=128 * 2**20,
        ge=1,
        description="bytes of all request bodies in a worker; more get 503",
    )
    max_connections: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="open connections of a worker; unset: 4096, or what open files allow",
    )


class BudgetSettings(Section):
    """Budgets of all clients together; API keys have their own in addition."""

    window_images: int | None = Field(
        default=None, ge=0, description="images of all clients in a window"
    )
    window_s: int = Field(default=3600, ge=1, le=366 * 86400, description="seconds of that window")
    total_images: int | None = Field(
        default=None, ge=0, description="images of all clients in total"
    )
    window_clean: int | None = Field(
        default=None, ge=0, description="answers to all clients in that window, withheld ones apart"
    )
    total_clean: int | None = Field(
        default=None, ge=0, description="answers to all clients in total, withheld ones apart"
    )


def collector(url: str) -> str:
    """Check the URL of a trace collector and return it.

    Raises:
        ValueError: not a usable URL; the message contains no part of it.
    """
    if "://" not in url:
        raise ValueError(COLLECTORS)
    parts = split(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(COLLECTORS)
    return url


class PassedModel(Section):
    """A model of the upstream whose V2 requests are passed through."""

    output: str = Field(default="", max_length=256, description="name of its output")
    answers: Literal["probabilities", "logits"] = Field(
        default="probabilities", description="what that output is"
    )
    defense: str = Field(default="", description="of that output")
    defense_params: Parameters = Field(default={}, description="its parameters, a JSON object")


def store_url(url: str) -> str:
    """Check the URL of a budget store and return it.

    Raises:
        ValueError: it is invalid; the message contains no part of it.
    """
    if "://" not in url:
        raise ValueError(STORES)
    parts = split(url)
    bare = not (parts.netloc or parts.path or parts.query or parts.fragment)
    if parts.scheme not in STORE_SCHEMES or (parts.scheme == "memory" and not bare):
        raise ValueError(STORES)
    return url


def upstream_urls(text: str, info: ValidationInfo) -> str:
    """Check the URLs of a model on one or more servers; return them with a space between.

    They are of a V2 model, or with a template of the servers.

    Raises:
        ValueError: one is not such a URL; the message contains no part of it.
    """
    urls = text.replace(",", " ").split()
    path = MODEL_PATH if info.data.get("upstream_template") is None else BASE_PATH
    for url in urls:
        parts = split(url) if "://" in url else None
        if (
            parts is None
            or parts.scheme not in ("http", "https")
            or not parts.hostname
            or "@" in parts.netloc
            or parts.query
            or parts.fragment
            or not re.fullmatch(path, parts.path)
        ):
            raise ValueError(UPSTREAMS)
    return " ".join(url.rstrip("/") for url in urls)


def default_model_dir() -> Path:
    """`models/` beside the package in a checkout, inside the package in an installed wheel."""
    package = Path(__file__).parent
    inside = package / "models"
    return inside if inside.is_dir() else package.parent / "models"


class Settings(BaseSettings):
    """What to serve, how, and where."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter=NESTED, frozen=True, extra="forbid"
    )

    host: str = Field(default="127.0.0.1", description="public address")
    port: int = Field(default=8000, ge=0, le=65535, description="public port; 0 for a free one")
    uds: Path | None = Field(default=None, description="Unix socket, instead of host and port")
    root_path: Annotated[str, Field(pattern=r"^((/[A-Za-z0-9._~-]+)+)?$")] | None = Field(
        default=None, description="path prefix behind a proxy, such as /scumble"
    )
    cors_origins: list[Annotated[str, Field(pattern=ORIGIN)]] = Field(
        default=[],
        description="origins of web pages that may send requests, a JSON list; * for any",
    )
    admin_host: str = Field(default="127.0.0.1", description="address of metrics and health")
    admin_port: int = Field(
        default=9000, ge=0, le=65535, description="admin port; 0 for a free one"
    )
    admin_hosts: list[str] = Field(default=[], description="host names of the console, a JSON list")
    console: bool = Field(default=True, description="the operator console on the admin port")
    workers: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        default="auto", description="processes; auto is one per core"
    )
    threads: int = Field(default=1, ge=1, le=256, description="engine threads of each worker")
    model_dir: Path = Field(default_factory=default_model_dir, description="folder of bundles")
    model: str = Field(default="mnist", description="bundle to serve")
    precision: Precision = Field(
        default="float32", description="float32, bf16 (openvino only) or int8"
    )
    engine: Literal["auto", "openvino", "onnxruntime", "torch", "upstream"] = Field(
        default="auto",
        description="auto selects the first that is installed; upstream asks another server",
    )
    upstream_template: Path | None = Field(
        default=None, description="TOML file that describes the JSON API of upstream servers"
    )
    upstream: Annotated[str, AfterValidator(upstream_urls)] = Field(
        default="",
        repr=False,
        description="URLs of the model on V2 servers, http://HOST:PORT/v2/models/NAME, or of the "
        "servers that the template describes",
    )
    upstream_token: SecretStr | None = Field(
        default=None, description="bearer token that is sent to them"
    )
    upstream_ca: Path | None = Field(
        default=None, description="certificates that theirs must be signed by, PEM"
    )
    upstream_timeout_s: float = Field(
        default=10.0, gt=0, le=3600, description="for a batch to be answered by them"
    )
    upstream_concurrency: int = Field(
        default=4, ge=1, le=256, description="batches that a worker has in flight to them"
    )
    upstream_check_s: float = Field(
        default=30.0,
        ge=1,
        le=86400,
        description="seconds between two comparisons with the golden outputs",
    )
    upstream_models: dict[ModelName, PassedModel] = Field(
        default={},
        description="models there whose V2 requests are passed through, a JSON object by name",
    )
    tensor_input: bool = Field(
        default=True, description="accept float tensors (FP32, FP16, BF16), not only 8-bit pixels"
    )
    defense: str = Field(default="none", description="name of the defense")
    defense_params: Parameters = Field(default={}, description="its parameters, a JSON object")
    secret: SecretStr = Field(
        default_factory=lambda: SecretStr(secrets.token_hex(32)),
        min_length=16,
        description="key of randomized defenses; replicas must share it",
    )
    batch: BatchSettings = BatchSettings()
    limits: LimitSettings = LimitSettings()
    http: HttpSettings = HttpSettings()
    keys_file: Path | None = Field(
        default=None,
        description="file of API keys (scumble keys); without it, authentication is off",
    )
    keys_on_failure: Literal["open", "closed"] = Field(
        default="open",
        description="while that file cannot be read: keep the current keys, or refuse with 503",
    )
    reload_failure_s: float = Field(
        default=60.0,
        ge=1,
        le=366 * 86400,
        description="how long keys or certificate may fail to reload before this is reported",
    )
    store: Annotated[str, AfterValidator(store_url)] = Field(
        default="memory://",
        repr=False,
        description="where budgets are counted: memory://, sqlite:///PATH or redis://HOST:PORT/DB",
    )
    budget: BudgetSettings = BudgetSettings()
    tls_cert: Path | None = Field(
        default=None, description="certificate of the public port, PEM; without it, plain HTTP"
    )
    tls_key: Path | None = Field(default=None, description="its key, PEM without a password")
    tls_handshake_timeout_s: float = Field(
        default=10.0, gt=0, le=600, description="time limit of the TLS handshake"
    )
    audit_file: Path | None = Field(
        default=None, description="audit log; each worker writes FILE.worker-N (scumble audit)"
    )
    audit_fsync: Literal["always", "everysec", "never"] = Field(
        default="everysec", description="when lines are flushed to disk"
    )
    audit_on_failure: Literal["open", "closed"] = Field(
        default="open", description="while it cannot be written: serve, or refuse with 503"
    )
    drain_delay_s: float = Field(
        default=0.0,
        ge=0,
        le=600,
        description="seconds of not being ready before the listener closes",
    )
    shutdown_timeout_s: float = Field(
        default=10.0, gt=0, le=600, description="how long open requests may take after that"
    )
    watchdog_s: float = Field(
        default=30.0,
        ge=0,
        le=3600,
        description="a worker whose inference takes longer is replaced; 0: never",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="minimum level of log lines on stderr"
    )
    log_format: Literal["auto", "text", "json"] = Field(
        default="auto", description="form of log lines; auto is text on a terminal, else JSON"
    )
    otel_endpoint: Annotated[str, AfterValidator(collector)] | None = Field(
        default=None,
        repr=False,
        description="OpenTelemetry collector, http://HOST:4318; needs the extra otel",
    )
    access_log: bool = Field(False, description="one log line per request")

    @field_validator("root_path")
    @classmethod
    def _no_route(cls, value: str | None) -> str | None:
        if value is not None and value.split("/")[1:2] in (["v1"], ["v2"]):
            raise ValueError(
                "a path that does not begin with /v1 or /v2, which are routes of the service"
            )
        return value

    @property
    def bodies_bytes(self) -> int:
        """`http.max_bodies_bytes`, or more if two bodies of the largest allowed size need it."""
        return max(self.http.max_bodies_bytes, 2 * self.limits.max_body_bytes)

    @property
    def upstream_list(self) -> list[str]:
        """The URLs of `upstream`."""
        return self.upstream.split()

    @property
    def worker_count(self) -> int:
        """`workers`, with auto resolved to the cores that this process may use."""
        return available_cores() if self.workers == "auto" else self.workers

    @property
    def batch_limit_s(self) -> float:
        """Seconds that a batch may take at start: a quarter of `watchdog_s`, or unlimited."""
        return self.watchdog_s / 4 or math.inf

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, environment, then the TOML file."""
        del env_settings, dotenv_settings, file_secret_settings
        file = os.environ.get(f"{PREFIX}CONFIG")
        toml = [InitSettingsSource(settings_cls, read_file(file))] if file else []
        return (init_settings, Environment(settings_cls), *toml)


class Environment(EnvSettingsSource):
    """The environment, with an error that names the variable whose JSON is malformed."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Parse the JSON of a variable.

        Raises:
            ConfigError: it is malformed.
        """
        del field
        return parse(PREFIX + field_name.upper(), value)


def read_file(file: str) -> dict[str, Any]:
    """Read a TOML file of settings.

    Raises:
        ConfigError: the file cannot be read, is not valid TOML, or has an unknown setting.
    """
    try:
        found = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as exc:
        reason = (exc.strerror or str(exc)).lower()
        raise ConfigError(f"{PREFIX}CONFIG is {file!r}: {reason}") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{PREFIX}CONFIG is {file!r}, which is not valid TOML: {exc}") from exc
    known = [variable.removeprefix(PREFIX).lower() for variable, _ in _fields(Settings, PREFIX)]
    dotted = [name.replace(NESTED, ".") for name in known]
    for name in _unknown_names(found, Settings):
        raise ConfigError(f"{file}: {_unknown(name, dotted)}")
    return found


def _unknown_names(
    table: Mapping[str, Any], model: type[BaseModel], prefix: str = ""
) -> Iterable[str]:
    """Names in `table` that no setting of `model` has."""
    for key, value in table.items():
        field = model.model_fields.get(key)
        kind = field and field.annotation
        if field is None:
            yield prefix + key
        elif isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, Section):
            yield from _unknown_names(value, kind, f"{key}.")


def load_settings(**overrides: Any) -> Settings:
    """Load settings from arguments, environment and file.

    Raises:
        ConfigError: an unknown variable, a value that is not allowed, or an unreadable file.
    """
    refuse_unknown(os.environ)
    try:
        return Settings(**overrides)
    except ValidationError as exc:
        found = defaultdict(list)
        for error in exc.errors():
            found[_variable(error["loc"])].append(error)
        raise ConfigError("; ".join(_sentence(*item) for item in found.items())) from exc


def variables() -> dict[str, str]:
    """All variables, with their descriptions."""
    return {
        f"{PREFIX}CONFIG": "path of a TOML file with settings",
        **dict(_fields(Settings, PREFIX)),
    }


def shown(settings: Settings, variable: str) -> str:
    """The resolved value of one of `variables()`, with secrets masked."""
    if variable == f"{PREFIX}CONFIG":
        return os.environ.get(variable, "")
    value: Any = settings
    for part in variable.removeprefix(PREFIX).lower().split(NESTED):
        value = getattr(value, part)
    if variable.removeprefix(PREFIX).lower() in URLS and value is not None:
        return redacted(value)
    if isinstance(value, dict | list):
        return json.dumps(value, default=lambda model: model.model_dump(exclude_defaults=True))
    return str(value)


def changed(settings: Settings) -> list[str]:
    """Those of `variables()` that do not have their default, in order."""
    plain = Settings.model_construct()  # without reading the environment again
    given = {
        f"{PREFIX}CONFIG": f"{PREFIX}CONFIG" in os.environ,
        f"{PREFIX}SECRET": "secret" in settings.model_fields_set,
    }
    return [
        name for name in variables() if given.get(name, shown(settings, name) != shown(plain, name))
    ]


def refuse_unknown(environ: Mapping[str, str]) -> None:
    """Refuse unknown variables with our prefix.

    Raises:
        ConfigError: names the variable and the closest known one.
    """
    known = variables()
    sections = {name.rpartition(NESTED)[0] for name in known if NESTED in name}
    for name in environ:
        if name.upper().startswith(PREFIX) and name.upper() not in known.keys() | sections:
            raise ConfigError(_unknown(name, known))


def _unknown(name: str, known: Iterable[str]) -> str:
    """A sentence about a setting that does not exist."""
    alike = name.upper() if name.upper().startswith(PREFIX) else name
    close = difflib.get_close_matches(alike, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"unknown setting {name}{hint} (scumble check --all lists all settings)"


def _fields(model: type[BaseModel], prefix: str) -> Iterable[tuple[str, str]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from _fields(kind, f"{prefix}{name.upper()}{NESTED}")
        else:
            yield f"{prefix}{name.upper()}", field.description or ""


def _variable(place: tuple[int | str, ...]) -> str:
    """The variable of a setting, without the parts of its value."""
    words = [str(part) for part in place]
    depth = 1
    field = Settings.model_fields.get(words[0])
    if field and isinstance(field.annotation, type) and issubclass(field.annotation, Section):
        depth = 2
    return PREFIX + NESTED.join(words[:depth]).upper()


def _sentence(variable: str, errors: list[ErrorDetails]) -> str:
    """One sentence about a setting: its value, and what is allowed."""
    name, value = errors[0]["loc"][0], errors[0]["input"]
    if name in URLS and isinstance(value, str):
        value = redacted(value)
    elif name == "upstream":
        value = HIDDEN if any(each in str(value) for each in "@?#") else value
    elif name in SECRETS or (name in URLS and masked(str(value)) == HIDDEN):
        value = HIDDEN
    if errors[0]["type"] == "extra_forbidden":
        return _unknown(variable, variables())
    return f"{variable} is {value!r}; allowed: {allowed(errors)}"
