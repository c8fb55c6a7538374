"""Log lines as they are written."""

import json
import logging
from datetime import UTC, datetime

from app.system.timestamps import timestamp
from app.telemetry.logs import Formatter, configure


def test_times_are_utc_with_their_offset_as_in_the_audit_log(capfd):
    root, before = logging.getLogger(), logging.getLogger().handlers[:]
    level = root.level
    try:
        configure("info")
        logging.getLogger("scumble").info("hello")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    line = json.loads(capfd.readouterr().err.splitlines()[-1])
    assert line["event"] == "hello"
    assert line["time"].endswith("+00:00")
    age = datetime.now(UTC) - datetime.fromisoformat(line["time"])
    assert abs(age.total_seconds()) < 60


def test_the_time_is_that_of_the_record():
    record = logging.makeLogRecord({"created": 1_767_225_600.5, "msg": "x"})
    assert Formatter("%(asctime)s").formatTime(record) == timestamp(1_767_225_600.5)
    assert timestamp(1_767_225_600.5) == "2026-01-01T00:00:00.500+00:00"
