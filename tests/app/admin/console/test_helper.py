"""The preview process: started when asked, ended when idle, replaced when it fails."""

import asyncio
import os
import shutil
import signal
from pathlib import Path

import orjson
import pytest

from app.admin.console.helper import WAITING, Helper
from app.admin.console.preview import REMEMBERED, Previewer, Question
from app.errors import Unavailable, Unprocessable
from app.settings import Settings
from tests.pictures import PNG, encoded, picture

GOLDEN = Question("none", {}, 1)


@pytest.fixture
def settings(models) -> Settings:
    return Settings(model_dir=models, model="tiny")


def with_helper(settings, body, **options):
    async def run():
        helper = Helper(settings, **options)
        try:
            return await body(helper)
        finally:
            helper.close()

    return asyncio.run(run())


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def first_to_end(pid: int) -> bool:
    return Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000"


async def until(condition, seconds=10.0):
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    pytest.fail("it never came to that")


def test_it_starts_when_asked_stays_and_ends_when_idle(settings):
    async def body(helper):
        assert helper.pid is None
        status, answer = await helper(GOLDEN, b"")
        assert status == 200
        assert orjson.loads(answer)["l1"] == 0
        first = helper.pid
        await helper(Question("dcp", {"beta": 1.0}), PNG)
        assert helper.pid == first
        await until(lambda: helper.pid is None)
        assert gone(first)
        status, _ = await helper(GOLDEN, b"")
        assert status == 200
        return helper.pid

    assert gone(with_helper(settings, body, idle_s=0.5))


def test_it_gives_way_to_the_workers(settings):
    async def body(helper):
        await helper(GOLDEN, b"")
        assert os.getpriority(os.PRIO_PROCESS, helper.pid) > os.getpriority(os.PRIO_PROCESS, 0)
        assert first_to_end(helper.pid)

    with_helper(settings, body)


def test_a_killed_one_is_replaced(settings):
    async def body(helper):
        await helper(GOLDEN, b"")
        pid = helper.pid
        os.kill(pid, signal.SIGKILL)
        await until(lambda: helper.pid is None)
        status, _ = await helper(GOLDEN, b"")
        assert status == 200
        assert helper.pid != pid

    with_helper(settings, body)


def test_one_that_hangs_is_killed_and_replaced(settings):
    async def body(helper):
        await helper(GOLDEN, b"")
        pid = helper.pid
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(Unavailable, match="ended"):
            await helper(Question("none"), bytes(2**20))  # more than the pipe holds
        assert gone(pid)
        status, _ = await helper(GOLDEN, b"")
        assert status == 200

    with_helper(settings, body, answer_s=5)


def test_even_a_stopped_one_is_ended(settings):
    async def body(helper):
        await helper(GOLDEN, b"")
        os.kill(helper.pid, signal.SIGSTOP)
        return helper.pid

    assert gone(with_helper(settings, body))


def test_few_may_wait(settings):
    async def body(helper):
        asked = [helper(GOLDEN, b"") for _ in range(WAITING + 3)]
        return await asyncio.gather(*asked, return_exceptions=True)

    found = with_helper(settings, body)
    assert sum(isinstance(one, Unavailable) for one in found) == 3
    assert sum(isinstance(one, tuple) and one[0] == 200 for one in found) == WAITING


def test_after_a_reload_another_process_answers(settings, own_models):
    version_2 = settings.model_copy(update={"model_dir": own_models})

    async def body(helper):
        await helper(GOLDEN, b"")
        first = helper.pid
        helper.use(settings)
        await helper(GOLDEN, b"")
        assert helper.pid == first
        shutil.rmtree(own_models / "tiny")
        helper.use(version_2)
        status, _ = await helper(GOLDEN, b"")
        assert status == 503  # it asked the new folder
        assert helper.pid != first
        await until(lambda: gone(first))

    with_helper(settings, body)


def test_a_bundle_that_has_gone_is_named(own_models):
    settings = Settings(model_dir=own_models, model="tiny")
    (own_models / "tiny" / "float32.onnx").unlink()

    async def body(helper):
        return await helper(GOLDEN, b"")

    status, answer = with_helper(settings, body)
    assert status == 503
    assert "float32.onnx" in orjson.loads(answer)["detail"]


def test_the_rows_are_those_of_the_service(settings, make_client):
    params = {"beta": 1.2}
    shown = Previewer(settings)(Question("dcp", params), PNG)
    answers = {}
    for name, given in (("none", {}), ("dcp", params)):
        client = make_client(defense=name, defense_params=given)
        sent = client.post("/v1/predict", content=PNG, headers={"Content-Type": "image/png"})
        answers[name] = sent.json()["predictions"][0]
    for name, side in (("none", "clean"), ("dcp", "defended")):
        assert shown[side]["label"] == answers[name]["label"]
        assert shown[side]["probabilities"].tolist() == pytest.approx(
            answers[name]["probabilities"], abs=1e-5
        )


def test_a_random_defense_draws_as_the_service_does(models, make_client):
    drawn = {"defense": "random", "defense_params": {"epsilon": 1.0}, "secret": "0123456789abcdef"}
    settings = Settings(model_dir=models, model="tiny", **drawn)
    shown = Previewer(settings)(Question("random", {"epsilon": 1.0}), PNG)
    sent = make_client(**drawn).post(
        "/v1/predict", content=PNG, headers={"Content-Type": "image/png"}
    )
    expected = sent.json()["predictions"][0]["probabilities"]
    assert shown["defended"]["probabilities"].tolist() == pytest.approx(expected, abs=1e-5)


def test_pictures_count_once_and_the_oldest_is_forgotten(settings):
    previewer = Previewer(settings)
    ask = Question("label", {})
    assert previewer(Question("label", {}, 2), b"")["honest"]["pictures"] == 0
    for _ in range(3):
        assert previewer(ask, PNG)["honest"]["pictures"] == 1
    for seed in range(REMEMBERED + 5):
        found = previewer(ask, encoded(picture(seed=seed + 10)))
    assert found["honest"]["pictures"] == REMEMBERED
    assert 0 < found["honest"]["mean_l1"] <= 2
    assert found["honest"]["changed_labels"] == 0


def test_a_refused_picture_is_not_remembered(settings):
    previewer = Previewer(settings)
    with pytest.raises(Unprocessable):
        previewer(Question("none"), b"no picture")
    assert previewer(GOLDEN, b"")["honest"]["pictures"] == 0
