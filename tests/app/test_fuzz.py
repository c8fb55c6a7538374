"""A slice of what `python -m tests.fuzz` does for as long as one likes."""

import asyncio
import random

import pytest

from app.audit.hash_chain import verify
from tests.fuzz import Broken, ask, damaged, fuzz
from tests.seeds import CORPUS, corpus, read, seeds


@pytest.fixture(scope="module")
def client(make_shared_client):
    return make_shared_client()


def test_thousands_of_broken_requests_get_answers(models, tmp_path):
    (tmp_path / "tiny").symlink_to(models / "tiny")
    statuses = asyncio.run(fuzz(tmp_path, 4000, seed=7))
    assert statuses.total() == 4000
    assert {200, 400, 401, 404, 405, 413, 415, 422, 429} <= set(statuses)
    parts, faults = verify([tmp_path / "audit.worker-0"])
    assert faults == []
    assert len(parts[0].seals) > 1000


def test_the_corpus_is_what_the_code_makes():
    # Not byte for byte: another release of a codec writes the same picture otherwise.
    assert {path.stem for path in CORPUS.glob("*.http")} == set(seeds())
    assert sum(path.stat().st_size for path in CORPUS.iterdir()) < 50_000


@pytest.mark.parametrize("name", seeds())
def test_every_seed_is_answered_undamaged(client, name):
    asked = read(CORPUS / f"{name}.http")
    headers = [(key.decode(), value.decode()) for key, value in asked.headers]
    answer = client.request(asked.method, asked.target, headers=headers, content=asked.body)
    assert answer.status_code == 200, answer.text


def test_writing_a_request_down_keeps_it(tmp_path):
    for number, asked in enumerate(corpus()):
        (tmp_path / str(number)).write_bytes(asked.written())
        assert read(tmp_path / str(number)) == asked


async def crashes(scope, receive, send) -> None:
    raise ValueError("a fault")


async def fails(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 500, "headers": []})


async def says_nothing(scope, receive, send) -> None:
    pass


@pytest.mark.parametrize("app", [crashes, fails, says_nothing])
def test_a_fault_would_be_noticed(app):
    draw = random.Random(1)  # noqa: S311  # no secret
    with pytest.raises(Broken):
        asyncio.run(ask(app, damaged(corpus()[0], corpus(), draw), draw))
