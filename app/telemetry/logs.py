"""Logs are JSON lines on standard error: events and numbers, never images or probabilities."""

from __future__ import annotations

import logging
import logging.config

from pythonjsonlogger.orjson import OrjsonFormatter

from app.system.timestamps import timestamp


class Formatter(OrjsonFormatter):
    """JSON lines whose times are those of the audit log: ISO 8601, UTC, with the offset."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802  # logging's name
        """The time of a record."""
        del datefmt
        return timestamp(record.created)


def configure(level: str) -> None:
    """Send every logger of this process, uvicorn's included, through one JSON handler."""
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "json": {
                    "()": Formatter,
                    "fmt": "%(asctime)s %(levelname)s %(name)s %(process)d %(message)s",
                    "rename_fields": {
                        "asctime": "time",
                        "levelname": "level",
                        "name": "logger",
                        "process": "pid",
                        "message": "event",
                    },
                }
            },
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
            "root": {"level": level.upper(), "handlers": ["stderr"]},
            # uvicorn repeats at every start and stop what the supervisor says once
            "loggers": {"uvicorn": {"level": "WARNING"}},
        }
    )
