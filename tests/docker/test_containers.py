"""The compose file and the Dockerfiles match docs/how-to/containers.md and name files that exist.

Whether containers then run like that is for `make compose-demo` to show.
"""

import io
import json
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import imagecodecs
import numpy as np
import pytest
import yaml
from PIL import Image

from app.inference.bundle import Bundle
from app.settings import Settings, variables
from dashboards import GRAFANA
from scumble.defenses import make
from scumble.evaluation import demo

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
SCRAPED = ("victim", "defended", "recommended")
DOCKERFILE = ROOT / "Dockerfile"
FIGURES = json.loads((ROOT / "docker" / "demo.json").read_text())
PAGE = ROOT / "docs" / "how-to" / "containers.md"


DOCKER = shutil.which("docker")


def compose(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [DOCKER, "compose", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(
    DOCKER is None or compose("version").returncode != 0, reason="docker compose is not installed"
)
def test_compose_accepts_the_file():
    done = compose("--profile=*", "config", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_confined(name):
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    limits = service["deploy"]["resources"]["limits"]
    assert set(limits) == {"cpus", "memory", "pids"}
    assert not service.keys() & {"privileged", "cap_add", "devices", "ulimits"}
    ours = service["image"].startswith("scumble")
    assert service.get("pull_policy") == ("never" if ours else None)
    assert not any("docker.sock" in str(volume) for volume in service.get("volumes", ()))


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_loopback_alone(name):
    for port in SERVICES[name].get("ports", ()):
        assert re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z]+_PORT:-\d+\}:\d+", port), port
        assert not port.endswith(":9000")


def test_the_admin_ports_are_in_a_network_of_their_own():
    assert COMPOSE["networks"]["admin"]["internal"] is True
    members = {name for name, service in SERVICES.items() if "admin" in service["networks"]}
    assert members == {*SCRAPED, "front", "prometheus", "redis"}
    assert SERVICES["attacker"]["networks"] == ["public"]
    for name in SCRAPED:
        host = SERVICES[name]["environment"]["SCUMBLE_ADMIN_HOST"]
        # A name that only that network has, so the port is bound to the address there.
        assert SERVICES[name]["networks"] == {"public": None, "admin": {"aliases": [host]}}


def test_triton_is_reached_by_the_service_in_front_alone():
    front, triton = SERVICES["front"], SERVICES["triton"]
    members = {name for name, each in SERVICES.items() if "upstream" in each["networks"]}
    assert members == {"front", "triton"}
    assert COMPOSE["networks"]["upstream"]["internal"] is True
    assert triton["networks"] == ["upstream"]
    assert "ports" not in triton
    url = urlsplit(front["environment"]["SCUMBLE_UPSTREAM"])
    assert (url.hostname, url.port) == ("triton", 8000)
    assert url.path == "/v2/models/" + front["environment"]["SCUMBLE_MODEL"]
    assert front["profiles"] == triton["profiles"] == ["triton"]


def test_the_bundle_in_front_describes_the_network_in_triton():
    bundle = Bundle(ROOT / "deploy" / "kubernetes" / "bundle")
    network = Bundle(ROOT / "models" / bundle.card.name)
    rows = [each.golden().probabilities["float32"] for each in (bundle, network)]
    np.testing.assert_allclose(*rows, atol=bundle.golden().tolerance["float32"])
    assert bundle.card.labels == network.card.labels
    sent, shape = bundle.card.upstream, bundle.card.input
    folder = ROOT / "deploy" / "kubernetes" / "overlays" / "triton" / "repository"
    config = (folder / bundle.card.name / "config.pbtxt").read_text()
    sides = f"[{shape.height}, {shape.width}, {shape.channels}]"
    assert f'name: "{sent.input}", data_type: TYPE_UINT8, dims: {sides}' in config
    assert f'name: "{sent.output}", data_type: TYPE_FP32, dims: [{len(rows[0][0])}]' in config
    assert f"max_batch_size: {sent.max_batch}" in config
    (file,) = re.findall(r'default_model_filename: "(.*)"', config)
    assert file in network.card.files


def test_every_variable_is_a_setting():
    named = {
        name
        for service in SERVICES.values()
        for name in service.get("environment", {})
        if name.startswith("SCUMBLE_")
    }
    text = "".join(file.read_text() for file in (DOCKERFILE, PAGE, ROOT / "docker" / "health.py"))
    named |= set(re.findall(r"SCUMBLE_[A-Z_]+[A-Z]", text))
    assert "SCUMBLE_DEFENSE" in named
    assert named <= set(variables())


def test_the_thief_knows_the_defense_that_is_served():
    environment = SERVICES["defended"]["environment"]
    params = json.loads(environment["SCUMBLE_DEFENSE_PARAMS"])
    assert {"defense": environment["SCUMBLE_DEFENSE"], "defense_params": params} == demo.DCP
    assert make(environment["SCUMBLE_DEFENSE"], **params)
    assert "SCUMBLE_DEFENSE" not in SERVICES["victim"]["environment"]


def test_the_recommended_service_has_the_policy_that_is_recommended_for_its_model():
    environment = SERVICES["recommended"]["environment"]
    model, precision = (
        re.fullmatch(r"\$\{\w+:-(\w+)\}", environment[name])[1]
        for name in ("SCUMBLE_MODEL", "SCUMBLE_PRECISION")
    )
    assert (model, precision) == (demo.MODEL, demo.PRECISION)
    assert "SCUMBLE_DEFENSE_PARAMS" not in environment  # so the card's are used
    card = Bundle(ROOT / "models" / model).card
    defense = environment["SCUMBLE_DEFENSE"]
    served = {"defense": defense, "defense_params": card.defense_params(defense, {})}
    assert served == demo.recommended_settings()


def test_the_thief_is_started_with_options_that_exist():
    words = [re.sub(r"\$\{\w+:-(\w+)\}", r"\1", word) for word in SERVICES["attacker"]["command"]]
    assert words[:3] == ["python3", "-m", "scumble.evaluation.demo"]
    parsed = demo.main.make_context(
        "demo", [w.replace("/etc/scumble/", f"{ROOT}/docker/attacker/") for w in words[3:]]
    ).params
    assert parsed["undefended"] == "http://victim:8000"
    assert parsed["defended"] == "http://defended:8000"
    assert parsed["recommended"] == "http://recommended:8000"
    assert parsed["consented"]
    assert str(parsed["out"]) == SERVICES["attacker"]["volumes"][0].partition(":")[2]


def test_images_are_those_that_the_rest_is_made_for():
    assert SERVICES["grafana"]["image"] == f"grafana/grafana:{GRAFANA}"
    for name, service in SERVICES.items():
        if "build" in service:
            assert service["build"]["context"] == "."
            assert f" AS {service['build']['target']}\n" in DOCKERFILE.read_text()
        elif service.get("pull_policy") != "never":
            assert re.search(r":v?\d+\.\d+", service["image"]), name


def test_prometheus_scrapes_the_services_by_their_names():
    config = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())
    targets = {
        target
        for scraped in config["scrape_configs"]
        for static in scraped["static_configs"]
        for target in static["targets"]
    }
    assert targets == {f"{name}:{Settings().admin_port}" for name in SCRAPED}
    assert set(SCRAPED) <= set(SERVICES)


def test_what_is_mounted_is_there_and_where_it_is_looked_for():
    mounted = {}
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            source, target, *mode = volume.split(":")
            if source.startswith("."):
                assert (ROOT / source).is_dir()
                assert mode == ["ro"]
                mounted[target] = ROOT / source
            else:
                assert source in COMPOSE["volumes"]
    for config in COMPOSE["configs"].values():
        assert (ROOT / config["file"]).is_file()
    assert (mounted["/etc/prometheus"] / "prometheus.yml").is_file()
    provider = mounted["/etc/grafana/provisioning"] / "dashboards" / "scumble.yml"
    (found,) = yaml.safe_load(provider.read_text())["providers"]
    assert list(mounted[found["options"]["path"]].glob("*.json"))
    sources = mounted["/etc/grafana/provisioning"] / "datasources" / "prometheus.yml"
    (source,) = yaml.safe_load(sources.read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"


def test_the_base_image_is_named_once_by_its_digest():
    base = re.search(
        r"^ARG BASE_IMAGE=(python:3\.11-slim-\w+)@sha256:[0-9a-f]{64}$",
        DOCKERFILE.read_text(),
        re.MULTILINE,
    )
    assert base
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True  # noqa: S607
    ).stdout.split()  # fmt: skip
    builds = [ROOT / name for name in listed if "ocker" in name and "tests/" not in name]
    for file in builds:
        named = re.findall(r"python:3[\w.-]*|sha256:[0-9a-f]{64}", file.read_text(errors="ignore"))
        expected = [base[1], base[0].rpartition("@")[2]] if file == DOCKERFILE else []
        assert named == expected, file
    for service in SERVICES.values():
        arguments = service.get("build", {}).get("args", {})
        assert {name for name in arguments if arguments[name] is not None} == set()


def test_what_images_install_is_locked():
    """By hash, but the wheel made here and the torch of an index that the builder names."""
    pip = re.compile(r"python3 -m pip .*? (install|wheel) (.+?)(?:&&|;|\n[A-Z])", re.DOTALL)
    commands = pip.findall(DOCKERFILE.read_text())
    assert len(commands) == 7
    for verb, words in commands:
        if "TORCH_INDEX" in words:
            continue
        assert "--require-hashes" in words or "--no-deps" in words
        assert ("--no-build-isolation" in words) == (verb == "wheel")


def test_the_dockerfile_builds_with_old_engines_and_drops_root():
    text = DOCKERFILE.read_text()
    assert not re.search(r"^# *syntax=|<<|--link", text, re.MULTILINE)
    assert len(re.findall(r"^USER [1-9]\d+:[1-9]\d+$", text, re.MULTILINE)) == 2
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
            assert {f"!{source}", f"!{source.partition('/')[0]}"} & set(allowed), source


def test_each_package_of_the_wheel_is_copied():
    project = (ROOT / "pyproject.toml").read_text()
    (listed,) = re.findall(r"^packages = (\[.+\])$", project, re.MULTILINE)
    for package in json.loads(listed):
        assert f"COPY {package} {package}\n" in DOCKERFILE.read_text()


def test_what_the_service_never_loads_is_left_out_and_the_rest_stays(tmp_path):
    installed = Path(imagecodecs.__file__).parents[1]
    shutil.copytree(installed / "imagecodecs", tmp_path / "imagecodecs")
    shutil.copytree(installed / "imagecodecs.libs", tmp_path / "imagecodecs.libs")
    libraries = tmp_path / "openvino" / "libs"
    libraries.mkdir(parents=True)
    kept = ["libopenvino.so", "libopenvino_intel_cpu_plugin.so", "libopenvino_onnx_frontend.so"]
    for name in (*kept, "libopenvino_intel_gpu_plugin.so", "libopenvino_pytorch_frontend.so"):
        (libraries / name).touch()
    (tmp_path / "onnx" / "backend" / "test").mkdir(parents=True)
    (tmp_path / "numpy" / "ma" / "tests" / "tests").mkdir(parents=True)
    subprocess.run([sys.executable, ROOT / "docker" / "slim.py", tmp_path], check=True)
    assert sorted(path.name for path in libraries.iterdir()) == kept
    assert not (tmp_path / "onnx" / "backend" / "test").exists()
    assert not (tmp_path / "numpy" / "ma" / "tests").exists()
    assert not list(tmp_path.glob("imagecodecs/_avif*"))
    code = """
import imagecodecs, sys
from pathlib import Path
print(imagecodecs.__file__)
print(imagecodecs.spng_decode(Path("docs/digits/3.png").read_bytes()).shape)
print(imagecodecs.jpeg8_decode(bytes.fromhex(sys.argv[1])).shape)
"""
    picture = io.BytesIO()
    Image.new("RGB", (9, 7)).save(picture, "JPEG")
    said = subprocess.run(
        [sys.executable, "-c", code, picture.getvalue().hex()],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    assert said[:3] == [str(tmp_path / "imagecodecs" / "__init__.py"), "(28, 28)", "(7, 9, 3)"]


class Health(BaseHTTPRequestHandler):
    """An admin port."""

    status = 200

    def do_GET(self):
        assert self.path == "/readyz"
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *arguments):
        """Say nothing."""


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_asks_the_admin_port(status, healthy):
    handler = type("Handler", (Health,), {"status": status})
    server = HTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.handle_request, daemon=True).start()
    port = server.server_address[1]
    done = subprocess.run(
        [sys.executable, ROOT / "docker" / "health.py"],
        env={"SCUMBLE_ADMIN_HOST": "127.0.0.1", "SCUMBLE_ADMIN_PORT": str(port)},
        check=False,
    )
    server.server_close()
    assert (done.returncode == 0) == healthy


def test_the_health_check_fails_where_nobody_listens():
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        port = server.server_address[1]
    done = subprocess.run(
        [sys.executable, ROOT / "docker" / "health.py"],
        env={"SCUMBLE_ADMIN_PORT": str(port)},
        capture_output=True,
        check=False,
    )
    assert done.returncode != 0


def test_the_page_quotes_the_figures():
    text = PAGE.read_text()
    megabytes, seconds = FIGURES["images_mb"], FIGURES["seconds"]
    assert f"| `scumble` | {megabytes['scumble']:,} MB |" in text
    assert f"| `scumble-attacker` | {megabytes['scumble-attacker']:,} MB |" in text
    assert f"took {seconds['all']:.0f} s" in text
    assert megabytes["scumble"] < 450
