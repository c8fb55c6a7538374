"""The audit log as the settings ask for it."""

from __future__ import annotations

import os

from app.audit.chain_file import ChainFile
from app.audit.log import Audit
from app.errors import ConfigError
from app.inference.bundle import Card
from app.settings import Settings
from app.telemetry.metrics import Metrics


def make_audit(settings: Settings, card: Card, metrics: Metrics, *, keyless: bool) -> Audit | None:
    """Make the audit log; None if the settings name no file. The first entry opens the file.

    Args:
        settings: of the server.
        card: of the model.
        metrics: of this worker.
        keyless: there are no grants that name a policy.

    Raises:
        ConfigError: the folder of the file is missing or not writable.
    """
    if settings.audit_file is None:
        return None
    folder = settings.audit_file.absolute().parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"SCUMBLE_AUDIT_FILE is {str(settings.audit_file)!r}: "
            f"folder {folder} is missing or not writable"
        )
    return Audit(
        ChainFile(settings.audit_file, fsync=settings.audit_fsync),
        facts={"model": card.name, "version": card.version},
        policy=settings.defense if keyless else None,
        closed=settings.audit_on_failure == "closed",
        written=metrics.audit_written,
        lost=metrics.audit_lost,
    )
