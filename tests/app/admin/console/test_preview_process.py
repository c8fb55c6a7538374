"""The preview process: started when asked, ended when idle, replaced when it fails."""

import asyncio
import os
import shutil
import signal
from pathlib import Path

import orjson
import pytest

from app.admin.console.preview import REMEMBERED, Previewer, PreviewRequest
from app.admin.console.preview_process import WAITING, PreviewProcess
from app.errors import Unavailable, Unprocessable
from app.settings import Settings
from tests.pictures import PNG, encoded, picture

GOLDEN = PreviewRequest("none", {}, 1)


@pytest.fixture
def settings(models) -> Settings:
    return Settings(model_dir=models, model="tiny")


def with_helper(settings, body, **options):
    async def run():
        process = PreviewProcess(settings, **options)
        try:
            return await body(process)
        finally:
            process.close()

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
    async def body(process):
        assert process.pid is None
        status, answer = await process(GOLDEN, b"")
        assert status == 200
        assert orjson.loads(answer)["l1"] == 0
        first = process.pid
        await process(PreviewRequest("dcp", {"beta": 1.0}), PNG)
        assert process.pid == first
        await until(lambda: process.pid is None)
        assert gone(first)
        status, _ = await process(GOLDEN, b"")
        assert status == 200
        return process.pid

    assert gone(with_helper(settings, body, idle_s=0.5))


def test_it_gives_way_to_the_workers(settings):
    async def body(process):
        await process(GOLDEN, b"")
        assert os.getpriority(os.PRIO_PROCESS, process.pid) > os.getpriority(os.PRIO_PROCESS, 0)
        assert first_to_end(process.pid)

    with_helper(settings, body)


def test_a_killed_one_is_replaced(settings):
    async def body(process):
        await process(GOLDEN, b"")
        pid = process.pid
        os.kill(pid, signal.SIGKILL)
        await until(lambda: process.pid is None)
        status, _ = await process(GOLDEN, b"")
        assert status == 200
        assert process.pid != pid

    with_helper(settings, body)


def test_one_that_hangs_is_killed_and_replaced(settings):
    async def body(process):
        await process(GOLDEN, b"")
        pid = process.pid
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(Unavailable, match="ended"):
            await process(PreviewRequest("none"), bytes(2**20))  # more than the pipe holds
        assert gone(pid)
        status, _ = await process(GOLDEN, b"")
        assert status == 200

    with_helper(settings, body, answer_s=5)


def test_even_a_stopped_one_is_ended(settings):
    async def body(process):
        await process(GOLDEN, b"")
        os.kill(process.pid, signal.SIGSTOP)
        return process.pid

    assert gone(with_helper(settings, body))


def test_few_may_wait(settings):
    async def body(process):
        asked = [process(GOLDEN, b"") for _ in range(WAITING + 3)]
        return await asyncio.gather(*asked, return_exceptions=True)

    found = with_helper(settings, body)
    assert sum(isinstance(one, Unavailable) for one in found) == 3
    assert sum(isinstance(one, tuple) and one[0] == 200 for one in found) == WAITING


def test_after_a_reload_another_process_answers(settings, own_models):
    version_2 = settings.model_copy(update={"model_dir": own_models})

    async def body(process):
        await process(GOLDEN, b"")
        first = process.pid
        process.use(settings)
        await process(GOLDEN, b"")
        assert process.pid == first
        shutil.rmtree(own_models / "tiny")
        process.use(version_2)
        status, _ = await process(GOLDEN, b"")
        assert status == 503  # it asked the new folder
        assert process.pid != first
        await until(lambda: gone(first))

    with_helper(settings, body)


def test_a_bundle_that_has_gone_is_named(own_models):
    settings = Settings(model_dir=own_models, model="tiny")
    (own_models / "tiny" / "float32.onnx").unlink()

    async def body(process):
        return await process(GOLDEN, b"")

    status, answer = with_helper(settings, body)
    assert status == 503
    assert "float32.onnx" in orjson.loads(answer)["detail"]


def test_the_rows_are_those_of_the_service(settings, make_client):
    params = {"beta": 1.2}
    shown = Previewer(settings)(PreviewRequest("dcp", params), PNG)
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
    shown = Previewer(settings)(PreviewRequest("random", {"epsilon": 1.0}), PNG)
    sent = make_client(**drawn).post(
        "/v1/predict", content=PNG, headers={"Content-Type": "image/png"}
    )
    expected = sent.json()["predictions"][0]["probabilities"]
    assert shown["defended"]["probabilities"].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_what_is_withheld_is_marked_and_counted(precision):
    previewer = Previewer(Settings(model="mnist", precision=precision))
    ask = PreviewRequest("withhold", {"loss": 0.01})
    digit = Path("docs/digits/3.png").read_bytes()
    answered = previewer(ask, digit)
    assert (answered["abstained"], answered["withheld"]) == (False, False)
    assert answered["defended"]["label"] == "3"
    foreign = previewer(ask, encoded(picture(28, 28, "L")))
    assert (foreign["abstained"], foreign["withheld"]) == (True, True)
    assert foreign["defended"]["probabilities"].tolist() == pytest.approx([0.1] * 10)
    assert foreign["label_changed"] is False
    assert foreign["honest"]["withheld"] > answered["honest"]["withheld"] > 0
    drawn = previewer(PreviewRequest("withhold", {"withheld": "keyed"}), digit)
    assert (drawn["abstained"], drawn["withheld"]) == (False, False)
    open_to_all = previewer(PreviewRequest("codebook", {}), digit)
    assert open_to_all["honest"]["withheld"] == 0
    assert open_to_all["clean"]["probabilities"].tolist() == (
        answered["clean"]["probabilities"].tolist()
    )


def test_pictures_count_once_and_the_oldest_is_forgotten(settings):
    previewer = Previewer(settings)
    ask = PreviewRequest("label", {})
    assert previewer(PreviewRequest("label", {}, 2), b"")["honest"]["pictures"] == 0
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
        previewer(PreviewRequest("none"), b"no picture")
    assert previewer(GOLDEN, b"")["honest"]["pictures"] == 0
