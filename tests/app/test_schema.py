"""Schemathesis drives every route of the OpenAPI document with made-up and broken requests."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.main import create_app
from app.settings import Settings

CHECKS = [
    not_a_server_error,
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
    app = create_app(Settings(model_dir=models, model="tiny"))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    found = [result.ok() for result in schema.get_all_operations()]
    return {f"{operation.method.upper()} {operation.path}": operation for operation in found}


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

    try:
        check()
    except Exception as exc:
        # A route without parameters or body has no request that is wrong by the document.
        if type(exc).__name__ != "Unsatisfiable":
            raise
    if route == "POST /v1/predict":
        assert statuses & {400, 413, 415, 422}


def test_all_routes_are_driven(operations):
    assert set(operations) == set(ROUTES)
