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
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from PIL import Image

from app.admin.console.preview_request import PreviewRequest
from app.errors import ConfigError, Internal, RequestError, Unavailable, Unprocessable
from app.inference.assembly import load_pipeline
from app.inference.bundle import Bundle, golden_inputs, open_bundle
from app.inference.decode import Pixels, decode
from app.inference.defense_artifacts import DefenseArtifacts
from app.inference.engines import Probs
from app.inference.pipeline import Pipeline, defended
from app.settings import Settings
from app.telemetry import logs
from scumble import defenses
from scumble.defenses.evidence import ABSTAINED, Evidence, Marks

REMEMBERED = 64  # pictures, to show what honest users lose
NICENESS = 10
log = logging.getLogger("scumble.console")


@dataclass
class Seen:
    """Pictures with what the network made of them.

    Attributes:
        pixels: uint8 (N, H, W, C).
        clean: (N, K).
        evidence: of the clean rows; None until a defense needs it.
    """

    pixels: Pixels
    clean: Probs
    evidence: Evidence | None = None


class Previewer:
    """A loaded model, its golden inputs, and the recent pictures with their clean rows."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._bundle: Bundle = open_bundle(settings.model_dir, settings.model)
        self._pipeline: Pipeline = load_pipeline(settings, self._bundle)
        self._artifacts = DefenseArtifacts(self._bundle, settings.engine, settings.precision)
        self._golden = self._see(golden_inputs(self._bundle.card.input))
        self._pictures: OrderedDict[bytes, Seen] = OrderedDict()

    def __call__(self, request: PreviewRequest, image: bytes) -> dict[str, Any]:
        """Return clean and defended row of one picture, and what the defense does to all.

        Raises:
            RequestError: the image or the defense is refused.
            ConfigError: the network lacks a score that the defense needs.
        """
        defense = self._defense(request)
        seen = [self._golden]
        if request.golden is None:
            self._remember(image)
            seen += self._pictures.values()
        pixels = np.concatenate([each.pixels for each in seen])
        clean = np.concatenate([each.clean for each in seen])
        shown = len(clean) - 1 if request.golden is None else request.golden - 1
        answers = [self._answers(defense, each) for each in seen]
        rows, marks = map(np.concatenate, zip(*answers, strict=True))
        l1 = np.abs(rows - clean).sum(1)
        withheld = marks != 0
        changed = (rows.argmax(1) != clean.argmax(1)) & ~withheld
        golden = len(self._golden.clean)
        return {
            "defense": repr(defense),
            "seen": _png(pixels[shown]),
            "clean": self._row(clean[shown]),
            "defended": self._row(rows[shown]),
            "l1": l1[shown],
            "label_changed": bool(changed[shown]),
            "abstained": bool(marks[shown] == ABSTAINED),
            "withheld": bool(withheld[shown]),
            "honest": {
                "golden": golden,
                "pictures": len(clean) - golden,
                "mean_l1": l1.mean(),
                "changed_labels": changed.mean(),
                "withheld": withheld.mean(),
            },
        }

    def _answers(self, defense: defenses.Defense, seen: Seen) -> tuple[Probs, Marks]:
        """The rows to send out, and what is withheld of them."""
        size = len(seen.clean)
        if defense.needs and seen.evidence is None:
            golden = self._golden
            self._pipeline.evidence(golden.pixels, golden.clean, defense.needs)  # loads the scores
            assert self._pipeline.scores is not None  # noqa: S101  # as load_pipeline makes it
            _, seen.evidence = self._pipeline.scores(seen.pixels)
        rows, marks = defended(defense, seen.clean, seen.evidence, seen.pixels, [(size, None)])
        return rows, np.zeros(size, np.uint8) if marks is None else marks

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
            self._pictures[key] = self._see(pixels)
        self._pictures.move_to_end(key)
        if len(self._pictures) > REMEMBERED:
            self._pictures.popitem(last=False)

    def _see(self, pixels: Pixels) -> Seen:
        return Seen(pixels, self._pipeline.engine(pixels))

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
