"""What the service uses of uvicorn and of multiprocessing that neither documents.

`app/http/connections.py`, `app/processes/worker.py` and `app/processes/supervisor.py` extend
uvicorn's classes, and `app/processes/worker_fork_server.py` starts multiprocessing's fork server.
`pyproject.toml` allows the releases of uvicorn that were tried. Where another one, or another
Python, differs, a test here says in what.
"""

import ast
import asyncio
import inspect
import multiprocessing.forkserver
import multiprocessing.process
import multiprocessing.resource_tracker
import sys
from pathlib import Path

import pytest
import uvicorn
from uvicorn.lifespan.on import LifespanOn
from uvicorn.protocols.http import flow_control, httptools_impl
from uvicorn.server import ServerState

APP = Path(__file__).parents[2] / "app"
UVICORN = f"uvicorn {uvicorn.__version__}"
PYTHON = f"Python {sys.version.partition(' ')[0]}"

Protocol = httptools_impl.HttpToolsProtocol
Cycle = httptools_impl.RequestResponseCycle

# What is called or replaced, with the names of its parameters.
CALLS = [
    (UVICORN, Protocol, "__init__", "self config server_state app_state _loop"),
    (UVICORN, Protocol, "connection_made", "self transport"),
    (UVICORN, Protocol, "connection_lost", "self exc"),
    (UVICORN, Protocol, "data_received", "self data"),
    (UVICORN, Protocol, "eof_received", "self"),
    (UVICORN, Protocol, "on_body", "self body"),
    (UVICORN, Protocol, "on_header", "self name value"),
    (UVICORN, Protocol, "on_headers_complete", "self"),
    (UVICORN, Protocol, "on_message_begin", "self"),
    (UVICORN, Protocol, "on_message_complete", "self"),
    (UVICORN, Protocol, "on_response_complete", "self"),
    (UVICORN, Protocol, "on_url", "self url"),
    (UVICORN, Protocol, "send_400_response", "self msg"),
    (UVICORN, Protocol, "shutdown", "self"),
    (UVICORN, Protocol, "_start_asgi_task", "self cycle app"),
    (
        UVICORN,
        Cycle,
        "__init__",
        "self scope transport flow logger access_logger access_log default_headers message_event "
        "expect_100_continue keep_alive on_response",
    ),
    (UVICORN, Cycle, "receive", "self"),
    (UVICORN, Cycle, "run_asgi", "self app"),
    (UVICORN, Cycle, "send", "self message"),
    (UVICORN, Cycle, "send_500_response", "self"),
    (UVICORN, flow_control.FlowControl, "pause_reading", "self"),
    (UVICORN, flow_control.FlowControl, "resume_reading", "self"),
    (UVICORN, uvicorn.Server, "__init__", "self config"),
    (UVICORN, uvicorn.Server, "capture_signals", "self"),
    (UVICORN, uvicorn.Server, "on_tick", "self counter"),
    (UVICORN, uvicorn.Server, "run", "self sockets"),
    (UVICORN, uvicorn.Server, "serve", "self sockets"),
    (UVICORN, uvicorn.Server, "startup", "self sockets"),
    (PYTHON, multiprocessing.forkserver, "ensure_running", ""),
    (PYTHON, multiprocessing.forkserver, "set_forkserver_preload", "modules_names"),
    (PYTHON, multiprocessing.resource_tracker, "ensure_running", ""),
    (PYTHON, multiprocessing.process.BaseProcess, "join", "self timeout"),
]


async def protocol() -> Protocol:
    """Of a connection on which a request has begun."""
    config = uvicorn.Config(lambda: None, http="httptools", ws="none", log_config=None)
    made = Protocol(config, ServerState(), {})
    made.connection_made(asyncio.Transport({"sockname": ("::1", 80), "peername": ("::1", 1)}))
    made.on_message_begin()
    return made


async def cycle() -> Cycle:
    """Of a request that nobody has answered."""
    count = len(inspect.signature(Cycle).parameters)
    return Cycle(*[None] * count)


async def flow() -> flow_control.FlowControl:
    """Of a connection that is read."""
    return flow_control.FlowControl(asyncio.Transport())


async def server() -> uvicorn.Server:
    """One that was not started."""
    return uvicorn.Server(uvicorn.Config(lambda: None))


async def lifespan() -> LifespanOn:
    """Of an application that was not started."""
    return LifespanOn(uvicorn.Config(lambda: None, log_config=None))


# What is read or set, by what makes an object that has it.
ATTRIBUTES = {
    protocol: (
        "access_log access_logger app config connections cycle expect_100_continue flow headers "
        "logger loop parser pipeline scope server_state tasks transport url"
    ),
    cycle: (
        "body default_headers disconnected flow keep_alive message_event more_body on_response "
        "response_complete response_started scope transport waiting_for_100_continue"
    ),
    flow: "read_paused write_paused",
    server: "config server_state should_exit started",
    lifespan: "state",
}

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef

# Which class of ours extends what.
OURS = {
    "Cycle": cycle,
    "Connection": protocol,
    "WorkerServer": server,
    "AdminServer": server,
}


def where(owner: type) -> str:
    return owner.__name__


@pytest.mark.parametrize(
    ("release", "owner", "name", "parameters"),
    CALLS,
    ids=[f"{where(owner)}.{name}" for _, owner, name, _ in CALLS],
)
def test_what_is_called_takes_what_we_give(release, owner, name, parameters):
    found = getattr(owner, name, None)
    assert found is not None, f"{release} has no {where(owner)}.{name}, which app/ uses"
    taken = " ".join(inspect.signature(found).parameters)
    assert taken == parameters, (
        f"{release}: {where(owner)}.{name} takes ({taken}); app/ was written for ({parameters})"
    )


@pytest.mark.parametrize("make", ATTRIBUTES, ids=lambda make: make.__name__)
def test_what_is_read_or_set_is_there(make):
    made = asyncio.run(make())
    missing = [name for name in ATTRIBUTES[make].split() if not hasattr(made, name)]
    assert not missing, f"{UVICORN}: {where(type(made))} lacks {missing}, which app/ uses"


def test_answers_begin_with_a_line_for_each_status():
    lines = httptools_impl.STATUS_LINE
    assert lines[200] == b"HTTP/1.1 200 OK\r\n", f"{UVICORN}: STATUS_LINE[200] is {lines[200]}"
    assert set(range(200, 600)) <= set(lines), f"{UVICORN}: STATUS_LINE lacks statuses"


def test_a_server_starts_and_ends_by_the_methods_that_are_replaced():
    source = inspect.getsource(uvicorn.Server)
    for call in ("self.capture_signals()", "await self.startup(", "await self.on_tick("):
        assert call in source, f"{UVICORN}: Server does not call {call}, which app/ replaces"


def test_bodies_are_read_up_to_a_limit():
    found = getattr(flow_control, "HIGH_WATER_LIMIT", None)
    assert found == 65536, f"{UVICORN}: HIGH_WATER_LIMIT is {found}, app/ was written for 65536"


def test_a_process_of_a_fork_server_has_a_sentinel_and_a_number():
    process = multiprocessing.get_context("forkserver").Process
    for name in ("sentinel", "pid", "exitcode"):
        assert hasattr(process, name), f"{PYTHON}: a process has no {name}, which app/ uses"
    server = multiprocessing.forkserver._forkserver
    assert hasattr(server, "_forkserver_pid"), (
        f"{PYTHON}: the fork server has no _forkserver_pid, which app/ uses"
    )


@pytest.mark.parametrize("ours", OURS, ids=str)
def test_the_table_has_all_that_our_classes_use(ours):
    """And all that they replace."""
    (body,) = [
        node
        for file in APP.rglob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == ours and node.bases
    ]
    methods = {node.name for node in body.body if isinstance(node, FUNCTIONS)}
    used = {
        node.attr
        for node in ast.walk(body)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()")
    }
    made = asyncio.run(OURS[ours]())
    theirs = {name for name in methods | used if hasattr(made, name)}
    listed = set(ATTRIBUTES[OURS[ours]].split())
    listed |= {name for _, owner, name, _ in CALLS if owner in type(made).__mro__}
    assert theirs <= listed, "to be added to the tables of this file"
