"""The preview process: loads the bundle once and shows what a defense does to images.

It uses the engine, precision and defenses of the service. It runs at low priority, and the kernel
ends it first when memory runs out.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import logging
import os
import signal
from collections import OrderedDict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from PIL import Image

from app.admin.console.preview_request import PreviewRequest
from app.errors import ConfigError, Internal, RequestError, Unavailable, Unprocessable
from app.inference.assembly import load_engine
from app.inference.bundle import Bundle, golden_inputs, open_bundle
from app.inference.decode import Pixels, decode
from app.inference.defense_artifacts import DefenseArtifacts
from app.inference.engines import Engine, Probs
from app.settings import Settings
from app.telemetry import logs
from scumble import defenses

REMEMBERED = 64  # pictures, to show what honest users lose
NICENESS = 10
log = logging.getLogger("scumble.console")


class Previewer:
    """A loaded model, its golden inputs, and the recent pictures with their clean rows."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._bundle: Bundle = open_bundle(settings.model_dir, settings.model)
        self._engine: Engine = load_engine(settings, self._bundle)
        self._artifacts = DefenseArtifacts(self._bundle, settings.engine, settings.precision)
        golden = golden_inputs(self._bundle.card.input)
        self._golden = (golden, self._clean(golden))
        self._pictures: OrderedDict[bytes, tuple[Pixels, Probs]] = OrderedDict()

    def __call__(self, request: PreviewRequest, image: bytes) -> dict[str, Any]:
        """Return clean and defended row of one picture, and what the defense does to all.

        Raises:
            RequestError: the image or the defense is refused.
        """
        defense = self._defense(request)
        pixels, clean = self._golden
        if request.golden is None:
            self._remember(image)
            rows = list(self._pictures.values())
            pixels = np.concatenate([pixels, *(row[0] for row in rows)])
            clean = np.concatenate([clean, *(row[1] for row in rows)])
            shown = len(clean) - 1
        else:
            shown = request.golden - 1
        defended = defense(clean, pixels)
        l1 = np.abs(defended - clean).sum(1)
        changed = defended.argmax(1) != clean.argmax(1)
        golden = len(self._golden[0])
        return {
            "defense": repr(defense),
            "seen": _png(pixels[shown]),
            "clean": self._row(clean[shown]),
            "defended": self._row(defended[shown]),
            "l1": l1[shown],
            "label_changed": bool(changed[shown]),
            "honest": {
                "golden": golden,
                "pictures": len(clean) - golden,
                "mean_l1": l1.mean(),
                "changed_labels": changed.mean(),
            },
        }

    def _defense(self, request: PreviewRequest) -> defenses.Defense:
        try:
            return defenses.configure(
                request.defense,
                self._bundle.card.defense_params(request.defense, request.params),
                bundle=self._artifacts,
                secret=self._settings.secret.get_secret_value().encode(),
            )
        except defenses.DefenseError as exc:
            raise Unprocessable(str(exc)) from exc

    def _remember(self, image: bytes) -> None:
        """Put the picture last; decode and classify it if it is new."""
        key = hashlib.blake2b(image, digest_size=16).digest()
        if key not in self._pictures:
            card = self._bundle.card
            limits = self._settings.limits
            pixels = decode(
                image,
                card.input,
                card.preprocessing,
                limits.max_pixels,
                max_jpeg_pixels=limits.max_jpeg_pixels,
            )[np.newaxis]
            self._pictures[key] = (pixels, self._clean(pixels))
        self._pictures.move_to_end(key)
        if len(self._pictures) > REMEMBERED:
            self._pictures.popitem(last=False)

    def _clean(self, pixels: Pixels) -> Probs:
        return self._engine(pixels)

    def _row(self, row: Probs) -> dict[str, Any]:
        best = int(row.argmax())
        return {"label": self._bundle.card.labels[best], "index": best, "probabilities": row}


def answer(previewer: Previewer, request: bytes, image: bytes) -> tuple[int, bytes]:
    """Return status and JSON body for a request from the pipe."""
    try:
        shown = previewer(PreviewRequest(**orjson.loads(request)), image)
        return 200, orjson.dumps(shown, option=orjson.OPT_SERIALIZE_NUMPY)
    except RequestError as error:
        return error.status, error.body()
    except ConfigError as exc:  # of a model that another server runs
        refused = Unavailable(str(exc))
        return refused.status, refused.body()
    except Exception:  # of any kind: the next request may succeed
        log.exception("preview failed")
        ours = Internal("preview failed; see the log")
        return ours.status, ours.body()


def run(settings: Settings, pipe: Connection) -> None:
    """Entry point of the process: read request and image, write status and body, until the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor handles Ctrl-C
    os.nice(NICENESS)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    logs.configure(settings.log_level, settings.log_format)
    previewer: Previewer | None = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            request, image = pipe.recv_bytes(), pipe.recv_bytes()
            try:
                previewer = previewer or Previewer(settings)
                status, body = answer(previewer, request, image)
            except ConfigError as exc:
                error = Unavailable(f"model cannot be loaded: {exc}")
                status, body = error.status, error.body()
            pipe.send_bytes(str(status).encode())
            pipe.send_bytes(body)


def _png(pixels: Pixels) -> str:
    """A picture as the network sees it, as a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
