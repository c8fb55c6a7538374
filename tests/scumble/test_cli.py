import importlib.metadata
import json
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

import click
import pytest
from click.testing import CliRunner

from app.system.installation import install_command
from scumble import Client
from scumble.cli import COMMANDS, Row, Table, main
from scumble.client.commands import classify
from tests.pictures import PNG, encoded, picture

ROOT = Path(__file__).parents[2]
LABELS = ["airplane", "automobile", "bird"]
SHARES = [0.0625, 0.9, 0.0375]
MODEL = {
    "name": "cifar10",
    "version": "3",
    "labels": LABELS,
    "input": {"height": 32, "width": 32, "channels": 3},
    "formats": ["image/jpeg", "image/png", "image/webp"],
    "limits": {"max_body_bytes": 1_000_000, "max_images": 16, "max_pixels": 1_000_000},
}


class Stub(BaseHTTPRequestHandler):
    """A service that sees an automobile in every picture and refuses JPEG."""

    authorizations: ClassVar[list[str | None]] = []

    def do_GET(self):
        self.reply(200, MODEL)

    def do_POST(self):
        self.authorizations.append(self.headers["authorization"])
        self.rfile.read(int(self.headers["content-length"]))
        if self.headers["content-type"] == "image/jpeg":
            return self.reply(422, {"title": "No", "status": 422, "detail": "no \x1b[31mJPEG"})
        order = sorted(range(3), key=lambda k: -SHARES[k])
        choices = [{"label": LABELS[k], "index": k, "probability": SHARES[k]} for k in order]
        top_k = parse_qs(urlsplit(self.path).query).get("top_k")
        rest = {"top": choices[: int(top_k[0])]} if top_k else {"probabilities": SHARES}
        body = {"model": "cifar10", "version": "3", "id": "x1"}
        return self.reply(200, body | {"predictions": [choices[0] | rest]})

    def reply(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def url():
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def run(monkeypatch, tmp_path):
    """`run(*words)` of the command in a folder of its own, in a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    Path("car.png").write_bytes(PNG)
    Path("car.webp").write_bytes(encoded(picture(), "WEBP"))
    Path("car.jpg").write_bytes(encoded(picture(), "JPEG"))
    Path("notes.txt").write_text("no picture")
    return lambda *words, command=main: CliRunner().invoke(command, words, prog_name="scumble")


# The table of subcommands


def test_help_lists_the_table_in_its_order(run):
    result = run("--help")
    listed = result.stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == list(COMMANDS)
    assert all(row.help in result.stdout for row in COMMANDS.values())
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_help_imports_no_subcommand():
    code = (
        "import sys\n"
        "from scumble.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stderr.split())
    assert not loaded & {"app", "training", "numpy", "PIL", "httpx2", "pydantic", "rich", "torch"}
    ours = {name for name in loaded if name.startswith("scumble")}
    assert ours == {"scumble", "scumble.cli", "scumble.help_option"}


def test_extras_of_the_table_are_the_distributions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {row.extra for row in COMMANDS.values()} - {None}
    assert extras <= set(project["optional-dependencies"])
    assert project["scripts"]["scumble"] == "scumble.cli:main"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_row_of_the_table_names_a_command(name):
    if COMMANDS[name].extra == "train":
        pytest.importorskip("torch")
    command = COMMANDS[name].load()
    assert isinstance(command, click.Command)
    assert command.name == name
    assert command.help


def test_version_has_the_engines(run):
    lines = run("--version").stdout.splitlines()
    assert lines[0] == f"scumble {importlib.metadata.version('scumble')}"
    shown = dict(line.split(maxsplit=1) for line in lines[1:])
    assert shown["python"] == platform.python_version()
    assert shown["onnxruntime"] == importlib.metadata.version("onnxruntime")
    assert {"openvino", "torch"} <= shown.keys()


@pytest.mark.parametrize("words", [(), ("serve",), ("keys", "add"), ("predict",)], ids=" ".join)
def test_h_is_help(run, words):
    short, long = run(*words, "-h"), run(*words, "--help")
    assert (short.exit_code, short.output) == (0, long.output)
    assert long.output


def every_command(command=main, words=()):
    """The words of all commands, groups among them."""
    yield words
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            loaded = COMMANDS[name].load() if command is main else each
            yield from every_command(loaded, (*words, name))


@pytest.mark.torch
def test_no_help_is_wider_than_80_columns(run):
    wide = {
        (*words, line): len(line)
        for words in every_command()
        for line in run(*words, "-h").stdout.splitlines()
        if len(line) > 80
    }
    assert wide == {}


@pytest.mark.torch
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_was_called_on_its_own_keeps_its_h(run, name):
    command = COMMANDS[name].load()
    assert run("-h", command=command).exit_code == 0
    assert run(name, "-h").exit_code == 0


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("scumble serv", "plain,serve"), ("scumble serve --defense-p", "plain,--defense-params")],
)
def test_shells_complete_commands_and_options(typed, offered, monkeypatch):
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    asked = CliRunner(env={"_SCUMBLE_COMPLETE": "bash_complete"}).invoke(main, prog_name="scumble")
    assert asked.output.splitlines() == [offered]


def test_an_unknown_subcommand(run):
    result = run("stael")
    assert result.exit_code == 2
    assert "No such command 'stael'" in result.stderr


# A group of subcommands made up in files


@pytest.fixture
def group(run, tmp_path, monkeypatch):
    """`group(source, extra)` -> a group with the subcommand `do`, defined by `source`."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(source, extra=None):
        (tmp_path / "made_up.py").write_text(source)
        monkeypatch.delitem(sys.modules, "made_up", raising=False)
        return Table("scumble", table={"do": Row("made_up:do", "Do it.", extra)})

    yield make
    sys.modules.pop("made_up", None)


DO = "import click\n@click.command()\n@click.option('--n', type=int)\ndef do(n):\n"


def test_a_subcommand_parses_its_own_options(run, group):
    command = group(DO + "    '''Really do it.'''\n    click.echo(n + 1)")
    assert run("do", "--n", "3", command=command).stdout == "4\n"
    assert "Really do it." in run("do", "--help", command=command).stdout
    assert run("do", "--n", "x", command=command).exit_code == 2


@pytest.mark.parametrize(
    "where", ["import torch_like\n" + DO + "    pass", DO + "    import torch_like"]
)
def test_a_missing_extra_is_named_in_one_line(run, group, where):
    result = run("do", command=group(where, "train"))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == (
        "Error: scumble do needs the extra train: No module named 'torch_like'. "
        f"Install it with: {install_command('train')}\n"
    )


def test_help_is_shown_where_an_extra_is_missing(run, group):
    result = run("do", "-h", command=group("import torch_like", "train"))
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: scumble do ...\n\n  Do it.\n")
    assert "needs the extra train" in result.stdout


@pytest.fixture
def unimportable(group):
    """A group with the names of all commands, none of which can be imported."""
    group("import torch_like")
    rows = {name: Row("made_up:do", row.help, "attack") for name, row in COMMANDS.items()}
    return Table("scumble", table=rows)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("attack",), ["Usage: scumble attack [OPTIONS] URL", "--owner-token FILE"]),
        (("keys",), ["Usage: scumble keys [OPTIONS] COMMAND", "revoke"]),
        (("keys", "add"), ["Usage: scumble keys add [OPTIONS]", "--client"]),
    ],
    ids=" ".join,
)
def test_the_whole_help_is_shown_where_an_extra_is_missing(run, unimportable, words, shown):
    result = run(*words, "-h", command=unimportable)
    assert result.exit_code == 0
    assert all(text in result.stdout for text in shown)
    assert f"scumble {words[0]} needs the extra attack: " in result.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("attack",),
            "Missing argument 'URL', option '--attack', option '--budget', option '--test'.",
        ),
        (("attack", "http://a", "--budget", "5"), "Missing option '--attack', option '--test'."),
        (("attack", "--set", "a", "--no-progress", "http://a"), "Missing option '--attack', op"),
        (("predict",), "Missing argument 'URL', argument 'IMAGE...'."),
        (("predict", "http://a"), "Missing argument 'IMAGE...'."),
        (("keys", "add"), "Missing option '--client'."),
        (("attack", "--budgte", "5"), "No such option '--budgte'. "),
    ],
)  # fmt: skip
def test_all_that_is_missing_is_named_before_the_command_is_imported(
    run, unimportable, words, sentence
):
    result = run(*words, command=unimportable)
    assert (result.exit_code, result.stdout) == (2, "")
    usage, _, _, error = result.stderr.splitlines()
    assert usage.startswith(f"Usage: scumble {words[0]} ")
    assert error.startswith(f"Error: {sentence}")


def test_completion_survives_a_missing_extra(group, monkeypatch):
    monkeypatch.setenv("COMP_WORDS", "scumble do --")
    monkeypatch.setenv("COMP_CWORD", "2")
    runner = CliRunner(env={"_SCUMBLE_COMPLETE": "bash_complete"})
    asked = runner.invoke(group("import torch_like", "train"), prog_name="scumble")
    assert asked.exception is None or isinstance(asked.exception, SystemExit)


def test_a_file_that_cannot_be_written_is_one_line(run, group):
    result = run("do", command=group(DO + "    open('no/such', 'w')"))
    assert result.exit_code == 1
    assert result.stderr == "Error: [Errno 2] No such file or directory: 'no/such'\n"


@pytest.mark.parametrize(
    ("missing", "extra"), [("torch_like", None), ("made_up.part", "train")], ids=["base", "ours"]
)
def test_a_fault_of_the_project_is_not_blamed_on_an_extra(run, group, missing, extra):
    result = run("do", command=group(f"import {missing}", extra))
    assert isinstance(result.exception, ImportError)


def test_ctrl_c_ends_with_130_and_no_traceback(run, group):
    result = run("do", command=group(DO + "    raise KeyboardInterrupt"))
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "\n")


def test_ctrl_c_says_how_to_continue(run, group):
    result = run("do", command=group(DO + "    raise KeyboardInterrupt('run it again')"))
    assert (result.exit_code, result.stderr) == (130, "\nrun it again\n")


def test_ctrl_c_to_a_process(group, tmp_path):
    code = (
        "from scumble.cli import Row, Table\n"
        "Table('scumble', table={'do': Row('made_up:do', 'Do it.')})(['do'])"
    )
    group(DO + "    import time\n    click.echo('up')\n    time.sleep(30)")
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    with process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "\n")
    assert process.returncode == 130


# scumble predict


def lines(text):
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_predict_prints_a_row_per_image(run, url):
    result = run("predict", url, "car.png", "car.webp")
    assert result.exit_code == 0
    title, head, rule, *rows = lines(result.stdout)
    assert title == f"cifar10 3 at {url}"
    assert head.split() == ["file", "label", "probability", "next"]
    assert set(rule) == {"─"}
    assert rows == [
        "car.png   automobile  0.9000 █████████  airplane 0.0625, bird 0.0375",
        "car.webp  automobile  0.9000 █████████  airplane 0.0625, bird 0.0375",
    ]


def test_predict_shows_as_many_classes_as_it_is_told(run, url):
    assert "0.0625, bird" in run("predict", url, "car.png", "--top-k", "3").stdout
    assert "0.0625\n" in re.sub(" +\n", "\n", run("predict", url, "car.png", "--top-k", "2").stdout)
    assert "airplane" not in run("predict", url, "car.png", "--top-k", "1").stdout


def test_predict_keeps_to_80_columns_and_folds_names_before_answers(run, url):
    name = "folder_of_pictures_with_a_long_name/" * 3 + "car.png"
    Path(name).parent.mkdir(parents=True)
    Path(name).write_bytes(PNG)
    result = run("predict", url, name, "car.png", "car.jpg")
    answer = "automobile  0.9000 █████████  airplane 0.0625, bird 0.0375"
    assert result.stdout.count(answer) == 2
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    assert name in "".join(line[:20].strip() for line in result.stdout.splitlines())


def test_predict_names_what_failed_in_its_row(run, url):
    result = run("predict", url, "car.jpg", "car.png", "notes.txt")
    assert result.exit_code == 1
    shown = " ".join(result.stdout.split())
    assert "car.jpg 422: no \N{REPLACEMENT CHARACTER}[31mJPEG car.png automobile 0.9000" in shown
    assert "notes.txt 'notes.txt': not a PNG, JPEG, WebP, AVIF or HEIC image" in shown
    assert "\x1b" not in result.stdout


def test_predict_without_colour_codes_in_a_pipe_and_without_blocks_in_ascii(url, run):
    words = [sys.executable, "-m", "scumble.cli", "predict", url, "car.png"]
    environment = {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(words, capture_output=True, env=environment, check=True)
    assert b"0.9000 #########" in result.stdout
    assert b"\x1b" not in result.stdout


def test_predict_prints_json_lines(run, url):
    result = run("predict", url, "car.png", "car.jpg", "--json")
    assert result.exit_code == 1
    good, bad = map(json.loads, result.stdout.splitlines())
    assert good == {
        "file": "car.png",
        "model": "cifar10",
        "version": "3",
        "id": "x1",
        "label": "automobile",
        "index": 1,
        "probability": 0.9,
        "probabilities": SHARES,
    }
    assert bad == {"file": "car.jpg", "error": "no \x1b[31mJPEG", "status": 422}
    (top,) = map(
        json.loads, run("predict", url, "car.png", "--json", "--top-k", "2").stdout.split()
    )
    assert [choice["label"] for choice in top["top"]] == ["automobile", "airplane"]
    assert "probabilities" not in top


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["car.png", "none.png"], "'none.png' does not exist"),
        (["."], "'.' is a directory"),
        ([], "Missing argument 'IMAGE...'"),
        (["car.png", "--top-k", "0"], "0 is not in the range"),
    ],
    ids=["missing file", "folder", "no image", "top k"],
)
def test_predict_is_told_wrongly(run, url, words, message):
    result = run("predict", url, *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_predict_wants_a_url(run):
    result = run("predict", "localhost:8000", "car.png")
    assert result.exit_code == 2
    assert "Invalid value for URL: url is 'localhost:8000'; allowed: http://" in result.stderr


def test_predict_sends_the_key_of_a_file(run, url):
    Stub.authorizations.clear()
    Path("key").write_text("scumble_x\n")
    assert run("predict", url, "car.png", "--key-file", "key").exit_code == 0
    assert Stub.authorizations == ["Bearer scumble_x"]
    Path("key").write_text("two words")
    result = run("predict", url, "car.png", "--key-file", "key")
    assert result.exit_code == 2
    assert "Invalid value for --key-file" in result.stderr
    assert "two words" not in result.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_predict_without_a_server(as_json):
    with socket.socket() as unused:  # bound, and nobody listens
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with (
            Client(url, retries=0) as client,
            pytest.raises(click.ClickException, match=f"^no answer from {url}/v1/model: ."),
        ):
            classify(client, url, (Path("car.png"),), top_k=None, as_json=as_json)
