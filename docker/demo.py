"""`make compose-demo`: build the images, run the demo of `docker-compose.yml`, and check it.

If Docker with Compose is available, it is used. Otherwise, as root on Debian 12, the script starts
a separate engine on its own socket, with substitutes for the images of a registry: a base image
made of Debian packages, and Debian's Prometheus and Redis. The Dockerfile and the compose file are
the same. Grafana has no substitute and does not run then.

    python docker/demo.py --out runs/compose-demo/demo.json
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx2
from PIL import Image

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "runs" / "compose-demo"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
LARGEST_MB = 450  # of the service's image
REQUESTS = 30  # sent by this script to each service
BUDGET = 5
ENGINE = {"dockerd": "docker.io", "iptables": "iptables", "mmdebstrap": "mmdebstrap"}
SERVICES = {"undefended": "victim", "defended": "defended", "recommended": "recommended"}
OWN = (*SERVICES.values(), "attacker")
BASE = "scumble-base"  # the substitute, as an image with a digest cannot be replaced by name

# Prints for each HOST:PORT whether a connection is accepted.
PROBE = """
import json, socket, sys
found = {}
for place in sys.argv[1:]:
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
        found[place] = True
    except OSError:
        found[place] = False
print(json.dumps(found))
"""


@dataclass
class Project:
    """A running compose project.

    Attributes:
        environ: of `docker compose`.
        stand_ins: whether hub images were replaced.
        ports: on loopback, by service.
        seconds: of each step, by name.
    """

    environ: dict[str, str]
    stand_ins: bool
    ports: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def docker(self, *words: str, **environ: str) -> str:
        """Standard output of a docker command.

        Raises:
            subprocess.CalledProcessError: it failed; what it wrote to standard error was shown.
        """
        return subprocess.run(
            ["docker", *words],
            cwd=ROOT,
            env={**self.environ, **environ},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout

    def compose(self, *words: str, **environ: str) -> str:
        """Standard output of a compose command."""
        return self.docker("compose", *words, **environ)

    def inspect(self, service: str) -> dict[str, Any]:
        """The engine's description of a service's container."""
        container = self.compose("ps", "--all", "--quiet", service).strip()
        found: dict[str, Any] = json.loads(self.docker("inspect", container))[0]
        return found

    def address(self, service: str, network: str) -> str:
        """Address of a service in a network."""
        name = f"{self.environ['COMPOSE_PROJECT_NAME']}_{network}"
        found: str = self.inspect(service)["NetworkSettings"]["Networks"][name]["IPAddress"]
        return found

    def url(self, service: str) -> str:
        """URL of a service's published port."""
        return f"http://127.0.0.1:{self.ports[service]}"

    def ask(self, expr: str) -> float:
        """A figure of Prometheus; 0 if there is none."""
        url = f"{self.url('prometheus')}/api/v1/query"
        answer = httpx2.get(url, params={"query": expr}, trust_env=False)
        series = answer.json()["data"]["result"]
        return float(series[0]["value"][1]) if series else 0.0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Print the name of a step, and record how long it takes."""
        click.echo(f"{name} ...")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)
        click.echo(f"... {self.seconds[name]} s")


@click.command()
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=CACHE / "demo.json",
    help="JSON file for the figures.",
)
@click.option("--queries", type=click.IntRange(min=100), default=1000, show_default=True)
@click.option("--epochs", type=click.IntRange(min=1), default=4, show_default=True)
@click.option(
    "--local",
    is_flag=True,
    envvar="COMPOSE_DEMO_LOCAL",
    help="Start a separate engine with substitutes, even if Docker is available.",
)
def main(out: Path, queries: int, epochs: int, local: bool) -> None:
    """Build the images, run the demo of docker-compose.yml, and check it."""
    start = time.perf_counter()
    ours = dict(os.environ)
    for name in [name for name in ours if name.startswith("SCUMBLE_")]:
        del ours[name]  # the compose file would use them
    ours |= {
        "COMPOSE_PROJECT_NAME": f"scumble-demo-{os.getpid()}",
        "ATTACK_QUERIES": str(queries),
        "ATTACK_EPOCHS": str(epochs),
    }
    with ExitStack() as stack:
        if local or not answers(ours):
            project = stack.enter_context(own_engine(ours))
        else:
            project = Project(ours, stand_ins=False)
        for service in (*SERVICES.values(), "prometheus", "grafana"):
            project.ports[service] = port = free_port()
            project.environ[f"{service.upper()}_PORT"] = str(port)
        stack.callback(project.compose, "--profile=*", "down", "--volumes", "--remove-orphans")
        try:
            found = play(project)
        except BaseException:
            click.echo(project.compose("--profile=*", "logs", "--no-color", "--tail=100"))
            raise
    figures = {
        "command": f"python docker/demo.py --queries {queries} --epochs {epochs}",
        "engine": found.pop("engine"),
        "stand_ins": project.stand_ins,
        **found,
        "seconds": {**project.seconds, "all": round(time.perf_counter() - start, 1)},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=2) + "\n")
    click.echo(json.dumps(figures, indent=2))


def answers(environ: dict[str, str]) -> bool:
    """Whether Docker with Compose is available."""
    words = (["docker", "info"], ["docker", "compose", "version"])
    return shutil.which("docker") is not None and all(
        subprocess.run(w, env=environ, capture_output=True, check=False).returncode == 0
        for w in words
    )


def play(project: Project) -> dict[str, Any]:
    """Run the demo with all checks; returns the figures."""
    shown = [*SERVICES.values(), "prometheus", *([] if project.stand_ins else ["grafana"])]
    with project.step("build the service and start"):
        project.compose("up", "--detach", "--wait", *shown)
    with project.step("build the attacker"):
        # The first run builds the attacker's image, as in the README.
        project.compose("run", "--rm", "--no-TTY", "attacker", "true")
    images = {
        name: round(int(project.docker("image", "inspect", "-f", "{{.Size}}", name)) / 1e6)
        for name in ("scumble", "scumble-attacker")
    }
    check(images["scumble"] < LARGEST_MB, f"the service's image has {images['scumble']} MB")
    with project.step("confinement"):
        confined(project, shown)
        isolated(project)
    with project.step("requests of three formats"):
        send(project)
        answered = 'sum(scumble_requests_total{job="%s",route="/v1/predict",code="200"})'
        settled(project, answered, dict.fromkeys(SERVICES.values(), REQUESTS))
    with project.step("theft"):
        click.echo(project.compose("run", "--rm", "--no-TTY", "attacker"))
        report = json.loads(
            project.compose("run", "--rm", "--no-TTY", "attacker", "cat", "/report/demo.json")
        )
    counts = counted(project, report)
    with project.step("a budget in Redis"):
        budget(project)
    with project.step("stop"):
        project.compose("stop", "victim")
        check(project.inspect("victim")["State"]["ExitCode"] == 0, "SIGTERM ended it otherwise")
    return {
        "engine": project.docker("version", "-f", "{{.Server.Version}}").strip(),
        "images_mb": images,
        "images_counted": counts,
        "copies": {line["name"]: line["stolen"]["digits"] for line in report["attacks"]},
    }


def check(holds: bool, otherwise: str) -> None:
    """Check one condition.

    Raises:
        click.ClickException: it is not.
    """
    if not holds:
        raise click.ClickException(otherwise)


def confined(project: Project, services: list[str]) -> None:
    """Check users, capabilities, limits, root file systems and published ports."""
    for service in services:
        found = project.inspect(service)
        host = found["HostConfig"]
        check(host["ReadonlyRootfs"], f"{service}: its root can be written")
        check(host["CapDrop"] == ["ALL"], f"{service}: capabilities {host['CapDrop']}")
        check("no-new-privileges:true" in host["SecurityOpt"], f"{service}: new privileges")
        limits = {name: host[name] for name in ("Memory", "NanoCpus", "PidsLimit")}
        check(all(limit and limit > 0 for limit in limits.values()), f"{service}: {limits}")
        for published in found["NetworkSettings"]["Ports"].values():
            for place in published or ():
                check(place["HostIp"] == "127.0.0.1", f"{service}: published at {place}")
        user = project.compose("exec", "--no-TTY", service, "id", "-u").strip()
        check(user != "0", f"{service}: runs as root")
    status = project.compose("exec", "--no-TTY", "victim", "cat", "/proc/1/status")
    for line in ("CapEff:\t0000000000000000", "NoNewPrivs:\t1"):
        check(line in status, f"victim: not {line!r}")
    written = "try: open('/opt/x', 'w')\nexcept OSError as exc: print(exc.errno)"
    said = project.compose("exec", "--no-TTY", "victim", "python3", "-c", written)
    check(said.strip() == "30", f"victim: writing to its root gave {said!r}, not EROFS")


def isolated(project: Project) -> None:
    """Check that the attacker reaches only public ports, and that the admin network is isolated."""
    public = [f"{name}:8000" for name in SERVICES.values()]
    closed = [
        *(f"{host}:9000" for name in SERVICES.values() for host in (name, f"{name}-admin")),
        *(f"{project.address(name, 'admin')}:9000" for name in SERVICES.values()),
        f"{project.address('prometheus', 'admin')}:9090", "prometheus:9090",
        f"{project.address('prometheus', 'operator')}:9090",
    ]  # fmt: skip
    expected = dict.fromkeys(public, True) | dict.fromkeys(closed, False)
    words = ["run", "--rm", "--no-TTY", "attacker", "python3", "-c", PROBE, *expected]
    found = json.loads(project.compose(*words))
    check(found == expected, f"the attacker reaches {found}")
    # The unreachable target is a service of this project, in another of its networks.
    expected = {"victim-admin:9000": True, f"{project.address('victim', 'public')}:8000": False}
    network = f"{project.environ['COMPOSE_PROJECT_NAME']}_admin"
    inside = ["run", "--rm", f"--network={network}", "--entrypoint=python3", "scumble"]
    found = json.loads(project.docker(*inside, "-c", PROBE, *expected))
    check(found == expected, f"from the admin ports' network one reaches {found}")


def send(project: Project) -> None:
    """Send `REQUESTS` pictures in three formats to each service, and check the labels."""
    picture = Image.open(ROOT / "docs" / "digits" / "3.png")
    for i in range(REQUESTS):
        kind = ("png", "jpeg", "webp")[i % 3]
        body = io.BytesIO()
        picture.save(body, kind)
        for service in SERVICES.values():
            answer = httpx2.post(
                f"{project.url(service)}/v1/predict",
                content=body.getvalue(),
                headers={"Content-Type": f"image/{kind}"},
                trust_env=False,
            )
            check(answer.status_code == 200, f"{service}, {kind}: {answer.text}")
            check(answer.json()["predictions"][0]["label"] == "3", f"{service}: {answer.text}")


def settled(project: Project, expr: str, expected: dict[str, int]) -> None:
    """Wait until Prometheus counts exactly what was sent."""
    end = time.monotonic() + 90
    found: dict[str, float] = {}
    while found != expected and time.monotonic() < end:
        time.sleep(2)
        found = {job: project.ask(expr % job) for job in expected}
    check(found == expected, f"Prometheus counts {found}, sent were {expected}")


def counted(project: Project, report: dict[str, Any]) -> dict[str, int]:
    """Images sent to each service, which Prometheus must have counted."""
    l1 = {name: side["l1"]["digits"] for name, side in report["servers"].items()}
    check(l1["undefended"] == 0, f"undefended answers are {l1['undefended']} off")
    check(l1["defended"] > 0.5, f"defended answers are only {l1['defended']} off")
    check(l1["recommended"] > 0, "answers under the recommended policy are clean")
    asked = {
        name: side["images"]
        + sum(line["images"] for line in report["attacks"] if line["server"] == name)
        for name, side in report["servers"].items()
    }
    sent = {service: REQUESTS + asked[name] for name, service in SERVICES.items()}
    with project.step("counts"):
        settled(project, 'sum(scumble_images_total{job="%s"})', sent)
    changed = project.ask('sum(scumble_defended_rows_total{job="victim"})')
    check(changed == 0, f"the victim changed {changed} answers")
    changed = project.ask('sum(scumble_defended_rows_total{job="defended"})')
    check(changed > 0.9 * sent["defended"], f"the defended one changed only {changed} answers")
    return sent


def budget(project: Project) -> None:
    """Check that the budget is exact, and survives the service that counts."""
    settings = {
        "SCUMBLE_STORE": "redis://redis:6379/0",
        "SCUMBLE_BUDGET__TOTAL_IMAGES": str(BUDGET),
    }
    up = ["--profile=redis", "up", "--detach", "--wait", "redis", "defended"]
    project.compose(*up, **settings)
    picture = (ROOT / "docs" / "digits" / "3.png").read_bytes()

    def ask() -> int:
        kind = {"Content-Type": "image/png"}
        url = f"{project.url('defended')}/v1/predict"
        return httpx2.post(url, content=picture, headers=kind, trust_env=False).status_code

    statuses = [ask() for _ in range(BUDGET + 1)]
    check(statuses == BUDGET * [200] + [429], f"a budget of {BUDGET} gave {statuses}")
    project.compose(*up[:2], "--force-recreate", *up[2:], **settings)
    check(ask() == 429, "the budget was forgotten")


# A separate Docker engine.


@contextmanager
def own_engine(environ: dict[str, str]) -> Iterator[Project]:
    """A Docker engine that leaves nothing behind, with substitutes for images of a registry."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise click.ClickException("no Docker answers; as root on a Debian 12 one is started here")
    missing = [package for tool, package in ENGINE.items() if shutil.which(tool) is None]
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="scumble-demo-"))
        stack.callback(run, "rm", "-rf", folder)  # gigabytes of small files
        environ = {
            **environ,
            "DOCKER_HOST": f"unix://{folder}/docker.sock",
            "DOCKER_CONFIG": f"{folder}/config",
            "BASE_IMAGE": BASE,
            "BUILD_IMAGE": "scumble-build",
        }
        environ.pop("DOCKER_BUILDKIT", None)
        project = Project(environ, stand_ins=True)
        with project.step("packages of Debian"):
            if missing:
                run("apt-get", "-qq", "update")
                run("apt-get", "-qq", "install", "-y", "--no-install-recommends", *missing)
            trixie = folder / "trixie"
            packages = ("docker-compose", "prometheus", "promtool")
            run(ROOT / "docker" / "unpack_debian_packages.sh", trixie, *packages)
            plugins = folder / "config" / "cli-plugins"
            plugins.mkdir(parents=True)
            found = trixie / "usr/libexec/docker/cli-plugins/docker-compose"
            shutil.copy(found, plugins)
        stack.enter_context(network_as_before(folder))
        stack.enter_context(daemon(folder))
        with project.step("base image of Debian's packages"):
            base = CACHE / "base.tar"
            if not base.exists():
                debootstrap(base)
        with project.step("stand-ins"):
            stand_ins(project, folder, base)
        yield project


def run(*words: str | Path) -> None:
    """Run a command that must succeed."""
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)


@contextmanager
def network_as_before(folder: Path) -> Iterator[None]:
    """Undo what the engine does to the machine's network."""
    forward = Path("/proc/sys/net/ipv4/ip_forward")
    was = forward.read_text()
    bridge = Path("/sys/class/net/docker0").exists()
    rules = subprocess.run(["iptables-save"], capture_output=True, check=True).stdout
    (folder / "iptables").write_bytes(rules)
    try:
        yield
    finally:
        # Flush the engine's tables, then restore the previous ones.
        run("iptables", "-P", "FORWARD", "ACCEPT")
        for table in ("filter", "nat"):
            run("iptables", "-t", table, "-F")
            run("iptables", "-t", table, "-X")
        if rules:
            run("iptables-restore", folder / "iptables")
        forward.write_text(was)
        if not bridge and shutil.which("ip"):
            subprocess.run(["ip", "link", "delete", "docker0"], check=False)


@contextmanager
def daemon(folder: Path) -> Iterator[None]:
    """The engine, on a socket in the folder."""
    log = folder / "dockerd.log"
    with log.open("w") as written:
        process = subprocess.Popen(
            [
                "dockerd",
                f"--data-root={folder}/data",
                f"--exec-root={folder}/exec",
                f"--pidfile={folder}/pid",
                f"--host=unix://{folder}/docker.sock",
            ],
            stdout=written,
            stderr=written,
        )
    try:
        wait_for(lambda: listens(folder / "docker.sock"), 60, log)
        yield
    except BaseException:
        click.echo(log.read_text()[-5000:])
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        for mount in reversed(Path("/proc/mounts").read_text().splitlines()):
            place = mount.split()[1]
            if place.startswith(f"{folder}/"):
                run("umount", place)


def listens(path: Path) -> bool:
    """Whether a Unix socket accepts connections."""
    with socket.socket(socket.AF_UNIX) as tried:
        return tried.connect_ex(str(path)) == 0


def wait_for(holds: Callable[[], bool], seconds: float, log: Path) -> None:
    """Wait until a condition holds.

    Raises:
        click.ClickException: it does not; the message has the log.
    """
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise click.ClickException(f"not up after {seconds} s: {log.read_text()}")
        time.sleep(0.1)


def debootstrap(base: Path) -> None:
    """Roughly the contents of the slim image: Debian 12 with Python 3.11, without documentation."""
    base.parent.mkdir(parents=True, exist_ok=True)
    part = base.with_suffix(".part")
    left_out = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "info", "man")]
    run(
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        "--format=tar",
        "--include=ca-certificates,python3,usr-is-merged",
        "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
        *left_out,
        '--customize-hook=rm -rf "$1"/usr/share/locale/*',
        "bookworm",
        part,
    )
    part.rename(base)


def stand_ins(project: Project, folder: Path, base: Path) -> None:
    """Make the images that the compose file names, and one to build in."""
    images = {
        name: service["image"]
        for name, service in json.loads(
            project.compose("--profile=*", "config", "--format=json")
        )["services"].items()
        if name not in OWN
    }  # fmt: skip
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    project.docker("import", f"--change=ENV {path}", str(base), BASE)
    # pip with this machine's configuration, including certificates and local files.
    wheels = folder / "build" / "wheels" / "torch"
    wheels.mkdir(parents=True)
    torch = [wheel for place in pip_folders() for wheel in place.glob("torch-*+cpu-cp311-*.whl")]
    for wheel in torch:
        shutil.copy(wheel, wheels)
        (wheels / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
        project.environ["TORCH_INDEX"] = "file:///wheels"
        project.environ["TORCH_VERSION"] = wheel.name.split("-")[1]
    shutil.copy(CERTIFICATES, folder / "build" / "certificates.crt")
    image(
        project,
        folder / "build",
        "scumble-build",
        f"""
        FROM {BASE}
        RUN apt-get -qq update && apt-get -qq install -y --no-install-recommends python3-pip
        COPY certificates.crt /certificates.crt
        COPY wheels /wheels
        ENV PIP_CERT=/certificates.crt
    """,
    )
    binaries = folder / "prometheus"
    binaries.mkdir()
    for name in ("prometheus", "promtool"):
        shutil.copy(folder / "trixie" / "usr" / "bin" / name, binaries)
    image(
        project,
        binaries,
        images["prometheus"],
        f"""
        FROM {BASE}
        COPY prometheus promtool /bin/
        RUN mkdir /prometheus && chown 65534:65534 /prometheus
        USER 65534:65534
        ENTRYPOINT ["/bin/prometheus"]
    """,
    )
    empty = folder / "redis"
    empty.mkdir()
    image(
        project,
        empty,
        images["redis"],
        f"""
        FROM {BASE}
        RUN apt-get -qq update && apt-get -qq install -y --no-install-recommends redis-server
        RUN mkdir /data && chown 999:999 /data
        USER 999:999
    """,
    )


def image(project: Project, folder: Path, tag: str, dockerfile: str) -> None:
    """Build an image."""
    lines = [line.strip() for line in dockerfile.strip().splitlines()]
    (folder / "Dockerfile").write_text("\n".join(lines) + "\n")
    project.docker("build", "--quiet", f"--tag={tag}", str(folder))


def pip_folders() -> list[Path]:
    """The folder where pip looks for local files."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"find-links='(.+)'$", listed, re.MULTILINE)
    return [Path(place) for place in sorted({word for line in found for word in line.split()})]


def free_port() -> int:
    """A free port on loopback."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        port: int = tried.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
