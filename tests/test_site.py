"""The documentation builds as a site, and MkDocs checks links, anchors and navigation."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            Path(sys.executable).parent / "mkdocs", "build", "--strict",
            "--config-file", config, "--site-dir", folder,
        ],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize(
    "name",
    ["scumble.defenses.make", "scumble.client.http_client.Client", "app.main.create_app"],
)
def test_the_api_reference_has(site, name):
    assert f'id="{name}"' in (site / "reference" / "library.html").read_text()


def test_the_search_finds_settings(site):
    index = json.loads((site / "search" / "search_index.json").read_text())
    assert any("SCUMBLE_DEFENSE_PARAMS" in entry["title"] for entry in index["docs"])


def test_links_to_files_of_the_repository_lead_to_copies(site):
    page = (site / "explanation" / "performance.html").read_text()
    (target,) = set(re.findall(r'href="([^"]+peers\.json)"', page))
    copy = (site / "explanation" / target).read_bytes()
    assert copy == (ROOT / "loadtest" / "peers.json").read_bytes()


def test_a_link_to_nowhere_fails_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[there](../gone.json) [and there](lost.md)\n")
    hook = ROOT / "docs" / "generators" / "site.py"
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"site_name: broken\nhooks: [{hook}]\n")
    done = build(tmp_path / "site", config)
    assert done.returncode != 0
    assert "gone.json" in done.stderr
    assert "lost.md" in done.stderr
