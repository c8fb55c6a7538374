"""What every test gets: no settings from outside, a tiny model, clients and real servers."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from scumble.evaluation.local_server import Server, serving
from tests.tiny import make_bundle

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")

ROOT = Path(__file__).parent.parent
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
DATA = ROOT.parent / "shared" / "data"


def pytest_configure():
    # A shell that starts the suite in the background has it ignore Ctrl-C, and its children, too.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    # Files with servers or training take longest. They run first, so that no core is left idle at
    # the end (`--dist loadfile --no-loadscope-reorder`).
    long = {item.path for item in items if any(map(item.get_closest_marker, ("server", "torch")))}
    long |= {item.path for item in items if item.path.parent.name == "attacker"}
    items.sort(key=lambda item: item.path not in long)
    if DATA.is_dir():
        return
    for item in items:
        if item.get_closest_marker("data"):
            item.add_marker(pytest.mark.skip(reason=f"the image sets are not at {DATA}"))


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    for name in os.environ:
        if name.upper().startswith("SCUMBLE_") or name.lower() in PROXIES:
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A model folder with the bundle `tiny`."""
    folder = tmp_path_factory.mktemp("models")
    make_bundle(folder)
    return folder


@pytest.fixture
def own_models(models, tmp_path) -> Path:
    """A copy of the model folder that a test may damage."""
    return Path(shutil.copytree(models, tmp_path / "models"))


@pytest.fixture
def make_client(models):
    """`make_client(**settings)` -> a client of an application in this process."""
    with ExitStack() as stack:

        def make(**overrides) -> TestClient:
            app = create_app(Settings(**{"model_dir": models, "model": "tiny", **overrides}))
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield make


@pytest.fixture
def client(make_client) -> TestClient:
    return make_client()


@pytest.fixture
def serve(models) -> Iterator:
    """`serve(**settings)` -> a real server, its workers and its ports."""
    with ExitStack() as stack:

        def start(**overrides) -> Server:
            return stack.enter_context(
                serving(**{"model_dir": models, "model": "tiny", **overrides})
            )

        yield start
