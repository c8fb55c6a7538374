"""Log lines as they are written."""

import json
import logging
import os
import pty
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from app.system.timestamps import timestamp
from app.telemetry.logs import JsonFormatter, TextFormatter, configure


@pytest.fixture(autouse=True)
def _own_handlers():
    root, before = logging.getLogger(), logging.getLogger().handlers[:]
    level = root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


def test_times_are_utc_with_their_offset_as_in_the_audit_log(capfd):
    configure("info")
    logging.getLogger("scumble").info("hello")
    line = json.loads(capfd.readouterr().err.splitlines()[-1])
    assert line["event"] == "hello"
    assert line["time"].endswith("+00:00")
    age = datetime.now(UTC) - datetime.fromisoformat(line["time"])
    assert abs(age.total_seconds()) < 60


CODE = """
import logging, sys
from app.telemetry.logs import configure
configure("info", sys.argv[1])
logging.getLogger("scumble").info("ready", extra={"url": "http://127.0.0.1:8000", "admin": None})
"""


def on_a_terminal(form):
    """What a process logs whose standard error is a terminal."""
    terminal, theirs = pty.openpty()
    try:
        subprocess.run([sys.executable, "-c", CODE, form], stderr=theirs, check=True)
        return os.read(terminal, 4096).decode().strip()
    finally:
        os.close(theirs)
        os.close(terminal)


def test_a_terminal_gets_text_unless_the_setting_says_json():
    text = on_a_terminal("auto")
    assert text.endswith(" INFO    ready  url=http://127.0.0.1:8000")
    assert json.loads(on_a_terminal("json"))["url"] == "http://127.0.0.1:8000"


def test_text_that_a_client_sent_stays_on_its_line():
    record = logging.makeLogRecord(
        {"name": "scumble", "levelname": "INFO", "msg": "a\nb\x1b[31m", "path": "/x y\x1b[2J\n"}
    )
    line = TextFormatter().format(record)
    assert "\x1b" not in line
    assert "\n" not in line
    assert line.endswith('path="/x y\\u001b[2J\\n"')


def test_text_keeps_a_traceback():
    try:
        raise ValueError("no")
    except ValueError:
        record = logging.makeLogRecord({"name": "uvicorn", "msg": "failed"})
        record.exc_info = sys.exc_info()
    first, *rest = TextFormatter().format(record).splitlines()
    assert first.endswith("uvicorn: failed")
    assert rest[-1] == "ValueError: no"


def test_the_time_is_that_of_the_record():
    record = logging.makeLogRecord({"created": 1_767_225_600.5, "msg": "x"})
    assert JsonFormatter("%(asctime)s").formatTime(record) == timestamp(1_767_225_600.5)
    assert timestamp(1_767_225_600.5) == "2026-01-01T00:00:00.500+00:00"
