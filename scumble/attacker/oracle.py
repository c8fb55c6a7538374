"""The oracle that every attack queries: images in, probabilities out, with a strict budget.

One query is one image; repeats count. Images are sent in requests of up to `batch`, several at a
time. What the service refused (429, 503) was not answered and costs nothing. A request that was
sent and got no answer may have been: its images are `lost`, and count as spent. Where the service's
own budget ends before the attacker's, the copy is made of the answers there are.

Answers are kept in a journal, in the order asked. A run that starts again with the same seed asks
the same questions, and gets from the journal what it had got before. A request is noted there just
before it is sent: one without an answer was on its way when the run ended, and counts as lost, as
the service may have counted it.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import httpx2
import numpy as np
import tenacity

from scumble.attacker import consent
from scumble.attacker.accounts import Accounts
from scumble.attacker.errors import (
    AttackError,
    BudgetExhausted,
    OracleRefused,
    OracleUnavailable,
    ResumeMismatch,
    ServiceSpent,
)
from scumble.attacker.transports import TRANSPORTS, Images, Message, Probs, Transport
from scumble.client import wire
from scumble.client.http_client import BUSY, UNSENT, retry_policy, spent
from scumble.progress import bar

SPARE = 4096  # bytes of a request that are not pixels


class Oracle(Protocol):
    """What an attack asks.

    Attributes:
        labels: number of classes K.
        shape: of an image, (C, H, W).
        step: smallest change of a value in [0, 1] that the oracle sees for sure; 0 for any.
        remaining: images that may still be asked.
    """

    labels: int
    shape: tuple[int, int, int]
    step: float

    @property
    def remaining(self) -> int:
        """Images that may still be asked."""
        ...

    def __call__(self, images: Images) -> Probs:
        """Probabilities (N, K) of float32 (N, C, H, W) in [0, 1].

        A row of NaN is an answer that an adaptive attacker throws away; losses leave it out.

        Raises:
            BudgetExhausted: N is more than `remaining`; nothing was asked.
        """
        ...


@dataclass
class Ledger:
    """What was spent, in images.

    Attributes:
        answered: got probabilities.
        lost: were sent and got no answer; the service may have counted them.
        replayed: of the answered, came from the journal of an earlier start.
        refused: requests (not images) that were told to come back later.
        sent_bytes: bodies of all requests.
        received_bytes: bodies of all answers.
        seconds: spent waiting for answers.
    """

    answered: int = 0
    lost: int = 0
    replayed: int = 0
    refused: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    seconds: float = 0.0

    @property
    def spent(self) -> int:
        """What counts against the budget."""
        return self.answered + self.lost


class HttpOracle:
    """The service at a URL.

    Args:
        url: of the service.
        budget: images that may be asked in all.
        transport: key of `TRANSPORTS`, or one of your own.
        model: name, labels, input and limits as `/v1/model` gives them; asked there if None.
        headers: sent with every request.
        keys: API keys of several accounts, which the requests use by turns until each is spent.
        partial: whether images that no account may ask about any more are answered by rows of NaN;
            else they are an error.
        batch: images of one request; fewer where the service's limits say so.
        connections: requests at a time.
        journal: file that keeps the answers; None keeps none.
        retries: how often a request that was refused for now, or not sent, is tried again.
        client: what carries the requests; made for `url` if None.
        sleep: what waits; tests pass their own.
        progress: show a bar with images per second.

    Raises:
        OracleUnavailable: no answer from `url`.
    """

    def __init__(
        self,
        url: str,
        *,
        budget: int,
        transport: str | Transport = "png",
        model: dict[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        keys: Sequence[str] = (),
        partial: bool = False,
        batch: int = 256,
        connections: int = 8,
        journal: Path | None = None,
        retries: int = 8,
        client: httpx2.Client | None = None,
        sleep: Callable[[float], None] = time.sleep,
        progress: bool = False,
    ) -> None:
        self.ledger = Ledger()
        self.budget = budget
        self.transport = TRANSPORTS[transport] if isinstance(transport, str) else transport
        self.step = self.transport.step
        try:
            self._http = client or httpx2.Client(
                base_url=url, timeout=60, transport=consent.transport(url)
            )
        except ImportError as exc:  # the environment names a SOCKS proxy
            raise OracleUnavailable(str(exc)) from exc
        self._http.headers.update(headers or {})
        self._accounts = Accounts(keys)
        self._one_at_a_time = connections == 1
        self._partial = partial
        self.ended: str | None = None  # why the service gives no more
        if keys:  # also for what is asked about the model
            self._http.headers["Authorization"] = f"Bearer {keys[0]}"
        self._retrying = tenacity.Retrying(sleep=sleep, **retry_policy(30.0, retries))
        try:
            self.model = model or self._model(url)
        except Exception:
            self._http.close()  # the caller gets no oracle to close
            raise
        size = self.model["input"]
        self.shape = (size["channels"], size["height"], size["width"])
        self.labels = len(self.model["labels"])
        self._size = min(batch, self._largest())
        self._journal = Journal(journal or Path(":memory:"))
        self._asked = 0  # requests so far: what the journal counts by
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(connections, thread_name_prefix="oracle")
        self._bar = bar(budget, "queries", "img", shown=progress)

    @property
    def remaining(self) -> int:
        """Images that may still be asked."""
        return 0 if self.ended else self.budget - self.ledger.spent

    def __call__(self, images: Images) -> Probs:
        """Probabilities (N, K) of float32 (N, C, H, W) in [0, 1].

        Raises:
            BudgetExhausted: N is more than `remaining`; nothing was sent.
            OracleUnavailable: no answer, to the last attempt or until the budget was lost.
            ServiceSpent: the service's budget is; with `partial`, before it gave any answer.
            OracleRefused: the service will not answer this.
            ResumeMismatch: the journal has the answer to another question here.
        """
        start = time.perf_counter()
        try:
            return self._answers(images)
        finally:
            self.ledger.seconds += time.perf_counter() - start

    def _answers(self, images: Images) -> Probs:
        if len(images) > self.remaining:
            raise BudgetExhausted(
                f"{len(images)} images asked for; {self.remaining} of {self.budget} are left"
            )
        parts = [images[i : i + self._size] for i in range(0, len(images), self._size)]
        first, self._asked = self._asked, self._asked + len(parts)
        numbers = range(first, self._asked)
        known = [self._recall(n, part) for n, part in zip(numbers, parts, strict=True)]
        if len(images) > self.remaining:
            raise BudgetExhausted(
                f"answers were lost when the run before this ended: {self.remaining} are left"
            )
        self.ledger.answered += len(images)  # reserved now, so that no path can exceed it
        found = [
            self._pool.submit(self._ask, n, part) if answer is None else answer
            for n, part, answer in zip(numbers, parts, known, strict=True)
        ]
        answers, failure = [], None
        for n, part, answer in zip(numbers, parts, found, strict=True):
            try:
                answers.append(self._settle(n, part, answer))
            except (AttackError, CancelledError) as exc:
                self.ledger.answered -= len(part)
                if self._partial and isinstance(exc, ServiceSpent):
                    answers.append(np.full((len(part), self.labels), np.nan, np.float32))
                    continue
                failure = failure or exc
                for later in found:  # not yet sent; those on their way are waited for
                    if isinstance(later, Future):
                        later.cancel()
        if self.ended:
            self._bar.close()
        if failure:
            raise failure
        if self.ended and not self.ledger.answered:
            raise ServiceSpent(self.ended)
        return np.concatenate([np.empty((0, self.labels), np.float32), *answers])

    def close(self) -> None:
        """End the connections and close the journal."""
        self._close(wait=True)

    def _close(self, *, wait: bool) -> None:
        self._pool.shutdown(wait=wait, cancel_futures=True)
        self._http.close()
        self._journal.close()
        self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close(wait=kind is not KeyboardInterrupt)  # a retry may take long

    def _recall(self, number: int, part: Images) -> Probs | None:
        """The answer that the journal has; what was lost on the way to it is counted."""
        row = self._journal.find(number)
        if row is None:
            self._journal.add(number, _digest(part))
            return None
        if row.digest != _digest(part):
            raise ResumeMismatch(
                f"request {number} differs from the one in the journal: other attack, data or seed"
            )
        with self._lock:
            self.ledger.lost += len(part) * (row.sent - (row.answer is not None))
        if row.answer is None:
            return None
        self.ledger.replayed += len(part)
        return np.frombuffer(row.answer, np.float32).reshape(len(part), self.labels)

    def _settle(self, number: int, part: Images, found: Probs | Future[Probs]) -> Probs:
        while isinstance(found, Future):
            try:
                found = found.result()
            except httpx2.RequestError as exc:
                if isinstance(exc, UNSENT):
                    raise OracleUnavailable(f"cannot connect: {exc}") from exc
                with self._lock:
                    self.ledger.lost += len(part)
                if self.remaining < 0:
                    raise OracleUnavailable(f"answers are lost until the budget is: {exc}") from exc
                found = self._pool.submit(self._ask, number, part)
        self._bar.update(len(part))
        if self._bar.n >= self.budget:
            self._bar.close()  # so that its rate is not mixed with what comes after
        return found

    def _ask(self, number: int, part: Images) -> Probs:
        message = self.transport.pack(self.model["name"], part)
        response = self._response(number, message)
        if response.status_code in BUSY:
            raise OracleUnavailable(
                f"{_place(response)} is still busy: {response.status_code} {_detail(response)}"
            )
        if response.status_code != 200:
            raise OracleRefused(
                f"{_place(response)} answered {response.status_code}: {_detail(response)}"
            )
        try:
            answer = self.transport.unpack(response.headers, response.content, self.labels)
            if answer.shape != (len(part), self.labels):
                raise OracleRefused(f"{len(part)} images got {answer.shape} probabilities")
            if not np.isfinite(answer).all():
                raise OracleRefused("a probability is not a finite number")
        except (OracleRefused, ValueError, LookupError, TypeError, RecursionError) as exc:
            with self._lock:  # it was counted, whatever it is
                self.ledger.lost += len(part)
            raise OracleRefused(f"{_place(response)} gave no probabilities: {exc}") from exc
        self._journal.answer(number, answer.tobytes())
        return answer

    def _response(self, number: int, message: Message) -> httpx2.Response:
        """The answer to a message under the first account whose budget is not spent."""
        alone = self._one_at_a_time
        while True:
            if self.ended:
                raise ServiceSpent(self.ended)
            key = self._accounts.turn(number)
            with self._accounts.using(key, alone=alone):
                response = self._retrying.copy()(self._post, number, message, key)
            if not spent(response):
                return response
            if not alone:  # what others give back may be enough
                alone = True
            elif self._accounts.spend(key):
                said = f"{_place(response)} gives no more: {response.status_code} "
                said += _detail(response)
                self.ended = said if self._partial else None
                raise ServiceSpent(said)

    def _post(self, number: int, message: Message, key: str) -> httpx2.Response:
        self._journal.send(number, 1)
        headers = message.headers
        if key:
            headers = {**headers, "Authorization": f"Bearer {key}"}
        try:
            response = self._http.request(
                message.method, message.path, content=message.content, headers=headers
            )
        except UNSENT:
            self._journal.send(number, -1)
            raise
        if response.status_code != 200:
            self._journal.send(number, -1)
        with self._lock:
            self.ledger.sent_bytes += len(message.content)
            self.ledger.received_bytes += len(response.content)
            self.ledger.refused += response.status_code in BUSY
        return response

    def _model(self, url: str) -> dict[str, Any]:
        # Somebody who mistyped the URL should not wait for long to hear it.
        patient = self._retrying.copy(stop=tenacity.stop_after_attempt(4))
        try:
            response: httpx2.Response = patient(self._http.get, "/v1/model")
        except httpx2.RequestError as exc:
            raise OracleUnavailable(f"no answer from {url}: {exc}") from exc
        if response.status_code != 200:
            raise OracleRefused(
                f"{url}/v1/model answered {response.status_code} {_detail(response)}"
            )
        document: dict[str, Any] = response.json()
        return document

    def _largest(self) -> int:
        limits = self.model["limits"]
        pixels = int(np.prod(self.shape)) * (4 if self.step == 0 else 1)
        # A PNG of noise is a little larger than its pixels.
        room = (limits["max_body_bytes"] - SPARE) // (pixels + pixels // 50 + 512)
        return max(1, min(int(room), self.transport.largest(limits)))


@dataclass(frozen=True)
class Row:
    """One request in the journal.

    Attributes:
        digest: of the images.
        sent: how often it was sent and not refused.
        answer: its probabilities, once they are there.
    """

    digest: bytes
    sent: int
    answer: bytes | None


class Journal:
    """Requests and answers in an SQLite file, each written before the next step is taken."""

    def __init__(self, path: Path) -> None:
        # Written from the threads that send, so that what was not sent is not in it.
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._lock = threading.Lock()
        self._do("PRAGMA journal_mode=WAL")
        self._do("PRAGMA synchronous=NORMAL")
        self._do(
            "CREATE TABLE IF NOT EXISTS requests"
            " (number INTEGER PRIMARY KEY, digest BLOB, sent INTEGER, answer BLOB)"
        )

    def find(self, number: int) -> Row | None:
        """The request `number`, if it was ever made."""
        rows = self._do("SELECT digest, sent, answer FROM requests WHERE number = ?", number)
        return Row(*rows[0]) if rows else None

    def add(self, number: int, digest: bytes) -> None:
        """Note a request that is to be sent."""
        self._do("INSERT INTO requests VALUES (?, ?, 0, NULL)", number, digest)

    def send(self, number: int, times: int) -> None:
        """Note that it is about to be sent (1), or was not sent or refused after all (-1)."""
        self._do("UPDATE requests SET sent = sent + ? WHERE number = ?", times, number)

    def answer(self, number: int, answer: bytes) -> None:
        """Note its answer."""
        self._do("UPDATE requests SET answer = ? WHERE number = ?", answer, number)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _do(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(statement, values).fetchall()


def _place(response: httpx2.Response) -> str:
    """Who answered, without a query: an owner's template may have a key in it."""
    return wire.shown(response.url.copy_with(query=None))


def _detail(response: httpx2.Response) -> str:
    """The service's own sentence, or the beginning of whatever it sent: 401 and 429 say why."""
    try:
        said = str(response.json()["detail"])
    except (ValueError, LookupError, TypeError, RecursionError):
        said = response.text
    return "".join(c if c.isprintable() else " " for c in said[:200])


def _digest(part: Images) -> bytes:
    return hashlib.sha256(part.tobytes()).digest()
