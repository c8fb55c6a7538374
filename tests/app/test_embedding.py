"""The service as a part of somebody else's application."""

from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from app.access.keys import KeyFile, write_keys
from app.main import create_app
from app.settings import Settings
from tests.app.access.test_admission import row
from tests.pictures import PNG

KIND = {"Content-Type": "image/png"}


def within(framework, classifier):
    """An application that mounts the service and runs its lifespan."""

    @asynccontextmanager
    async def lifespan(application):
        async with classifier.router.lifespan_context(classifier):
            yield

    if framework is FastAPI:
        application = FastAPI(lifespan=lifespan)
        application.mount("/classifier", classifier)
        return application
    return Starlette(routes=[Mount("/classifier", classifier)], lifespan=lifespan)


@pytest.mark.parametrize("framework", [FastAPI, Starlette])
def test_a_mounted_service_answers_below_its_path(models, framework):
    classifier = create_app(Settings(model_dir=models, model="tiny", root_path="/classifier"))
    with TestClient(within(framework, classifier)) as client:
        answer = client.post("/classifier/v1/predict", content=PNG, headers=KIND)
        assert (answer.status_code, answer.json()["model"]) == (200, "tiny")
        assert client.get("/classifier/v2").json()["name"] == "scumble"
        assert client.get("/classifier/readyz").json() == {"status": "ready"}
        document = client.get("/classifier/openapi.json").json()
        assert document["servers"] == [{"url": "/classifier"}]
        refused = client.post("/classifier/v1/predict", content=b"x", headers=KIND)
        assert (refused.status_code, refused.headers["content-type"]) == (
            422,
            "application/problem+json",
        )
        assert client.get("/classifier/nowhere").headers["content-type"] == (
            "application/problem+json"
        )
        assert client.get("/v1/model").status_code == 404  # a path of the other application
    metrics = classifier.state.service.metrics
    metrics.flush()
    shown = generate_latest(metrics.registry).decode()
    assert 'scumble_requests_total{code="200",route="/v1/predict"} 1.0' in shown


def test_its_lifespan_keeps_budgets_and_writes_the_audit_log(models, tmp_path):
    log = tmp_path / "audit.jsonl"
    write_keys(tmp_path / "keys.json", KeyFile(keys=(row("one"),)))
    settings = Settings(
        model_dir=models, model="tiny", root_path="/classifier", audit_file=log,
        keys_file=tmp_path / "keys.json", workers=1,
    )  # fmt: skip
    headers = {**KIND, "X-API-Key": "one"}
    with TestClient(within(FastAPI, create_app(settings))) as client:
        assert client.post("/classifier/v1/predict", content=PNG, headers=KIND).status_code == 401
        answer = client.post("/classifier/v1/predict", content=PNG, headers=headers)
        assert answer.status_code == 200
    written = "".join(file.read_text() for file in tmp_path.glob("audit*"))
    assert answer.json()["id"] in written
