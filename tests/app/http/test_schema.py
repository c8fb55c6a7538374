"""Schemathesis drives every route of the OpenAPI document with made-up and broken requests."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.access.admission import OPEN
from app.access.keys import KeyFile, write_keys
from app.main import create_app
from app.settings import Settings
from tests.app.access.test_admission import row


def no_server_error(ctx, response, case):
    """An answer of 504 is right where the request itself sets a deadline."""
    headers = {name.lower() for name in case.headers or {}}
    if response.status_code == 504 and "x-deadline-ms" in headers:
        return None
    return not_a_server_error(ctx, response, case)


CHECKS = [
    no_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]

ROUTES = [
    "POST /v1/predict",
    "GET /v2",
    "GET /v2/health/live",
    "GET /v2/health/ready",
    "GET /v2/models/{model}",
    "GET /v2/models/{model}/ready",
    "POST /v2/models/{model}/infer",
    "GET /v2/models/{model}/versions/{version}",
    "GET /v2/models/{model}/versions/{version}/ready",
    "POST /v2/models/{model}/versions/{version}/infer",
    "GET /v1/model",
    "GET /livez",
    "GET /readyz",
]


@pytest.fixture(scope="module")
def operations(models):
    return driven(Settings(model_dir=models, model="tiny"))


def driven(options):
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(options))
    found = [result.ok() for result in schema.get_all_operations()]
    return {f"{operation.method.upper()} {operation.path}": operation for operation in found}


@pytest.fixture(scope="module")
def keyed(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = (
        row("plain"),
        row("three", limits={"window_images": 3, "total_images": 4}),
        row("gone", revoked="2026-01-02T00:00:00+00:00"),
        row("narrow", routes=["/v1/model"]),
    )
    write_keys(path, KeyFile(keys=keys))
    return driven(Settings(model_dir=models, model="tiny", keys_file=path, workers=1))


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("route", ROUTES)
def test_every_answer_is_as_the_document_says(operations, route, mode):
    statuses = set()

    @settings(
        max_examples=60,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )
    @given(case=operations[route].as_strategy(generation_mode=mode))
    def check(case):
        answer = case.call()
        statuses.add(answer.status_code)
        case.validate_response(answer, checks=CHECKS)

    run(check)
    if route == "POST /v1/predict":
        assert statuses & {400, 413, 415, 422}


def run(check):
    try:
        check()
    except Exception as exc:
        # A route without parameters or body has no request that is wrong by the document.
        if type(exc).__name__ != "Unsatisfiable":
            raise


def test_all_routes_are_driven(operations, keyed):
    assert set(operations) == set(keyed) == set(ROUTES)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("route", ROUTES)
def test_the_same_with_keys_on(keyed, route, mode):
    """With a key, with one whose images are soon spent, a revoked one, a made-up one and none."""
    statuses = set()

    @settings(
        max_examples=40,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )
    @given(
        case=keyed[route].as_strategy(generation_mode=mode),
        key=st.sampled_from(["plain", "plain", "three", "gone", "narrow", "nobody", None]),
    )
    def check(case, key):
        case.headers = {
            name: value
            for name, value in (case.headers or {}).items()
            if name.lower() not in ("authorization", "x-api-key")
        }
        answer = case.call(headers={"X-API-Key": key} if key else {})
        statuses.add(answer.status_code)
        case.validate_response(answer, checks=CHECKS)
        if route.partition(" ")[2] in OPEN:
            assert answer.status_code == 200
        elif key in ("nobody", None):
            assert answer.status_code == 401
        elif key == "gone":
            assert answer.status_code == 403

    run(check)
