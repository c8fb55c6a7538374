"""Logs on standard error: events and numbers, never images or probabilities.

JSON lines for machines, text for a terminal.
"""

from __future__ import annotations

import json
import logging
import logging.config
import os
import time
from typing import Literal

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.orjson import OrjsonFormatter

from app.system.timestamps import timestamp

Form = Literal["auto", "text", "json"]
STDERR = 2


class JsonFormatter(OrjsonFormatter):
    """JSON lines whose times are those of the audit log: ISO 8601, UTC, with the offset."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802  # logging's name
        """The time of a record."""
        del datefmt
        return timestamp(record.created)


class TextFormatter(logging.Formatter):
    """Lines for people: local time, level, event, and what belongs to it as `name=value`."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        """The line of a record, without its traceback."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        source = "" if record.name == "scumble" else f"{record.name}: "
        extra = [
            f"  {name}={_plain(value)}"
            for name, value in vars(record).items()
            if name not in RESERVED_ATTRS and value is not None
        ]
        return f"{clock} {record.levelname:7} {source}{_printable(record.message)}{''.join(extra)}"


def configure(level: str, form: Form = "auto") -> None:
    """Send every logger of this process, uvicorn's included, through one handler.

    Args:
        level: the lowest that is written.
        form: of the lines; `auto` is text if standard error is a terminal, else JSON.
    """
    if form == "auto":
        form = "text" if os.isatty(STDERR) else "json"
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "text": {"()": TextFormatter},
                "json": {
                    "()": JsonFormatter,
                    "fmt": "%(asctime)s %(levelname)s %(name)s %(process)d %(message)s",
                    "rename_fields": {
                        "asctime": "time",
                        "levelname": "level",
                        "name": "logger",
                        "process": "pid",
                        "message": "event",
                    },
                },
            },
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": form}},
            "root": {"level": level.upper(), "handlers": ["stderr"]},
            # uvicorn repeats at every start and stop what the supervisor says once
            "loggers": {"uvicorn": {"level": "WARNING"}},
        }
    )


def _plain(value: object) -> str:
    """A value on one line, in quotes if it has spaces."""
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)


def _printable(text: str) -> str:
    """Text without control characters, which a client may have sent to a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
