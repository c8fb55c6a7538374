"""Keys and budgets over the public port: who is admitted, what they see, what they are charged."""

import re

import numpy as np
import pytest

from app.access.keys import Key, KeyFile, digest, write_keys
from app.access.stores import StoreError
from app.errors import ConfigError
from app.main import create_app
from app.settings import Settings
from tests.app import blocking_defense, probe_defenses
from tests.app.http.test_application import check_problem, samples
from tests.pictures import PNG

IMAGE = ("image", ("x.png", PNG, "image/png"))
BAD = ("image", ("x.png", b"x", "image/png"))


def row(key: str, **changes) -> Key:
    plain = {
        "id": f"id-{key}",
        "sha256": digest(key.encode()).hex(),
        "client": key,
        "created": "2026-01-01T00:00:00+00:00",
    }
    return Key.model_validate(plain | changes)


KEYS = (
    row("plain"),
    row("gone", revoked="2026-01-02T00:00:00+00:00", defense="magic"),
    row("narrow", routes=["/v1/model"]),
    row("predicts", routes=["/v1/predict", "/v2/models"]),
    row("clean", defense="none"),
    row("defended", defense="dcp", defense_params={"beta": 1.2}),
    row("rounded", output={"form": "rounded", "decimals": 1}),
    row("two", output={"form": "top_k", "k": 2}),
    row("label", defense="dcp", defense_params={"beta": 1.2}, output={"form": "label"}),
    row("five", limits={"total_images": 5}),
    row("hourly", limits={"window_images": 4, "window_s": 3600, "total_images": 100}),
    row("open", limits={"total_images": 5}, on_store_failure="open"),
)


@pytest.fixture
def keys_file(tmp_path):
    path = tmp_path / "keys.json"
    write_keys(path, KeyFile(keys=KEYS))
    return path


@pytest.fixture
def keyed(make_client, keys_file):
    """`keyed(**settings)` -> a client of an application with those keys."""

    def make(**settings):
        return make_client(**{"keys_file": keys_file, "workers": 1, **settings})

    return make


@pytest.fixture
def client(keyed):
    return keyed()


def ask(client, key: str | None, n: int = 1, **options):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return client.post("/v1/predict", files=[IMAGE] * n, headers=headers, **options)


def probabilities(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([row["probabilities"] for row in answer.json()["predictions"]])


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer plain"},
        {"authorization": "bearer  plain "},
        {"X-API-Key": "plain"},
        {"X-API-Key": "plain", "Authorization": "Basic eDp5"},
        {"X-API-Key": "wrong", "Authorization": "Bearer plain"},
    ],
)
def test_a_key_opens(client, headers):
    assert client.post("/v1/predict", files=[IMAGE], headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "plain"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer Plain"},
        {"Authorization": "Bearer plain plain"},
        {"Authorization": b"Bearer \xff\xfe\x80"},
        {"X-API-Key": ""},
        {"X-API-Key": "x" * 60_000},
        {"X-API-Key": digest(b"plain").hex()},
        {"X-API-Key": "\t"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/predict"), ("POST", "/v2/models/tiny/infer"), ("GET", "/v1/model")],
)
def test_no_key_or_a_wrong_one_is_401(client, headers, method, path):
    before = len(samples(client))
    answer = client.request(method, path, headers=headers)
    assert answer.status_code == 401
    check_problem(answer)
    assert answer.headers["www-authenticate"].startswith('Bearer realm="scumble"')
    assert samples(client)['scumble_rejections_total{"reason": "unauthorized"}'] == 1
    for _ in range(5):
        client.request(method, path, headers={"X-API-Key": "another"})
    assert len(samples(client)) <= before + 1  # the count of this route's 401


def test_health_and_the_document_are_open(client):
    for path in ("/livez", "/readyz", "/openapi.json"):
        assert client.get(path).status_code == 200
    document = client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert {"401", "403", "429"} <= document["paths"]["/v1/predict"]["post"]["responses"].keys()
    assert "401" not in document["paths"]["/livez"]["get"]["responses"]


def test_revoked_is_403(client):
    answer = ask(client, "gone")
    assert answer.status_code == 403
    check_problem(answer)
    assert samples(client)['scumble_rejections_total{"reason": "forbidden"}'] == 1


def test_routes_of_a_key(client):
    def status(key, method, path):
        return client.request(method, path, headers={"X-API-Key": key}).status_code

    assert status("narrow", "GET", "/v1/model") == 200
    assert status("narrow", "POST", "/v1/predict") == 403
    assert status("narrow", "POST", "/v2/models/tiny/infer") == 403
    assert status("predicts", "GET", "/v1/model") == 403
    assert status("predicts", "POST", "/v2/models/tiny/infer") == 400
    assert status("predicts", "POST", "/v1/predict") == 422


@pytest.mark.parametrize("server", ["none", "dcp"])
@pytest.mark.parametrize("execution", ["inline", "thread"])
def test_each_key_gets_its_own_defense_and_output(keyed, make_client, server, execution):
    """Whether the server's own runs in the graph (dcp) or not, and in whatever company."""
    params = {"beta": 1.2} if server == "dcp" else {}
    client = keyed(
        defense=server, defense_params=params, batch={"execution": execution, "max_size": 2}
    )
    clean = probabilities(ask(make_client(), None))[0]
    dcp = probabilities(ask(make_client(defense="dcp", defense_params={"beta": 1.2}), None))[0]
    own = dcp if server == "dcp" else clean
    expected = {"plain": own, "clean": clean, "defended": dcp}
    for key, wanted in expected.items():
        np.testing.assert_allclose(probabilities(ask(client, key))[0], wanted, atol=2e-6)
    assert np.abs(clean - dcp).max() > 0.1
    rounded = probabilities(ask(client, "rounded"))[0]
    np.testing.assert_allclose(rounded * 10, np.rint(rounded * 10), atol=1e-5)
    assert (probabilities(ask(client, "two"))[0] > 0).sum() == 2
    label = probabilities(ask(client, "label", 5))
    np.testing.assert_array_equal(label, np.eye(4)[[dcp.argmax()] * len(label)])


FORMS = {
    "FP32": np.zeros((3, 3, 8, 8), np.float32),
    "UINT8": np.zeros((3, 8, 8, 3), np.uint8),
}


def infer(client, form, key):
    data = FORMS[form]
    tensor = {
        "name": "pixels",
        "datatype": form,
        "shape": list(data.shape),
        "data": data.tolist(),
    }
    answer = client.post(
        "/v2/models/tiny/infer", json={"inputs": [tensor]}, headers={"X-API-Key": key}
    )
    return np.array(answer.json()["outputs"][0]["data"]).reshape(3, 4)


@pytest.mark.parametrize("form", FORMS)
def test_tensors_have_the_same_policies(client, form):
    assert sorted(infer(client, form, "label")[0]) == [0, 0, 0, 1]


def test_no_client_meets_the_first_batch_of_a_defense(make_client, tmp_path):
    path = tmp_path / "keys.json"
    write_keys(path, KeyFile(keys=(row("mine", defense=probe_defenses.FIRST),)))
    client = make_client(keys_file=path)
    for form in FORMS:
        np.testing.assert_array_equal(infer(client, form, "mine"), np.eye(4)[[0] * 3])


def test_distinct_defenses_are_built_once(keyed):
    grants = keyed().app.state.service.access._keys.value
    dcp = grants[digest(b"defended")].defense
    assert dcp is grants[digest(b"label")].defense.steps[0]
    assert grants[digest(b"plain")].defense is None
    assert grants[digest(b"clean")].defense is None  # the server's own


def test_a_budget_counts_images_and_says_what_is_left(client):
    answer = ask(client, "hourly", 3)
    assert answer.status_code == 200
    assert answer.headers["ratelimit-policy"] == (
        '"window";q=4;qu="images";w=3600, "total";q=100;qu="images"'
    )
    found = re.fullmatch(r'"window";r=1;t=(\d+), "total";r=97', answer.headers["ratelimit"])
    assert 3595 <= int(found[1]) <= 3600
    refused = ask(client, "hourly", 2)
    assert refused.status_code == 429
    check_problem(refused)
    assert 3595 <= int(refused.headers["retry-after"]) <= 3600
    assert refused.headers["ratelimit"].startswith('"window";r=1;t=')
    assert "1 of 4 left; resets in" in refused.json()["detail"]
    assert ask(client, "hourly", 1).status_code == 200
    assert samples(client)['scumble_rejections_total{"reason": "budget"}'] == 1
    assert samples(client)['scumble_images_total{"model": "tiny", "precision": "float32"}'] == 4


def test_a_spent_total_asks_for_a_day(client):
    assert ask(client, "five", 5).status_code == 200
    answer = ask(client, "five", 1)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "86400"
    assert answer.headers["ratelimit"] == '"total";r=0'


def test_more_than_a_window_holds_asks_for_a_day(client):
    assert ask(client, "hourly", 5).headers["retry-after"] == "86400"


def left(client, key: str) -> int:
    """What is left of a total after one more image."""
    return int(re.search(r'"total";r=(\d+)', ask(client, key).headers["ratelimit"])[1])


def test_what_is_refused_costs_nothing(client):
    for files, params in (
        ([IMAGE, BAD], {}),
        ([IMAGE], {"top_k": "0"}),
        ([IMAGE] * 33, {}),
    ):
        headers = {"X-API-Key": "five"}
        answer = client.post("/v1/predict", files=files, params=params, headers=headers)
        assert 400 <= answer.status_code < 429
        assert "ratelimit" not in answer.headers
    assert left(client, "five") == 4


def test_our_fault_and_a_full_queue_are_refunded(keyed, keys_file):
    five = row("five", limits={"total_images": 5}, defense=blocking_defense.NAME)
    write_keys(keys_file, KeyFile(keys=(five,)))
    failing = [
        ("image", ("x.png", blocking_defense.plain(blocking_defense.FAILING), "image/png"))
    ] * 2
    client = keyed(limits={"max_queue": 3})
    assert ask(client, "five", 4).status_code == 503
    answer = client.post("/v1/predict", files=failing, headers={"X-API-Key": "five"})
    assert answer.status_code == 500
    assert left(client, "five") == 4


def test_what_a_client_gets_is_counted_under_his_name(keyed, keys_file):
    rows = (row("a", client="acme", limits={"total_images": 5}), row("b", client="other"))
    write_keys(keys_file, KeyFile(keys=rows))
    client = keyed()
    for key, n, status in (("a", 2, 200), ("a", 2, 200), ("a", 2, 429), ("b", 3, 200)):
        assert ask(client, key, n).status_code == status
    ask(client, "unknown")
    assert client.post("/v1/predict", files=[BAD], headers={"X-API-Key": "b"}).status_code == 422
    client.get("/v1/model", headers={"X-API-Key": "b"})
    found = {name: value for name, value in samples(client).items() if "client" in name}
    assert found == {
        'scumble_client_images_total{"client": "acme"}': 4,
        'scumble_client_images_total{"client": "other"}': 3,
        'scumble_client_refused_total{"client": "acme"}': 1,
        'scumble_client_budget_images{"budget": "total", "client": "acme"}': 5,
        'scumble_client_budget_left_images{"budget": "total", "client": "acme"}': 1,
        'scumble_client_withheld_images_total{"client": "acme"}': 0,
        'scumble_client_withheld_images_total{"client": "other"}': 0,
    }


def test_keys_of_one_client_share_his_budget(keyed, keys_file):
    both = [row(key, client="one", limits={"total_images": 5}) for key in ("old", "new")]
    write_keys(keys_file, KeyFile(keys=both))
    client = keyed()
    assert ask(client, "old", 3).status_code == 200
    assert ask(client, "new", 3).status_code == 429
    assert left(client, "new") == 1


def test_keys_of_one_client_with_other_windows_do_not_share_a_bucket(keyed, keys_file):
    """Using the key with the short window does not restart the long window."""
    slow = row("slow", client="one", limits={"window_images": 5, "window_s": 3600})
    fast = row("fast", client="one", limits={"window_images": 1000, "window_s": 1})
    write_keys(keys_file, KeyFile(keys=(slow, fast)))
    client = keyed()
    served = 0
    for _ in range(6):
        served += ask(client, "slow", 2).status_code == 200
        assert ask(client, "fast", 2).status_code == 200
    assert served == 2
    budgets = {name: n for name, n in samples(client).items() if "budget_images" in name}
    assert budgets == {
        'scumble_client_budget_images{"budget": "window_3600s", "client": "one"}': 5,
        'scumble_client_budget_images{"budget": "window_1s", "client": "one"}': 1000,
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "sentence"),
    [
        ({"total_images": 5}, {"total_images": 6}, "5 and 6 images in total"),
        ({"window_images": 5}, {"window_images": 9}, "5 and 9 images in 3600 s"),
        ({"window_images": 5, "window_s": 60}, {"window_images": 9, "window_s": 60}, "9 images in"),
        ({"window_images": 5}, {"window_images": 9, "window_s": 60}, None),
        ({"window_images": 5, "total_images": 7}, {"window_images": 5}, None),
        ({"total_images": 5}, {}, None),
    ],
)
def test_keys_of_one_client_that_contradict_each_other_are_refused(
    keyed, keys_file, ours, theirs, sentence
):
    rows = [row("a", client="one", limits=ours), row("b", client="one", limits=theirs)]
    if sentence is None:
        write_keys(keys_file, KeyFile(keys=rows))
        assert ask(keyed(), "b").status_code == 200
        return
    write_keys(keys_file, KeyFile(keys=rows))
    with pytest.raises(ConfigError, match=f"'id-a' and 'id-b' of client 'one' .*{sentence}"):
        keyed()
    for allowed in (
        [rows[0], row("b", client="two", limits=theirs)],
        [rows[0], row("b", client="one", limits=theirs, revoked="2026-01-02T00:00:00+00:00")],
    ):
        write_keys(keys_file, KeyFile(keys=allowed))
        assert ask(keyed(), "a").status_code == 200


def test_a_budget_of_all_clients_is_kept_and_not_shown(keyed):
    client = keyed(budget={"total_images": 6})
    first = ask(client, "plain", 4)
    assert first.status_code == 200
    assert "ratelimit" not in first.headers
    answer = ask(client, "five", 3)
    assert answer.status_code == 429
    assert answer.headers["ratelimit"] == '"total";r=5'
    assert "shared budget of all clients exceeded" in answer.json()["detail"]
    assert ask(client, "five", 2).status_code == 200


def test_budgets_of_all_clients_need_no_keys(make_client, caplog):
    client = make_client(workers=1, budget={"window_images": 2, "window_s": 60})
    assert "authentication is off" in caplog.text
    assert ask(client, None, 2).status_code == 200
    answer = ask(client, None, 1)
    assert answer.status_code == 429
    assert 55 <= int(answer.headers["retry-after"]) <= 60


class Away:
    """A store that does not answer."""

    async def charge(self, buckets, images):
        raise StoreError("away")

    refund = ping = charge

    async def close(self):
        pass


def test_a_store_that_is_away_fails_closed_or_open_and_readiness_says_so(client, caplog):
    access = client.app.state.service.access
    memory, access.store = access.store, Away()
    access.store.ping = lambda: Away().charge(None, 0)
    closed = ask(client, "five")
    assert closed.status_code == 503
    assert closed.headers["retry-after"] == "1"
    check_problem(closed)
    assert ask(client, "open").status_code == 200
    assert ask(client, "plain").status_code == 200
    assert client.get("/readyz").status_code == 503
    assert client.get("/livez").status_code == 200
    assert caplog.text.count("budget store unavailable") == 1
    assert samples(client)["scumble_store_failures_total{}"] == 3
    access.store = memory
    assert client.get("/readyz").status_code == 200
    assert ask(client, "five").status_code == 200


def test_keys_that_fail_open_or_have_no_budget_leave_the_service_ready(keyed, keys_file):
    write_keys(keys_file, KeyFile(keys=[row("plain"), KEYS[-1]]))
    client = keyed()
    client.app.state.service.access.store = Away()
    assert client.get("/readyz").status_code == 200


def test_a_changed_file_counts_and_a_broken_one_does_not(client, keys_file, caplog):
    def reload():
        client.portal.call(client.app.state.service.files.check_all)

    write_keys(keys_file, KeyFile(keys=[row("plain"), row("new", defense="label")]))
    assert ask(client, "new").status_code == 401
    reload()
    assert (probabilities(ask(client, "new")) == 1).sum() == 1
    assert ask(client, "five").status_code == 401
    for broken in ("{", '{"version": 3}'):
        keys_file.write_text(broken)
        reload()
        assert ask(client, "new").status_code == 200
    write_keys(keys_file, KeyFile(keys=[row("plain", defense="magic")]))
    reload()
    assert ask(client, "new").status_code == 200
    keys_file.unlink()
    reload()
    reload()
    assert ask(client, "new").status_code == 200
    assert "API key reload failed; keeping the current keys: SCUMBLE_KEYS_FILE" in caplog.text
    assert samples(client)['scumble_reload_failures_total{"file": "keys"}'] >= 5
    write_keys(keys_file, KeyFile(keys=[row("plain")]))
    reload()
    assert ask(client, "new").status_code == 401
    assert ask(client, "plain").status_code == 200


def test_the_file_is_watched(client, keys_file):
    import time

    write_keys(keys_file, KeyFile(keys=[row("new")]))
    deadline = time.monotonic() + 10
    while ask(client, "new").status_code == 401 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ask(client, "new").status_code == 200


def test_no_key_is_logged(keyed, caplog):
    caplog.set_level("DEBUG")
    client = keyed(access_log=True)
    for key in ("plain", "gone", "a-wrong-secret-key"):
        ask(client, key)
    ours = [r for r in caplog.records if r.name.startswith("scumble")]
    said = " ".join(str(record.__dict__) for record in ours)
    for secret in ("Bearer", "a-wrong-secret-key", digest(b"plain").hex()):
        assert secret not in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"workers": 2}, "which 2 workers do not share"),
        ({"keys_file": "/nowhere/keys.json"}, "/nowhere/keys.json: No such file"),
    ],
)
def test_what_cannot_be_counted_or_read_does_not_start(models, keys_file, overrides, message):
    given = {"keys_file": keys_file, "workers": 1, **overrides}
    with pytest.raises(ConfigError, match=message):
        create_app(Settings(model_dir=models, model="tiny", **given))


def test_keys_without_budgets_need_no_store_that_is_shared(make_client, tmp_path):
    path = tmp_path / "keys.json"
    write_keys(path, KeyFile(keys=[row("plain")]))
    assert ask(make_client(keys_file=path, workers=2), "plain").status_code == 200


def test_global_budgets_in_memory_are_refused_with_two_workers(models):
    with pytest.raises(ConfigError, match="which 2 workers do not share"):
        create_app(Settings(model_dir=models, model="tiny", workers=2, budget={"total_images": 5}))
