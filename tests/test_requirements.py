"""requirements/ is what images, CI and `make` install: complete, by hash, and what is declared."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scumble.cli import COMMANDS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
GROUPS = PROJECT["dependency-groups"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
CUDA = re.compile(r"torch|torchvision|triton|(nvidia|cuda)-.+")
# Of each file, the extras that it holds.
LOCKED = {
    "base": ["serve", "client"],
    "service": ["serve", "redis", "otel", "upstream"],
    "attacker": ["evaluate"],
    "dev": ["dev"],
}
NAMES = [*LOCKED, "attacker-cpu", "build", "sbom"]


def pins(name: str) -> dict[str, tuple[Requirement, set[str]]]:
    """The requirements of a file and their hashes, by the name of the package."""
    lines = (FOLDER / f"{name}.txt").read_text().replace("\\\n", " ").splitlines()
    found = {}
    for line in lines:
        if line.startswith("#"):
            continue
        requirement, *hashes = line.split(" --hash=")
        parsed = Requirement(requirement)
        found[canonicalize_name(parsed.name)] = (parsed, {each.strip() for each in hashes})
    return found


def declared(extras: list[str]) -> Iterator[Requirement]:
    """What pyproject.toml asks for, with the extras that extras name."""
    for line in [*PROJECT["project"]["dependencies"], *(x for e in extras for x in EXTRAS[e])]:
        requirement = Requirement(line)
        if requirement.name == PROJECT["project"]["name"]:
            yield from declared(sorted(requirement.extras))
        else:
            yield requirement


def satisfied(requirement: Requirement, locked: dict[str, tuple[Requirement, set[str]]]) -> bool:
    name = canonicalize_name(requirement.name)
    if name not in locked:
        return False
    (pin,) = locked[name][0].specifier
    return requirement.specifier.contains(pin.version, prereleases=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_has_one_release_of_each_package_with_its_hashes(name):
    text = (FOLDER / f"{name}.txt").read_text()
    assert "#    make lock\n" in text
    assert not re.search(r"://|--index|--find-links|--extra", text), "an address got into it"
    locked = pins(name)
    assert len(locked) == len(re.findall(r"^[a-z0-9]", text, re.MULTILINE))
    for package, (requirement, hashes) in locked.items():
        (pin,) = requirement.specifier
        assert pin.operator == "==", package
        assert hashes, package
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), package


@pytest.mark.parametrize("name", LOCKED)
def test_a_file_holds_what_is_declared(name):
    locked = pins(name)
    missing = [str(asked) for asked in declared(LOCKED[name]) if not satisfied(asked, locked)]
    assert not missing, "`make lock UPGRADE=` adds what pyproject.toml asks for"


@pytest.mark.parametrize("name", ["build", "sbom"])
def test_a_group_is_locked(name):
    locked = pins(name)
    assert all(satisfied(Requirement(asked), locked) for asked in GROUPS[name])
    if name == "build":
        assert all(satisfied(Requirement(a), locked) for a in PROJECT["build-system"]["requires"])


@pytest.mark.parametrize("name", NAMES)
def test_all_files_have_the_releases_that_are_tested(name):
    tested = pins("dev")
    for package, (requirement, hashes) in pins(name).items():
        if package in tested:
            assert requirement.specifier == tested[package][0].specifier, package
            assert hashes == tested[package][1], package


def test_the_attacker_without_cuda_lacks_torch_and_what_only_its_cuda_build_needs():
    whole, part = set(pins("attacker")), set(pins("attacker-cpu"))
    assert {"torch", "torchvision"} < whole - part
    assert all(CUDA.fullmatch(package) for package in whole - part)
    assert part < whole


@pytest.mark.parametrize("name", ["service", "attacker", "attacker-cpu"])
def test_the_bill_of_materials_has_each_locked_package_with_its_hashes(name, tmp_path):
    written = tmp_path / "bill.cdx.json"
    command = re.search(r"cyclonedx-py requirements (--[^$]+) -o", DOCKERFILE)[1].split()
    subprocess.run(
        [
            Path(sys.executable).parent / "cyclonedx-py", "requirements", *command,
            "-o", written, FOLDER / f"{name}.txt",
        ],
        cwd=ROOT, check=True,
    )  # fmt: skip
    bill = json.loads(written.read_text())
    assert bill["bomFormat"] == "CycloneDX"
    version = SchemaVersion.from_version(bill["specVersion"])
    assert JsonStrictValidator(version).validate_str(written.read_text()) is None
    component = bill["metadata"]["component"]
    assert component["name"] == PROJECT["project"]["name"]
    found = {}
    for part in bill["components"]:
        hashes = {
            f"{each['alg'].replace('-', '').lower()}:{each['content']}"
            for reference in part.get("externalReferences", [])
            for each in reference.get("hashes", [])
        }
        found[canonicalize_name(part["name"])] = (part["version"], hashes, part["purl"])
    locked = pins(name)
    assert set(found) == set(locked)
    for package, (requirement, hashes) in locked.items():
        (pin,) = requirement.specifier
        version, listed, purl = found[package]
        assert (version, listed) == (pin.version, hashes)
        assert purl.startswith(f"pkg:pypi/{package}@")


# Whose import names are not those of their distributions.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "google": "protobuf",
    "python_multipart": "python-multipart",
    "pythonjsonlogger": "python-json-logger",
    "sklearn": "scikit-learn",
}
# Loaded on demand, with a message that names the extra.
OPTIONAL = {
    "app.access.stores.redis": "redis",
    "app.inference.engines.torch": "torch",
    "app.inference.heif_decoder": "heic",
    "app.inference.upstream.client": "upstream",
    "app.telemetry.tracing": "otel",
}
# Imported on demand from what the user has installed; the message says how to.
OF_THE_USER = {("scumble.training.sources", "timm")}
INSTALLED = {
    "scumble.cli": [],
    "scumble.defenses": [],
    "scumble.client.http_client": ["client"],
    "app.main": ["serve"],
    "app.processes.supervisor": ["serve"],
    "app.processes.worker": ["serve"],
    "scumble.evaluation.demo": ["evaluate"],
    **{row.target.partition(":")[0]: [row.extra] for row in COMMANDS.values()},
}
IMPORTS = """
import sys, grimp
graph = grimp.build_graph(
    "app", "scumble", include_external_packages=True, exclude_type_checking_imports=True
)
for module in sys.argv[1:]:
    names = graph.find_upstream_modules(module) | {module}
    ours = {name for name in names if name.partition(".")[0] in ("app", "scumble")}
    for name in sorted(ours):
        for imported in sorted(graph.find_modules_directly_imported_by(name)):
            if imported.partition(".")[0] not in ("app", "scumble", *sys.stdlib_module_names):
                print(module, name, imported)
"""


def test_what_a_command_imports_its_extra_declares():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *INSTALLED],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    undeclared = set()
    for line in done.stdout.splitlines():
        command, module, imported = line.split()
        extras = [*INSTALLED[command], *filter(None, [OPTIONAL.get(module)])]
        names = {canonicalize_name(asked.name) for asked in declared(extras)}
        if imported == "opentelemetry":  # a package of several distributions
            covered = "opentelemetry-sdk" in names
        else:
            covered = canonicalize_name(DISTRIBUTIONS.get(imported, imported)) in names
        if not covered and (module, imported) not in OF_THE_USER:
            undeclared.add((command, module, imported))
    assert done.stdout
    assert undeclared == set()
