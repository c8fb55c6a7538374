"""V2 requests for models of the upstream, passed through with their tensors as they are.

    client -> check, count, charge -> upstream -> defend one output -> client

The request is built again from what is known to be harmless: names, shapes and values of inputs.
Everything else that a V2 server may offer is refused: parameters that may change what a model
answers, further outputs, classification, shared memory. Of the answer nothing but the values of
the defended output is used.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from starlette.requests import Request
from starlette.responses import Response

from app.endpoint_type import Endpoint
from app.errors import (
    BadFraming,
    ClientGone,
    ConfigError,
    Forbidden,
    NotFound,
    RequestError,
    TooLarge,
    TooLate,
    Unavailable,
    Unprocessable,
)
from app.http.bodies import INLINE_BYTES, Headers, brief, read_buffer, refuse_encoding
from app.http.prediction import INLINE_VALUES, Service, joined_marks
from app.http.protocols.v2 import (
    LENGTH,
    flag,
    json_length,
    parameters_of,
    request_id_of,
    split_body,
)
from app.http.responses import json_response
from app.inference.deadline import LATE, Deadline
from app.inference.engines import Probs
from app.inference.upstream.batching import LEAST_S
from app.inference.upstream.client import Answer
from app.inference.upstream.network_interface import Found, InvalidAnswer
from app.inference.upstream.pass_through_models import Passed, PassThrough, check_without_images
from app.inference.upstream.v2_messages import read_answer, read_json
from app.request_context import RequestContext, request_context
from app.settings import LimitSettings
from app.system.background import Throttle
from app.telemetry.counters import increment
from scumble.defenses import Defense
from scumble.defenses.evidence import Marks

MOST_INPUTS, MOST_SIDES = 64, 8
MOST_TEXT = 300  # characters of an upstream's message in the log
VERSION = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,64}")  # dots alone would lead elsewhere
NO_METADATA = "the upstream has no metadata"
NO_ROWS = "the upstream gave no distribution for the request"
# Refusals of the upstream that say what is wrong with a request.
REFUSALS: dict[int, type[RequestError]] = {
    400: Unprocessable,
    404: NotFound,
    413: TooLarge,
    422: Unprocessable,
}

log = logging.getLogger("scumble")


@dataclass(frozen=True)
class PassedRequest:
    """A checked request, as it is sent to the upstream.

    Attributes:
        images: in it: the first side of every input.
        body: for the upstream.
        headers: for the upstream.
        id: of the request, if it has one.
        binary: whether the client wants the output as bytes.
    """

    images: int
    body: bytes
    headers: dict[str, str]
    id: str | None
    binary: bool


class PassThroughEndpoints:
    """The endpoints of the V2 protocol for models that are passed through.

    Args:
        service: whose limits, budgets and metrics hold for them.
        through: the models.
    """

    def __init__(self, service: Service, through: PassThrough) -> None:
        self._service = service
        self._through = through
        self._throttle = Throttle()
        self._waiting = 0  # images of requests that the upstream has not answered
        self._slots = asyncio.Semaphore(through.concurrency)
        self._exchanges: set[asyncio.Task[Answer]] = set()
        self._count = {
            name: increment(service.metrics.images.labels(name, "float32"))
            for name in through.models
        }

    def infer(self, otherwise: Endpoint) -> Endpoint:
        """`POST /v2/models/{model}/infer`; other models are the other endpoint's."""
        return self._for_models(self._infer, otherwise)

    def metadata(self, otherwise: Endpoint) -> Endpoint:
        """`GET /v2/models/{model}`: the upstream's, with the defended output alone."""
        return self._for_models(self._metadata, otherwise)

    def ready(self, otherwise: Endpoint) -> Endpoint:
        """`GET /v2/models/{model}/ready`."""
        return self._for_models(self._ready, otherwise)

    def _for_models(self, own: Callable[[Passed, Request], Any], otherwise: Endpoint) -> Endpoint:
        async def chosen(request: Request) -> Response:
            name = request.path_params.get("model", self._service.card.name)
            model = self._through.models.get(name)
            if model is None:
                return await otherwise(request)
            response: Response = await own(model, request)
            return response

        return chosen

    async def _infer(self, model: Passed, request: Request) -> Response:
        service = self._service
        start = service.clock()
        context = request_context(request.scope)
        headers = dict(request.scope["headers"])
        deadline = service.deadline(context, headers, start)
        path = self._path(model, request)
        refuse_encoding(headers)
        body = await read_buffer(headers, request.receive, service.limits.max_body_bytes)
        parse = partial(
            read_passed, headers, body, model, service.limits, binary=self._through.binary
        )
        if json_length(headers, body) <= INLINE_BYTES:
            asked = parse()
        else:
            (asked,) = await service.executor([parse], len(body), deadline)
        read = service.clock()
        if (ended := deadline.ended(read)) is not None:
            raise ended
        context.images = asked.images
        defense = await self._charge(model, context, asked.images)
        before = service.clock()
        found = await self._ask(model, path, asked, context, deadline)
        inferred = service.clock()
        if deadline.client.gone:
            raise ClientGone("the client closed the connection before the answer")
        # On a thread: how many classes a model has is not known before its first answer.
        size = self._through.max_size
        parts = [found.part(i, i + size) for i in range(0, asked.images, size)]
        tasks = [partial(model.defend, defense, part) for part in parts]
        answers = await service.executor(tasks, 0, deadline)
        rows = np.concatenate([rows for rows, _ in answers])
        marks = joined_marks([marks for _, marks in answers])
        defended = service.clock()
        finish = partial(finish_passed, model, asked, found, rows)
        if rows.size <= INLINE_VALUES:
            response, distances = finish()
        else:  # the inference is done: always answer
            unlimited = deadline._replace(at=math.inf)
            ((response, distances),) = await service.executor([finish], 0, unlimited)
        self._note(context, model, distances, marks)
        stage = service.metrics.stage
        stage["read"].observe(read - start)
        stage["infer"].observe(inferred - before)
        stage["defend"].observe(defended - inferred)
        stage["encode"].observe(service.clock() - defended)
        return response

    async def _charge(self, model: Passed, context: RequestContext, images: int) -> Defense | None:
        """Charge the images; returns the client's own defense.

        Raises:
            Forbidden: the client has one, which is not for this model.
            Unprocessable: it needs images.
            OverBudget, Unavailable: as the admission says.
        """
        admission = context.admission
        if admission is None:
            return None
        defense = admission.grant.defense
        if defense is not None:
            if not model.served:
                raise Forbidden(f"this API key is not for model {model.name!r}")
            try:
                check_without_images(defense, model.classes or 1)
            except ConfigError:
                raise Unprocessable(
                    "this API key is for images, not for tensors; send them to /v1/predict"
                ) from None
        await admission.charge(images)
        return defense

    async def _ask(
        self,
        model: Passed,
        path: str,
        asked: PassedRequest,
        context: RequestContext,
        deadline: Deadline,
    ) -> Found:
        """The rows of the upstream.

        Raises:
            Unavailable: too many images wait, or the upstream gives no rows.
            TooLate, ClientGone: no answer in time, or the client left.
            RequestError: the upstream refuses the request.
        """
        headers = asked.headers
        if context.traceparent is not None:
            headers = {**headers, "traceparent": context.traceparent}
        answer = await self._exchange(
            "POST", f"{path}/infer", asked.body, headers, asked.images, deadline
        )
        if answer.status != 200:
            raise self._refusal(answer)

        def read() -> Found:
            return model.read(read_answer(answer.length, answer.body), asked.images)

        size = len(answer.body)
        try:
            if size <= INLINE_BYTES:
                found = read()
            else:
                (found,) = await self._service.executor([read], size, deadline)
        except InvalidAnswer:
            raise Unavailable(NO_ROWS) from None
        if found.valid is not None:
            raise Unavailable(NO_ROWS)
        return found

    async def _exchange(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        images: int,
        deadline: Deadline,
    ) -> Answer:
        """Send a request when fewer than the allowed number are in flight.

        A connection is not given up, and the next one checked, for a client's short deadline: the
        exchange goes on for a moment after the client has got 504.

        Args:
            method: of HTTP.
            path: on the upstream.
            body: of the request.
            headers: of the request.
            images: in it; 1 for other requests.
            deadline: of the client.

        Raises:
            Unavailable: too many images wait, or no replica is usable.
            TooLate, ClientGone: no answer in time, or the client left.
        """
        client, clock = self._through.client, self._service.clock
        client.refuse_unusable()
        most = self._service.limits.max_queue
        if self._waiting and self._waiting + images > most:
            raise Unavailable(f"{self._waiting} images are waiting; allowed: {most}")
        self._waiting += images
        try:
            try:
                async with asyncio.timeout(_left(deadline, clock())):
                    await self._slots.acquire()
            except TimeoutError:
                raise TooLate(LATE) from None
            until = max(deadline.at, clock() + LEAST_S)
            exchange = asyncio.create_task(
                client.ask(
                    path, body, headers, lambda answer: answer,
                    until=until, method=method, of_server=True, refusals=True,
                )
            )  # fmt: skip
            self._exchanges.add(exchange)
            exchange.add_done_callback(self._ended)
            await asyncio.wait({exchange}, timeout=_left(deadline, clock()))
            if not exchange.done():
                raise TooLate("the upstream did not answer in time")
            return exchange.result()
        finally:
            self._waiting -= images

    def _ended(self, exchange: asyncio.Task[Answer]) -> None:
        self._slots.release()
        self._exchanges.discard(exchange)
        if not exchange.cancelled():
            exchange.exception()  # is not logged, if no request waits for it any more

    def _note(
        self,
        context: RequestContext,
        model: Passed,
        distances: npt.NDArray[np.float32],
        marks: Marks | None,
    ) -> None:
        metrics = self._service.metrics
        metrics.defended_rows.inc(int((distances > 1e-6).sum()))
        metrics.response_l1.observe_all(distances.tolist())
        if marks is not None:
            for kind, counter in metrics.withheld.items():
                counter.inc(int((marks == kind).sum()))
            context.withheld = int(np.count_nonzero(marks))
        self._count[model.name](len(distances))

    async def _metadata(self, model: Passed, request: Request) -> Response:
        """What the upstream says, without the outputs that are dropped.

        Raises:
            NotFound: the upstream has no such model or version.
            Unavailable, TooLate: the upstream does not answer.
        """
        answer = await self._get(self._path(model, request), request)
        if answer.status != 200:
            raise self._refusal(answer)
        try:
            document = read_json(answer.body)
        except InvalidAnswer:
            raise Unavailable(NO_METADATA) from None
        kept: dict[str, Any] = {
            name: document[name] for name in ("name", "versions", "platform") if name in document
        }
        for name in ("inputs", "outputs"):
            kept[name] = [
                {member: tensor.get(member) for member in ("name", "datatype", "shape")}
                for tensor in _tensors(document.get(name))
                if name == "inputs" or tensor.get("name") == model.output
            ]
        try:
            return json_response(kept)
        except orjson.JSONEncodeError:  # a member is nested too deeply
            raise Unavailable(NO_METADATA) from None

    async def _ready(self, model: Passed, request: Request) -> Response:
        """Whether the model takes requests.

        Raises:
            Unavailable: this service, or the model on the upstream, is not ready.
            TooLate: the upstream does not answer.
        """
        reason = await self._service.not_ready_reason()
        if reason is not None:
            raise Unavailable(f"{reason}; use another replica")
        answer = await self._get(f"{self._path(model, request)}/ready", request)
        if answer.status != 200:
            raise Unavailable(f"model {model.name!r} is not ready on the upstream")
        return json_response({"name": model.name, "ready": True})

    async def _get(self, path: str, request: Request) -> Answer:
        service = self._service
        headers = dict(request.scope["headers"])
        deadline = service.deadline(request_context(request.scope), headers, service.clock())
        return await self._exchange("GET", path, b"", {}, 1, deadline)

    def _refusal(self, answer: Answer) -> RequestError:
        """The error for the client; the log has the upstream's text."""
        if self._throttle():
            log.warning(
                "upstream refused a request with status %d: %r",
                answer.status,
                answer.body[:MOST_TEXT].decode("utf-8", "replace"),
                extra={"upstream": answer.url},
            )
        return refusal(answer)

    def _path(self, model: Passed, request: Request) -> str:
        """The path of the model on the upstream.

        Raises:
            NotFound: another version than the one that is served.
        """
        path = f"/v2/models/{model.name}"
        version: str | None = request.path_params.get("version")
        served = model.network.sent.version
        known = version == served if model.served else VERSION.fullmatch(version or "1")
        if version is not None and not known:
            raise NotFound(f"unknown version {version[:64]!r} of {model.name!r}")
        if model.served and not served:
            return self._through.client.replicas[0].model_path
        version = served if model.served else version
        return path if version is None else f"{path}/versions/{version}"


def read_passed(
    headers: Headers,
    body: bytes | bytearray,
    model: Passed,
    limits: LimitSettings,
    *,
    binary: bool,
) -> PassedRequest:
    """Check a request and build it again.

    Args:
        headers: of the request.
        body: of the request.
        model: that it is for.
        limits: of a request.
        binary: whether the upstream takes bytes.

    Raises:
        BadFraming: the JSON, or the lengths of tensors, are invalid.
        Unprocessable: it asks for something that is not passed through, or its data is nested too
            deeply to be passed through.
        TooLarge: too many images.
    """
    document, tail = split_body(body, json_length(headers, body))
    _only(document, "the request", {"id", "inputs", "outputs", "parameters"})
    _only(parameters_of(document), "parameters of the request", {"binary_data_output"})
    output = _the_output(document, model.output)
    inputs, sizes, images = _inputs(document.get("inputs"))
    if images > limits.max_tensor_images:
        raise TooLarge(f"the inputs have {images} images; allowed: {limits.max_tensor_images}")
    if sum(sizes) != len(tail):
        raise BadFraming(f"{len(tail)} bytes follow the JSON; the inputs have {sum(sizes)}")
    if sizes and not binary:
        raise Unprocessable("the upstream takes no tensors as bytes; send their data as JSON")
    asked: list[dict[str, Any]] = [{"name": name} for name in model.network.sent.outputs]
    if binary:
        for each in asked:
            each["parameters"] = {"binary_data": True}
    try:
        header = orjson.dumps({"inputs": inputs, "outputs": asked})
    except orjson.JSONEncodeError:  # which reads deeper documents than it writes
        raise Unprocessable("data is nested too deeply") from None
    sent = {"Content-Type": "application/json"}
    if sizes:
        sent = {"Content-Type": "application/octet-stream", LENGTH: str(len(header))}
    whole = flag(document, "binary_data_output", default=False)
    return PassedRequest(
        images,
        b"".join((header, tail)),
        sent,
        request_id_of(document),
        flag(output, "binary_data", default=whole),
    )


def finish_passed(
    model: Passed, asked: PassedRequest, found: Found, rows: Probs
) -> tuple[Response, npt.NDArray[np.float32]]:
    """The answer, and the distance of each row from the clean one."""
    return write_passed(model, asked, model.values(rows)), np.abs(rows - found.rows).sum(axis=1)


def write_passed(model: Passed, asked: PassedRequest, values: Probs) -> Response:
    """The answer, with the defended output alone."""
    output: dict[str, Any] = {
        "name": model.output,
        "datatype": "FP32",
        "shape": list(values.shape),
    }
    answer: dict[str, Any] = {"model_name": model.name, "outputs": [output]}
    if model.network.sent.version:
        answer["model_version"] = model.network.sent.version
    if asked.id is not None:
        answer["id"] = asked.id
    if not asked.binary:
        output["data"] = np.ascontiguousarray(values, np.float32).reshape(-1)
        body = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(body, media_type="application/json")
    raw = np.ascontiguousarray(values, "<f4").tobytes()
    output["parameters"] = {"binary_data_size": len(raw)}
    header = orjson.dumps(answer)
    sent = {"Content-Type": "application/octet-stream"}
    sent["Inference-Header-Content-Length"] = str(len(header))
    return Response(header + raw, headers=sent)


def refusal(answer: Answer) -> RequestError:
    """The error for a client whose request the upstream refused.

    Nothing of the upstream's text is in it: a message may show paths, or values of the network.
    """
    kind = REFUSALS.get(answer.status)
    if kind is None:
        return Unavailable(f"the upstream failed with status {answer.status}")
    return kind(f"the upstream refused the request with status {answer.status}")


def _inputs(listed: object) -> tuple[list[dict[str, Any]], list[int], int]:
    """The inputs with known members alone, the bytes of those that have any, and their images."""
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise BadFraming("inputs must be a list of tensors")
    if not 0 < len(listed) <= MOST_INPUTS:
        raise Unprocessable(f"the request has {len(listed)} inputs; allowed: 1 to {MOST_INPUTS}")
    kept, sizes, images = [], [], 0
    for tensor in listed:
        name, datatype, shape = (tensor.get(each) for each in ("name", "datatype", "shape"))
        if not (isinstance(name, str) and isinstance(datatype, str)):
            raise BadFraming("an input has no name or no datatype")
        label = f"input {brief(name)}"
        _only(tensor, label, {"name", "datatype", "shape", "data", "parameters"})
        _only(parameters_of(tensor), f"parameters of {label}", {"binary_data_size"})
        if (
            not isinstance(shape, list)
            or not 0 < len(shape) <= MOST_SIDES
            or not all(type(side) is int and 0 <= side < 2**31 for side in shape)
            or shape[0] < 1
        ):
            raise Unprocessable(
                f"shape of {label} is {brief(shape)}; allowed: 1 to {MOST_SIDES} whole numbers, "
                "of which the first counts the images"
            )
        if images not in (0, shape[0]):
            raise Unprocessable(f"{label} has {shape[0]} images; the inputs before have {images}")
        images = shape[0]
        known: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
        size = parameters_of(tensor).get("binary_data_size")
        if size is None:
            if not isinstance(tensor.get("data"), list):
                raise BadFraming(f"{label} has no data")
            known["data"] = tensor["data"]
        elif type(size) is not int or size < 0 or "data" in tensor:
            raise BadFraming(f"binary_data_size of {label} is {brief(size)}, beside no data")
        else:
            known["parameters"] = {"binary_data_size": size}
            sizes.append(size)
        kept.append(known)
    return kept, sizes, images


def _the_output(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The requested output; empty if none is named.

    Raises:
        BadFraming: outputs are not a list of outputs.
        Unprocessable: another output, or something else than its values.
    """
    outputs = document.get("outputs")
    if outputs is None or outputs == []:
        return {}
    if not isinstance(outputs, list) or not all(isinstance(each, dict) for each in outputs[:2]):
        raise BadFraming("outputs must be a list of requested outputs")
    names = [each.get("name") for each in outputs[:2]]
    if names != [name]:
        raise Unprocessable(
            f"the {len(outputs)} outputs begin with {brief(names)}; only {name!r} is passed through"
        )
    output: dict[str, Any] = outputs[0]
    _only(output, f"output {name!r}", {"name", "parameters"})
    given = {key: value for key, value in parameters_of(output).items() if value != 0}
    if "classification" in given:
        raise Unprocessable(
            "classification is not passed through; allowed: the values of the output"
        )
    _only(
        parameters_of(output), f"parameters of output {name!r}", {"binary_data", "classification"}
    )
    return output


def _only(given: Mapping[str, Any], what: str, allowed: set[str]) -> None:
    """Refuse members that may mean something to the upstream.

    Raises:
        Unprocessable: there are others than the allowed ones.
    """
    if others := sorted(set(given) - allowed):
        raise Unprocessable(
            f"{what}: {brief(others[0])} is not passed through; "
            f"allowed: {', '.join(sorted(allowed))}"
        )


def _left(deadline: Deadline, now: float) -> float | None:
    """Seconds until a deadline; None without one."""
    return None if deadline.at == math.inf else max(0.0, deadline.at - now)


def _tensors(listed: object) -> list[dict[str, Any]]:
    return [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
