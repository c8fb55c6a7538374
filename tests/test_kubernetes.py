"""The manifests render, are valid, and agree with the service. Nothing here runs on a cluster."""

import base64
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
import redis
import yaml
from starlette.routing import Route

from app.access.keys import KeyFile, write_keys
from app.admin.application import create_admin
from app.inference.bundle import Bundle
from app.processes.supervisor import GRACE_S
from app.settings import Settings, load_settings
from app.telemetry.incidents import Incidents
from loadtest.scaling import USE
from scumble.evaluation.local_server import Server, serving
from tests.app.access.test_admission import IMAGE, row
from tests.docker.test_prometheus import PROMTOOL, promtool
from tests.exported import NoWorkers, metric_names
from tests.redis_server import BINARY, RedisServer, needs_redis

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "deploy" / "kubernetes"
BUDGETS, KEDA, KSERVE = "overlays/redis-budgets", "overlays/keda", "kserve"
TRITON, FRONT = "overlays/triton", "kserve-front"
ALL = ("overlays/demo", BUDGETS, KEDA, TRITON, KSERVE, FRONT)
SERVED = ("overlays/demo", BUDGETS, KEDA, TRITON)
CUSTOM = {"ScaledObject", "PodMonitor", "InferenceService"}  # no schema of theirs is at hand
KSERVES_OWN = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget"}
VERSIONS = ("1.30", "latest")
PASSWORD = "made-up"

renders = (
    [shutil.which("kubectl"), "kustomize"]
    if shutil.which("kubectl")
    else [shutil.which("kustomize"), "build"]
)
pytestmark = pytest.mark.skipif(
    renders[0] is None, reason="neither kubectl nor kustomize is installed"
)


def check(document: dict, version: str = "latest") -> None:
    """Compare with Kubernetes' schemas; ValueError for what they do not allow."""
    import kubernetes_validate  # slow, so only where it is used

    if version == "latest":
        version = kubernetes_validate.latest_version()
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as exc:
        raise ValueError(str(exc)) from exc


@functools.cache
def text(name: str) -> str:
    done = subprocess.run(
        [*renders, FOLDER / name], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(name: str) -> list[dict]:
    return list(yaml.safe_load_all(text(name)))


def one(name: str, kind: str, called: str | None = None) -> dict:
    (found,) = [
        document
        for document in rendered(name)
        if document["kind"] == kind and called in (None, document["metadata"]["name"])
    ]
    return found


def server_pod(name: str) -> dict:
    """The pod of the service; KServe has a pod's members in its predictor."""
    if name in (KSERVE, FRONT):
        part = "predictor" if name == KSERVE else "transformer"
        return one(name, "InferenceService")["spec"][part]
    return one(name, "Deployment")["spec"]["template"]["spec"]


def environment(name: str) -> dict[str, str]:
    """What the container sees; values of secrets are made up."""
    container = server_pod(name)["containers"][0]
    found = {}
    for source in container.get("envFrom", []):
        settings = one(name, "ConfigMap", source["configMapRef"]["name"])
        found |= settings["data"]
    for variable in container.get("env", []):
        value = variable.get("value", PASSWORD * 3)
        found[variable["name"]] = value.replace("$(REDIS_PASSWORD)", PASSWORD)
    return found


def settings(name: str, monkeypatch) -> Settings:
    for variable, value in environment(name).items():
        monkeypatch.setenv(variable, value)
    return load_settings()


def test_every_folder_is_tried():
    folders = {
        path.parent.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("kustomization*")
    }
    assert folders == {*ALL, "base", "bundle"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", SERVED)
def test_what_kubernetes_knows_is_valid(name, version):
    for document in rendered(name):
        if document["kind"] not in CUSTOM:
            check(document, version)


def test_a_misspelt_member_would_be_noticed():
    service = one("overlays/demo", "Service")
    service["spec"]["ports"][0]["targetport"] = service["spec"]["ports"][0].pop("targetPort")
    with pytest.raises(ValueError, match="targetport"):
        check(service)


@pytest.mark.parametrize("name", [KSERVE, FRONT])
def test_what_kserve_takes_over_from_a_pod_is_a_valid_pod(name):
    ours = server_pod(name)
    assert ours.keys() & KSERVES_OWN == (KSERVES_OWN if name == KSERVE else {"minReplicas"})
    spec = {key: value for key, value in ours.items() if key not in KSERVES_OWN}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec}
    check(pod)
    service = one(name, "InferenceService")
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    assert service["metadata"]["name"] == environment(name)["SCUMBLE_MODEL"]
    assert [c["name"] for c in ours["containers"]] == ["kserve-container"]


def test_the_transformer_asks_the_predictor_and_others_may_not():
    service = one(FRONT, "InferenceService")
    name = service["metadata"]["name"]
    url = urlsplit(environment(FRONT)["SCUMBLE_UPSTREAM"])
    assert (url.hostname, url.path) == (f"{name}-predictor", f"/v2/models/{name}")
    policy = one(FRONT, "NetworkPolicy")
    check(policy)
    label = "serving.kserve.io/inferenceservice"
    chosen = {label: name, "component": "predictor"}
    assert policy["spec"]["podSelector"]["matchLabels"] == chosen
    (rule,) = policy["spec"]["ingress"]
    allowed = {label: name, "component": "transformer"}
    assert [peer["podSelector"]["matchLabels"] for peer in rule["from"]] == [allowed]


def test_the_arguments_that_kserve_appends_do_not_reach_the_service(tmp_path):
    command = server_pod(FRONT)["containers"][0]["command"]
    assert command[0] == "python3"
    program = tmp_path / "scumble"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        [sys.executable, *command[1:], "--model_name", "cifar10", "--predictor_host", "x"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "serve\n"


def test_replicas_ask_each_triton_by_its_name():
    served = environment(TRITON)
    stateful = one(TRITON, "StatefulSet", "triton")
    service = one(TRITON, "Service", "triton")
    assert stateful["spec"]["serviceName"] == "triton"
    assert service["spec"]["clusterIP"] == "None"
    names = [f"triton-{i}.triton:8000" for i in range(stateful["spec"]["replicas"])]
    urls = served["SCUMBLE_UPSTREAM"].split()
    assert [urlsplit(url).netloc for url in urls] == names
    assert {urlsplit(url).path for url in urls} == {"/v2/models/" + served["SCUMBLE_MODEL"]}
    labels = one(TRITON, "Deployment")["spec"]["template"]["metadata"]["labels"]
    policy = one(TRITON, "NetworkPolicy", "triton")["spec"]
    assert peers(policy["ingress"], "from") == {8000: [[{"matchLabels": labels}]]}
    assert "egress" not in policy
    (container,) = stateful["spec"]["template"]["spec"]["containers"]
    assert {"--allow-grpc=false", "--allow-metrics=false"} <= set(container["args"])


@pytest.mark.parametrize("name", [TRITON, FRONT])
def test_the_bundle_in_front_is_mounted_where_the_settings_say(name, tmp_path):
    served = environment(name)
    mounts = {m["name"]: m["mountPath"] for m in server_pod(name)["containers"][0]["volumeMounts"]}
    assert mounts["bundle"] == f"{served['SCUMBLE_MODEL_DIR']}/{served['SCUMBLE_MODEL']}"
    (volume,) = [v for v in server_pod(name)["volumes"] if v["name"] == "bundle"]
    for file, text in one(name, "ConfigMap", volume["configMap"]["name"])["data"].items():
        (tmp_path / file).write_text(text)
    bundle = Bundle(tmp_path)
    assert bundle.golden().probabilities
    assert bundle.card.name == served["SCUMBLE_MODEL"]


def test_what_keda_takes_over_from_an_autoscaler_is_a_valid_one():
    scaled = one(KEDA, "ScaledObject")
    assert scaled["apiVersion"] == "keda.sh/v1alpha1"
    assert scaled["spec"]["scaleTargetRef"] == {"name": one(KEDA, "Deployment")["metadata"]["name"]}
    autoscaler = one(BUDGETS, "HorizontalPodAutoscaler")
    autoscaler["spec"] |= scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]
    check(autoscaler)
    # Two autoscalers of one deployment would fight.
    assert not [d for d in rendered(KEDA) if d["kind"] == "HorizontalPodAutoscaler"]


def test_autoscalers_aim_at_the_share_that_the_costs_are_for():
    metric = one(BUDGETS, "HorizontalPodAutoscaler")["spec"]["metrics"][0]["resource"]["target"]
    trigger = one(KEDA, "ScaledObject")["spec"]["triggers"][1]
    aims = {metric["averageUtilization"], int(trigger["metadata"]["value"])}
    assert aims | {one(KSERVE, "InferenceService")["spec"]["predictor"]["scaleTarget"]} == {70}
    assert USE == 0.7


def query() -> str:
    return one(KEDA, "ScaledObject")["spec"]["triggers"][0]["metadata"]["query"]


def test_keda_asks_for_a_metric_that_is_exported():
    named = set(re.findall(r"scumble_\w+", query().partition("{")[0]))
    assert named <= metric_names()
    assert named == {"scumble_queue_depth"}
    assert 'namespace="scumble"' in query()
    assert one(KEDA, "Deployment")["metadata"]["namespace"] == "scumble"


@promtool
def test_prometheus_understands_what_keda_asks(tmp_path):
    rule = {"record": "a:b", "expr": query()}
    (tmp_path / "rules.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "g", "rules": [rule]}]})
    )
    subprocess.run([PROMTOOL, "check", "rules", tmp_path / "rules.yml"], check=True)


def test_keda_adds_a_pod_when_a_full_batch_waits_at_each_worker(monkeypatch):
    served = settings(KEDA, monkeypatch)
    trigger = one(KEDA, "ScaledObject")["spec"]["triggers"][0]
    assert trigger["metricType"] == "AverageValue"
    assert int(trigger["metadata"]["threshold"]) == served.workers * served.batch.max_size


@pytest.mark.parametrize("name", ALL)
def test_every_setting_is_one_and_the_ports_are_the_services_own(name, monkeypatch):
    served, default = settings(name, monkeypatch), Settings.model_fields
    assert (served.port, served.admin_port) == (
        default["port"].default,
        default["admin_port"].default,
    )
    assert served.host == served.admin_host == "0.0.0.0"  # noqa: S104  # inside a pod
    assert not served.console
    ports = [p["containerPort"] for p in server_pod(name)["containers"][0]["ports"]]
    alone = name in (KSERVE, FRONT)
    assert ports == ([served.port] if alone else [served.port, served.admin_port])


@pytest.mark.parametrize("name", ALL)
def test_the_defense_is_one_that_is_recommended(name, monkeypatch):
    served = settings(name, monkeypatch)
    assert served.defense in {"codebook", "label", "withhold"}


@pytest.mark.parametrize("name", SERVED)
def test_the_service_shows_the_public_port_only(name):
    (port,) = one(name, "Service", "scumble")["spec"]["ports"]
    named = {p["name"]: p["containerPort"] for p in server_pod(name)["containers"][0]["ports"]}
    assert named[port["targetPort"]] == port["port"] == 8000


@pytest.mark.parametrize("name", ALL)
def test_probes_ask_for_routes_of_the_admin_port(name, tmp_path):
    admin = create_admin(NoWorkers(), str(tmp_path), Settings(), Incidents(), None)
    routes = {r.path for r in admin.routes if isinstance(r, Route) and "GET" in r.methods}
    container = server_pod(name)["containers"][0]
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    for kind, path in {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}.items():
        asked = container[f"{kind}Probe"]["httpGet"]
        assert asked["path"] == path
        assert path in routes
        assert ports.get(asked["port"], asked["port"]) == 9000


@pytest.mark.parametrize("name", SERVED[:2])
def test_prometheus_is_sent_to_the_metrics(name):
    annotations = one(name, "Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == "9000"
    assert annotations["prometheus.io/path"] == "/metrics"


def test_the_pod_monitor_finds_the_pods_and_their_port():
    spec = one(KEDA, "PodMonitor")["spec"]
    template = one(KEDA, "Deployment")["spec"]["template"]
    assert spec["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert "annotations" not in template["metadata"]
    ports = {p["name"]: p["containerPort"] for p in server_pod(KEDA)["containers"][0]["ports"]}
    (endpoint,) = spec["podMetricsEndpoints"]
    assert (ports[endpoint["port"]], endpoint["path"]) == (9000, "/metrics")


@pytest.mark.parametrize("name", ALL)
def test_a_pod_has_time_to_drain(name, monkeypatch):
    served, pod = settings(name, monkeypatch), server_pod(name)
    drains = served.drain_delay_s + served.shutdown_timeout_s + GRACE_S
    assert pod["terminationGracePeriodSeconds"] > drains
    probe = pod["containers"][0]["readinessProbe"]
    noticed = probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
    assert served.drain_delay_s > noticed


@pytest.mark.parametrize("name", ALL)
def test_there_is_a_worker_for_each_cpu_of_the_limit(name, monkeypatch):
    limits = server_pod(name)["containers"][0]["resources"]["limits"]
    assert settings(name, monkeypatch).workers == int(limits["cpu"])


@pytest.mark.parametrize("name", ALL)
def test_pods_may_do_nothing_that_they_need_not(name):
    pods = [server_pod(name)]
    pods += [d["spec"]["template"]["spec"] for d in rendered(name) if d["kind"] == "StatefulSet"]
    for pod in pods:
        # Links to Services would set variables such as SCUMBLE_PORT, and stop the start.
        assert pod["enableServiceLinks"] is False
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert set(container["resources"]["limits"]) == {"cpu", "memory"}


def peers(rules: list[dict], way: str) -> dict[int, list]:
    """Who may be at the other end, by port; an empty list for anybody."""
    return {
        port["port"]: [list(peer.values()) for peer in rule.get(way, [])]
        for rule in rules
        for port in rule["ports"]
    }


def labelled(**labels: str) -> dict:
    return {
        "matchLabels": {key.replace("__", "/").replace("_", "."): v for key, v in labels.items()}
    }


@pytest.mark.parametrize("name", SERVED)
def test_the_network_lets_through_what_it_must(name):
    spec = one(name, "NetworkPolicy", "scumble")["spec"]
    assert sorted(spec["policyTypes"]) == ["Egress", "Ingress"]
    monitoring = labelled(kubernetes_io__metadata_name="monitoring")
    assert peers(spec["ingress"], "from") == {8000: [], 9000: [[monitoring]]}
    dns = [
        labelled(kubernetes_io__metadata_name="kube-system"),
        {"matchLabels": {"k8s-app": "kube-dns"}},
    ]
    allowed = {53: [dns]}
    if name != "overlays/demo":
        allowed[6379] = [[{"matchLabels": {"app.kubernetes.io/name": "redis"}}]]
    if name == TRITON:
        allowed[8000] = [[{"matchLabels": {"app.kubernetes.io/name": "triton"}}]]
    assert peers(spec["egress"], "to") == allowed
    labels = one(name, "Deployment")["spec"]["template"]["metadata"]["labels"]
    for document in rendered(name):
        if document["kind"] in ("PodDisruptionBudget", "NetworkPolicy"):
            chosen = document["spec"].get("selector") or document["spec"]["podSelector"]
            if document["metadata"]["name"] == "scumble":
                assert chosen["matchLabels"] == labels


def test_redis_takes_only_the_service_and_sends_nothing():
    spec = one(BUDGETS, "NetworkPolicy", "redis")["spec"]
    labels = one(BUDGETS, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert peers(spec["ingress"], "from") == {6379: [[{"matchLabels": labels}]]}
    assert "Egress" in spec["policyTypes"]
    assert "egress" not in spec
    stateful = one(BUDGETS, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert spec["podSelector"]["matchLabels"] == stateful


@pytest.mark.parametrize("name", ALL)
def test_no_secret_is_committed(name):
    for document in rendered(name):
        if document["kind"] == "Secret":
            assert list(document["data"]) == ["keys.json"]
            held = base64.b64decode(document["data"]["keys.json"])
            assert KeyFile.model_validate_json(held) == KeyFile()  # lets nobody in


class MountedRedis(RedisServer):
    """Redis with the manifest's arguments; only port, address and folder are others."""

    def start(self) -> None:
        (container,) = one(BUDGETS, "StatefulSet")["spec"]["template"]["spec"]["containers"]
        assert container["command"] == ["redis-server"]
        words = [a.replace("$(REDIS_PASSWORD)", PASSWORD) for a in container["args"]]
        own = {"--port": str(self.port), "--dir": str(self.folder), "--bind": "127.0.0.1"}
        options = dict(zip(words[::2], words[1::2], strict=True)) | own
        arguments = [word for pair in options.items() for word in pair]
        self.process = subprocess.Popen([BINARY, *arguments], stdout=subprocess.DEVNULL)
        self.url = f"redis://:{PASSWORD}@127.0.0.1:{self.port}/0"
        self.client = redis.Redis.from_url(self.url)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                self.client.ping()
            except redis.ConnectionError:
                time.sleep(0.02)
            else:
                return
        raise RuntimeError("redis does not answer")


def mount(folder: Path, version: str, keys: KeyFile) -> None:
    """Put keys into a folder as a kubelet does: a link is turned to a new folder in one step."""
    new = folder / f"..{version}"
    new.mkdir()
    write_keys(new / "keys.json", keys)
    (folder / "..next").symlink_to(new.name)
    (folder / "..next").replace(folder / "..data")
    if not (folder / "keys.json").is_symlink():
        (folder / "keys.json").symlink_to("..data/keys.json")


@needs_redis
@pytest.mark.server
def test_what_is_rendered_serves_and_takes_keys_as_a_kubelet_brings_them(tmp_path):
    folder, state = tmp_path / "secret", tmp_path / "redis"
    folder.mkdir()
    state.mkdir()
    store = MountedRedis(state)
    try:
        given = environment(BUDGETS)
        assert given.pop("REDIS_PASSWORD")
        assert given.pop("SCUMBLE_STORE") == f"redis://:{PASSWORD}@redis:6379/0"
        assert given.pop("SCUMBLE_KEYS_FILE") == "/etc/scumble/keys.json"
        own = {"host": "127.0.0.1", "admin_host": "127.0.0.1", "port": 0, "admin_port": 0}
        own |= {"drain_delay_s": 0, "store": store.url, "keys_file": folder / "keys.json"}
        committed = json.loads((FOLDER / BUDGETS / "keys.json").read_text())
        mount(folder, "1", KeyFile(**committed))
        variables = {name.removeprefix("SCUMBLE_").lower(): v for name, v in given.items()}
        with serving(**(variables | own)) as server:

            def ask(key: str) -> httpx2.Response:
                headers = {"X-API-Key": key}
                return httpx2.post(f"{server.url}/v1/predict", files=[IMAGE], headers=headers)

            assert ask("acme").status_code == 401
            mount(folder, "2", KeyFile(keys=[row("acme", limits={"total_images": 1})]))
            deadline = time.monotonic() + 10
            while (answer := ask("acme")).status_code == 401 and time.monotonic() < deadline:
                time.sleep(0.1)
            assert answer.status_code == 200
            assert ask("acme").status_code == 429
        held = store.client.hget("{scumble}:client:acme:total", "used")
        assert held == b"1"
        assert store.client.config_get("appendfsync") == {"appendfsync": "always"}
        assert store.client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    finally:
        store.client.close()
        store.stop()


# A root file system that cannot be written but for one folder, no capabilities, no home.
CONFINED = """
mount --make-rprivate / && mount -t tmpfs tmpfs "$TMPDIR" && mount -o remount,ro,bind / || exit 3
exec setpriv --bounding-set -all --inh-caps -all --no-new-privs "$@"
"""


def confines() -> bool:
    """Whether this machine lets us make such a root; a container as a rule does not."""
    if os.geteuid() != 0 or not (shutil.which("unshare") and shutil.which("setpriv")):
        return False
    script = "mount --make-rprivate / && mount -o remount,ro,bind /"
    return subprocess.run(["unshare", "-m", "sh", "-c", script], check=False).returncode == 0  # noqa: S607


@pytest.mark.server
def test_it_serves_and_reloads_with_a_read_only_root_and_no_capabilities(tmp_path):
    if not confines():
        pytest.skip("this needs root that may mount, unshare and setpriv")
    given = environment("overlays/demo") | {
        "SCUMBLE_HOST": "127.0.0.1",
        "SCUMBLE_ADMIN_HOST": "127.0.0.1",
        "SCUMBLE_PORT": "0",
        "SCUMBLE_ADMIN_PORT": "0",
        "SCUMBLE_DRAIN_DELAY_S": "0",
    }
    process = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", CONFINED, "sh", sys.executable, "-m", "scumble.cli", "serve"],  # noqa: S607
        cwd=ROOT,
        env={**os.environ, **given, "TMPDIR": str(tmp_path), "HOME": "/nonexistent"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    server = Server(process, time.perf_counter())
    threading.Thread(target=server.read_log, args=(process.stderr,), daemon=True).start()
    try:
        server.wait_ready()
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
        assert httpx2.post(f"{server.url}/v1/predict", files=[IMAGE]).status_code == 200
        assert httpx2.post(f"{server.admin}/reload", timeout=60).status_code == 200
        assert httpx2.post(f"{server.url}/v1/predict", files=[IMAGE]).status_code == 200
    finally:
        assert server.stop() == 0
