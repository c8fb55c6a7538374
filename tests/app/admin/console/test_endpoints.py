"""The console's endpoints on a real server, and that the public port has none of them."""

import asyncio
import socket
import time
from pathlib import Path

import httpx2
import pytest

from app.access.keys import KeyFile, write_keys
from app.processes.serve import bind
from scumble.evaluation.local_server import children
from scumble.evaluation.local_server import start as start_server
from tests.app.access.test_admission import row
from tests.pictures import PNG, encoded, picture

pytestmark = pytest.mark.server
MARK = {"X-Scumble-Console": "1"}
KIND = {**MARK, "Content-Type": "image/png"}
PATHS = ["/", "/console/static/main.js", "/console/about", "/console/metrics", "/console/clients"]


def preview(server, content=PNG, headers=KIND, **query) -> httpx2.Response:
    return httpx2.post(
        f"{server.admin}/console/preview",
        params=query,
        content=content,
        headers=headers,
        timeout=60,
    )


@pytest.fixture(scope="module")
def server(models):
    found = start_server(
        {
            "model_dir": models,
            "model": "tiny",
            "workers": 1,
            "defense": "dcp",
            "defense_params": {"beta": 1.2, "gamma": 0.1},
            "secret": "very-secret-value",
            "admin_hosts": '["console.example"]',
        }
    )
    found.wait_ready()
    yield found
    assert found.stop() == 0


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_is_closed_to_other_sites(server, path):
    answer = httpx2.get(server.admin + path, headers={"Origin": "http://evil.example"})
    assert answer.status_code == 200
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", PATHS)
def test_a_rebound_name_gets_nothing(server, path):
    answer = httpx2.get(server.admin + path, headers={"Host": "evil.example"})
    assert answer.status_code == 403
    assert answer.headers["content-type"] == "application/problem+json"
    assert httpx2.get(server.admin + path, headers={"Host": "console.example"}).status_code == 200


def test_machines_ask_health_and_metrics_under_any_name(server):
    for path in ("/metrics", "/livez", "/readyz"):
        answer = httpx2.get(server.admin + path, headers={"Host": "scumble.internal:9000"})
        assert answer.status_code == 200


@pytest.mark.parametrize("path", [*PATHS[:2], *PATHS[3:], "/console/preview"])
def test_the_public_port_has_nothing_of_it(server, path):
    assert httpx2.get(server.url + path).status_code == 404
    assert httpx2.post(server.url + path, headers=MARK).status_code == 404


def test_the_page_and_its_files_name_no_other_host(server):
    page = httpx2.get(server.admin).text
    assert "<script>" not in page
    assert "style=" not in page
    static = Path("app/admin/console/static")
    for file in static.iterdir():
        answer = httpx2.get(f"{server.admin}/console/static/{file.name}")
        assert answer.content == file.read_bytes()
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text


@pytest.mark.parametrize("name", ["absent.js", "..%2Froutes.py", "%2e%2e/routes.py"])
def test_there_are_no_other_files(server, name):
    assert httpx2.get(f"{server.admin}/console/static/{name}").status_code == 404


def test_about_tells_what_is_served_and_masks_secrets(server):
    answer = httpx2.get(f"{server.admin}/console/about")
    found = answer.json()
    assert found["model"]["name"] == "tiny"
    assert found["model"]["served_file"] in found["model"]["files"]
    assert found["policy"] == {"defense": "dcp", "params": {"beta": 1.2, "gamma": 0.1}}
    offered = {row["name"]: row for row in found["defenses"]}
    assert offered["dcp"]["start"] == 1.2
    assert offered["dcp"]["params"] == {"beta": 1.2, "gamma": 0.1}
    assert offered["top_k"]["high"] == 4
    settings = {row["name"]: row["value"] for row in found["settings"]}
    assert settings["SCUMBLE_SECRET"] == "**********"
    assert settings["SCUMBLE_ADMIN_HOSTS"] == '["console.example"]'
    assert "very-secret-value" not in answer.text


def test_clients_with_keys_are_counted_over_all_workers(serve, tmp_path):
    keys, store = tmp_path / "keys.json", f"sqlite:///{tmp_path}/budgets"
    rows = (row("a", client="acme", limits={"total_images": 40}), row("b", client="other"))
    write_keys(keys, KeyFile(keys=rows))
    server = serve(workers=2, keys_file=keys, store=store)
    for key, times in (("a", 9), ("b", 4)):
        for _ in range(times):
            headers = {**KIND, "X-API-Key": key}  # a connection each: both workers get some
            answer = httpx2.post(f"{server.url}/v1/predict", content=PNG, headers=headers)
            assert answer.status_code == 200
    found = httpx2.get(f"{server.admin}/console/clients").json()
    budget = {"limits": {"total": 40}, "left": {"total": 31}}
    same = {"withheld": 0, "refused": 0, "policies": ["as served"]}
    assert found["clients"] == [
        {"name": "acme", "images": 9, **same, **budget},
        {"name": "other", "images": 4, **same, "limits": {}, "left": {}},
    ]


def test_clients_are_not_counted_while_keys_are_off(server):
    found = httpx2.get(f"{server.admin}/console/clients").json()
    assert found["clients"] == []
    assert "off" in found["note"]


def test_metrics_are_totals_of_what_was_answered(server):
    before = httpx2.get(f"{server.admin}/console/metrics").json()
    with httpx2.Client() as client:
        for content in (PNG, PNG, PNG, b"x"):
            client.post(f"{server.url}/v1/predict", content=content, headers=KIND)
        time.sleep(0.3)
        after = httpx2.get(f"{server.admin}/console/metrics").json()
    assert after["ready"] is True
    assert after["time"] > before["time"]
    assert after["requests"]["2xx"] - before["requests"]["2xx"] == 3
    assert after["requests"]["4xx"] - before["requests"]["4xx"] == 1
    assert after["images"] - before["images"] == 3
    assert after["defended"] - before["defended"] == 3
    assert after["l1"]["sum"] > before["l1"]["sum"]
    infer = after["stages"]["infer"]
    assert infer["count"] - before["stages"]["infer"]["count"] == 3
    assert len(infer["bounds"]) == len(infer["below"])
    assert infer["below"] == sorted(infer["below"])
    assert infer["below"][-1] == infer["count"]
    (worker,) = after["workers"]
    assert worker["pid"] in server.workers()
    assert worker["memory"] > 2**20
    assert worker["connections"] >= 1


@pytest.mark.anyio
async def test_answers_on_a_kept_connection_are_not_delayed_by_nagle():
    """The delay would be 40 ms for an answer that is sent in two writes."""
    loop = asyncio.get_running_loop()
    connected = loop.create_future()

    class Accepted(asyncio.Protocol):
        def connection_made(self, transport):
            accepted = transport.get_extra_info("socket")
            connected.set_result(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            transport.close()

    listener = bind("127.0.0.1", 0)
    async with await loop.create_server(Accepted, sock=listener):
        with socket.create_connection(listener.getsockname()):
            assert await connected == 1


def test_a_stronger_defense_moves_the_same_picture_further(server):
    found = []
    for beta in (0, 0.6, 1.2, 2.4):
        answer = preview(server, defense="reverse_sigmoid", params=f'{{"beta": {beta}}}')
        assert answer.status_code == 200
        shown = answer.json()
        clean, defended = (shown[side]["probabilities"] for side in ("clean", "defended"))
        assert sum(clean) == pytest.approx(1, abs=1e-4)
        distance = sum(abs(a - b) for a, b in zip(clean, defended, strict=True))
        assert shown["l1"] == pytest.approx(distance, abs=1e-4)
        found.append(shown)
    distances = [shown["l1"] for shown in found]
    assert distances == sorted(distances)
    assert distances[0] < 1e-5 < distances[-1]
    assert all(shown["clean"] == found[0]["clean"] for shown in found)
    assert found[-1]["honest"]["golden"] == 6
    assert found[-1]["honest"]["pictures"] >= 1
    assert found[-1]["seen"].startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    ("defense", "params"),
    [
        ("dcp", '{"beta": 1.0, "keep_top1": true}'),
        ("random", '{"epsilon": 0.5}'),
        ("round", '{"decimals": 1}'),
        ("top_k", '{"k": 2}'),
        ("label", "{}"),
        ("none", "{}"),
        ("active", "{}"),
    ],
)
def test_every_defense_of_the_page_can_be_shown(server, defense, params):
    for query in ({}, {"golden": 3}):
        answer = preview(server, defense=defense, params=params, **query)
        assert answer.status_code == 200, answer.text
        assert sum(answer.json()["defended"]["probabilities"]) == pytest.approx(1, abs=1e-4)


NONE = {"defense": "none"}
BAD = {
    "no defense": ({}, PNG, KIND, 422),
    "a defense from a file": ({"defense": "/tmp/evil.py:Evil"}, PNG, KIND, 422),  # noqa: S108
    "a chain, which could name a file": ({"defense": "chain"}, PNG, KIND, 422),
    "no JSON": ({**NONE, "params": "{"}, PNG, KIND, 422),
    "no object": ({**NONE, "params": "[]"}, PNG, KIND, 422),
    "deep JSON": ({**NONE, "params": "[" * 5000}, PNG, KIND, 422),
    "unknown parameter": ({"defense": "dcp", "params": '{"zeta": 1}'}, PNG, KIND, 422),
    "missing parameter": ({"defense": "dcp"}, PNG, KIND, 422),
    "out of range": ({"defense": "dcp", "params": '{"beta": 1e99}'}, PNG, KIND, 422),
    "wrong type": ({"defense": "dcp", "params": '{"beta": [[]]}'}, PNG, KIND, 422),
    "the secret": ({"defense": "random", "params": '{"secret": "x"}'}, PNG, KIND, 422),
    "golden 0": ({**NONE, "golden": "0"}, b"", MARK, 422),
    "golden 7": ({**NONE, "golden": "7"}, b"", MARK, 422),
    "golden x": ({**NONE, "golden": "x" * 99}, b"", MARK, 422),
    "no image": (NONE, b"", KIND, 422),
    "noise": (NONE, bytes(range(256)) * 40, KIND, 422),
    "cut off": (NONE, PNG[:-60], KIND, 422),
    "too many bytes": (NONE, bytes(11 * 2**20), KIND, 413),
    "too many pixels": (NONE, encoded(picture(2500, 2000)), KIND, 413),
    "another type": (NONE, PNG, {**MARK, "Content-Type": "text/plain"}, 415),
    "no mark": (NONE, PNG, {"Content-Type": "image/png"}, 403),
    "another origin": (NONE, PNG, {**KIND, "Origin": "http://evil.example"}, 403),
    "another host": (NONE, PNG, {**KIND, "Host": "evil.example"}, 403),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_questions_are_problems_of_the_asker(server, name):
    query, content, headers, status = BAD[name]
    answer = preview(server, content, headers, **query)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["error"] == answer.json()["detail"] != ""
    assert answer.headers["x-frame-options"] == "DENY"


def test_preview_takes_post_only_and_other_methods_nothing(server):
    answer = httpx2.get(f"{server.admin}/console/preview")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert httpx2.options(f"{server.admin}/console/preview", headers=MARK).status_code == 405


def test_a_server_without_a_console_has_only_health_and_metrics(serve):
    server = serve(console="false", workers=1)
    for path in PATHS:
        assert httpx2.get(server.admin + path).status_code == 404
    assert httpx2.get(f"{server.admin}/readyz").status_code == 200
    assert preview(server, **NONE).status_code == 404


def test_the_preview_process_ends_with_the_service(serve):
    server = serve(workers=1)
    before = set(children(server.process.pid))
    assert preview(server, **NONE).status_code == 200
    (process,) = set(children(server.process.pid)) - before
    assert server.stop() == 0
    assert not Path(f"/proc/{process}").exists()


def test_a_policy_that_has_no_slider_is_offered_as_it_is(serve):
    steps = [["dcp", {"beta": 1.0}], ["round", {"decimals": 2}]]
    server = serve(workers=1, defense="chain", defense_params={"steps": steps})
    rows = httpx2.get(f"{server.admin}/console/about").json()["defenses"]
    assert rows[0]["name"] == "active"
    answer = preview(server, defense="active")
    assert answer.status_code == 200
    assert answer.json()["defense"].startswith("Chain(")
