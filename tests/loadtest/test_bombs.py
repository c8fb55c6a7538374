"""What `python -m loadtest.bombs` sends and calls a failure; the run itself takes minutes."""

import httpx2
import pytest

from loadtest.bomb_files import FILES, MOST_BYTES, png
from loadtest.bombs import TARGETS, form, instances, raw, send, summary, v2_bytes, v2_json, verdict

GOOD = {
    "status": 422,
    "hold_ms": 9,
    "livez_ms": 10,
    "memory_mib": 3,
    "loop_cpu_ms": 4,
    "seconds": 1,
}


def test_all_is_well():
    found = summary({"one": GOOD, "another": {**GOOD, "hold_ms": 12, "status": 503}})
    assert verdict(found) == []
    assert found["worst"]["hold_ms"] == {"value": 12, "request": "another"}
    assert found["statuses"] == {"422": 1, "503": 1}


@pytest.mark.parametrize(
    "bad", [*({name: limit + 1} for name, limit in TARGETS.items()), {"status": 500}]
)
def test_what_must_not_be(bad):
    assert len(verdict(summary({"one": GOOD, "another": {**GOOD, **bad}}))) == 1


def test_the_corpus_is_large_and_its_files_are_small():
    assert len(FILES) >= 40
    for name, make in FILES.items():
        if "300-mib" not in name:
            assert len(make()) <= MOST_BYTES, name


def test_every_form_of_request_is_answered_and_measured(models, preloaded):
    with preloaded.serving(model_dir=models, model="tiny", workers=1) as server:
        (worker,) = server.workers()
        with httpx2.Client(base_url=server.url) as client:
            for pack in (form, instances, v2_bytes, v2_json):
                bomb = pack(png(), png())
                bomb = bomb._replace(path=bomb.path.replace("cifar10", "tiny"))
                assert send(server, worker, client, bomb)["status"] == 200, pack
            figures = send(server, worker, client, raw(FILES["jpeg-62000-empty-segments"]()))
    assert figures["status"] == 422
    assert figures["livez_ms"] > 0
    assert figures["loop_cpu_ms"] > 0
