"""The tutorial's commands, run in one shell in an empty folder, print what the page shows.

Figures are compared in kind only: they differ between releases of torch, and ports are others here.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from docs.generators import notebook
from loadtest import photos
from scumble.cli import COMMANDS
from tests.ports import free_ports

PAGE = Path(__file__).parent.parent / "docs" / "tutorial" / "index.md"
# `timeout` ends the servers as well.
LIMITED_BASH = ["timeout", "900", "bash", "-euo", "pipefail", "-c"]
END = "~~~ end of a block ~~~"


def blocks(page: str) -> list[tuple[str, str]]:
    """Commands, each with the output shown below them."""
    return re.findall(
        r"^```sh\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", page, re.MULTILINE | re.DOTALL
    )


def run(blocks: list[str], folder: Path, programs: Path) -> list[str]:
    """What each block prints."""
    ports = dict(zip(("8000", "8001", "9000", "9001"), free_ports(4), strict=True))
    script = "".join(f"{block}echo '{END}'\n" for block in blocks)
    # The page's first server has the default ports.
    first = "scumble.toml <<'END'\n"
    script = script.replace(first, f"{first}port = 8000\nadmin_port = 9000\n")
    for name, port in ports.items():
        script = script.replace(name, str(port))
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [*LIMITED_BASH, f"trap 'kill $(jobs -p)' ERR\n{script}"],
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [output.strip("\n") for output in done.stdout.split(f"{END}\n")[:-1]]


def kind(text: str) -> str:
    """Without its figures, and what depends on them: widths, and which of two files is better."""
    text = re.sub(r"ptq-(server|mobile)|─+", "", text)
    # Processors without VNNI run int8 in another engine.
    text = text.replace("onnxruntime, int8", "openvino, int8")
    return " ".join(re.sub(r"[0-9a-f]{64}|[█▉▊▋▌▍▎▏]+|-?\d[\d.,e+-]*", "#", text).split())


@pytest.mark.torch
@pytest.mark.server
def test_the_commands_print_what_the_page_shows(tmp_path, commands):
    shown = blocks(PAGE.read_text())
    printed = run([block for block, _ in shown], tmp_path, commands)
    for (block, output), real in zip(shown, printed, strict=True):
        assert kind(output) == kind(real), f"{block}\nprints:\n{real}"


# The page about photos needs weights that are installed by hand, and trains for minutes.


def test_the_notebook_is_the_page_about_photos():
    page = notebook.PAGE.read_text()
    made = "run python -m docs.generators.notebook"
    assert notebook.NOTEBOOK.read_text() == notebook.text(page), made
    document = notebook.notebook(page)
    assert (document["nbformat"], document["nbformat_minor"]) == (4, 5)
    code = ["".join(c["source"]) for c in document["cells"] if c["cell_type"] == "code"]
    assert code == [f"%%bash\n{commands.rstrip()}" for commands, _ in blocks(page)]
    assert len({cell["id"] for cell in document["cells"]}) == len(document["cells"])


@pytest.mark.torch
def test_the_page_about_photos_has_commands_that_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in photos.SHOWN:
        (tmp_path / "photos" / name).touch()
    text = "".join(commands for commands, _ in blocks(notebook.PAGE.read_text()))
    lines = re.findall(r"scumble ([^|>&\n]+)", text.replace("\\\n", " "))
    assert {line.split()[0] for line in lines} == {
        "export", "quantize", "serve", "predict", "check", "evaluate"
    }  # fmt: skip
    for line in lines:
        name, *words = shlex.split(re.sub(r" 2$", "", line.strip()))
        COMMANDS[name].load().make_context(name, words)  # refuses what is no option
