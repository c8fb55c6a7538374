"""Every command refuses wrong options with one sentence, before any work."""

import click
import pytest
from click.testing import CliRunner

from scumble.cli import COMMANDS, main

URL = "http://127.0.0.1:9"
ATTACK = ["attack", URL, "--attack", "knockoff", "--budget", "9", "--test", "digits"]
EVALUATE = ["evaluate", "--queries", "digits", "--test", "digits"]
DIGITS = ["--queries", "digits"]

pytestmark = pytest.mark.torch


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(main, words, prog_name="scumble")


# words, start of the sentence after "Error: "
WRONG = {
    "check workers": (["check", "--workers", "0"], "SCUMBLE_WORKERS is 0; allowed: at least 1"),
    "check workers text": (["check", "--workers", "x"], "--workers is 'x'; allowed: a number or"),
    "check params": (["check", "--defense-params", "{"], "--defense-params is '{', which is not"),
    "check model": (["check", "--model", "nope"], "no model 'nope' in "),
    "check folder": (["check", "--model-dir", "nope"], "no model 'mnist' in 'nope'; available: n"),
    "check defense": (["check", "--defense", "nope"], "defense 'nope': unknown defense 'nope'"),
    "check parameter": (
        ["check", "--defense", "label", "--defense-params", '{"a": 1}'],
        "defense 'label': label has no parameter 'a'",
    ),
    "serve port": (["serve", "--port", "99999"], "SCUMBLE_PORT is 99999; allowed: at most 65535"),
    "serve host": (["serve", "--host", "nope.invalid"], "cannot bind nope.invalid port 8000: "),
    "reload port": (["reload", "--admin-port", "-1"], "SCUMBLE_ADMIN_PORT is -1; allowed: at "),
    "reload": (["reload", "--admin-port", "1"], "no answer from the admin port: "),
    "keys no file": (["keys", "list"], "no key file: use --file or set SCUMBLE_KEYS_FILE"),
    "keys file": (["keys", "list", "--file", "a"], "SCUMBLE_KEYS_FILE: a: No such file"),
    "keys client": (["keys", "add", "--file", "k", "--client", " "], "--client is ' '; allowed: "),
    "keys folder": (
        ["keys", "add", "--file", "no/such/k.json", "--client", "a"],
        "[Errno 2] No such file or directory: ",
    ),
    "attack url": (["attack", "nope", *ATTACK[2:], *DIGITS], "the URL is 'nope'; allowed: "),
    "attack queries": (ATTACK, "the attack needs images to query: give a data set with --queries"),
    "attack budget": (
        ["attack", URL, "--attack", "dfme", "--budget", "9", "--test", "digits"],
        "the budget is 9; one iteration of dfme costs ",
    ),
    "attack set": ([*ATTACK, *DIGITS, "--set", "a"], "setting is 'a'; allowed: name.field=value"),
    "attack adapt": ([*ATTACK, *DIGITS, "--adapt", "a"], "unknown modifier 'a'; allowed: argmax"),
    "attack data": ([*ATTACK, "--queries", "nope"], "no data set 'nope': give a .parquet file"),
    "attack file": ([*ATTACK, "--queries", "a.parquet"], "no file 'a.parquet'"),
    "attack server": ([*ATTACK, *DIGITS], f"no answer from {URL}"),
    "attack out": (
        [*ATTACK, *DIGITS, "--out", "/dev/null/x"],
        "--out is '/dev/null/x', which cannot be made: not a directory",
    ),
    "evaluate out": (
        [*EVALUATE, "--no-beside", "--out", "/dev/null/x"],
        "--out is '/dev/null/x', which cannot be made: not a directory",
    ),
    "evaluate attack": ([*EVALUATE, "--attack", "nope"], "attack is 'nope'; allowed: knockoff"),
    "evaluate adapt": ([*EVALUATE, "--adapt", "nope"], "unknown modifier 'nope'; allowed: argmax"),
    "evaluate victim": ([*EVALUATE, "--victim", "nope"], "no model 'nope' in "),
    "evaluate defense": ([*EVALUATE, "--defense", "nope"], "--defense: unknown defense 'nope'"),
    "evaluate parameter": (
        [*EVALUATE, "--defense", "label", "--params", '{"a": 1}'],
        "--defense: label has no parameter 'a'; allowed: keep_top1",
    ),
    "evaluate params": ([*EVALUATE, "--params", "{"], "--params is '{', which is not valid JSON"),
    "evaluate list": ([*EVALUATE, "--params", "[]"], "--params is '[]'; allowed: a JSON object"),
    "evaluate transport": ([*EVALUATE, "--transport", "a"], "transport is 'a'; allowed: png"),
    "evaluate queries": (["evaluate", "--queries", "a", "--test", "digits"], "no data set 'a': "),
    "evaluate test": (["evaluate", "--queries", "digits", "--test", "a"], "no data set 'a': "),
    "evaluate budget": ([*EVALUATE, "--attack", "maze", "--budget", "9"], "the budget is 9; one "),
    "evaluate set": ([*EVALUATE, "--set", "fit.a=1"], "fit has no 'a'; allowed: epochs"),
    "evaluate url": ([*EVALUATE, "--url", "nope"], "the URL is 'nope'; allowed: "),
    "bench model": (["bench", "defenses", "--models", "nope"], "no model 'nope' in "),
    "bench precision": (["bench", "defenses", "--precisions", "int4"], "precision is 'int4'; "),
    "train folder": (["train", "digits", "--models", "/dev/null"], "'/dev/null/digits' cannot be"),
    "train bundle": (["train", "digits", "--bundle", "a b"], "no card can be made of this: name "),
    "train version": (
        ["train", "digits", "--version", ""],
        "no card can be made of this: version is ''; allowed: text that matches ",
    ),
    "train data": (["train", "mnist", "--data", "."], "'mnist' cannot be downloaded into '.'"),
    "quantize": (["quantize", "nope"], "no model 'nope' in 'models'; available: none"),
    "calibrate": (["calibrate", "nope"], "no model 'nope' in 'models'; available: none"),
    "export": (["export", "nope", "--defense", "label"], "no model 'nope' in 'models'; "),
    "export nothing": (["export", "nope"], "give one of --torchvision, --pretrained, "),
    "export module": (["export", "nope", "--module", "nope"], "module is 'nope'; give"),
    "export network": (["export", "nope", "--torchvision", "nope"], "no torchvision classifier "),
}  # fmt: skip


@pytest.mark.parametrize("which", WRONG)
def test_a_wrong_option_is_one_sentence_before_any_work(run, which):
    words, start = WRONG[which]
    result = run(*words)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    *usage, sentence = result.stderr.splitlines()
    assert sentence.startswith(f"Error: {start}")
    assert not usage or usage[0].startswith("Usage: ")


def commands(command=main, words=()):
    """All commands that are not groups, with the words that name them."""
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            loaded = COMMANDS[name].load() if command is main else each
            yield from commands(loaded, (*words, name))
    else:
        yield command, words


def refused(kind):
    """A value that an option of this type does not take; None if it takes any text."""
    if isinstance(kind, click.Choice):
        return "no-such-choice"
    if isinstance(kind, click.types.IntParamType | click.types.FloatParamType):
        return "a"
    if (isinstance(kind, click.Path) and kind.exists) or isinstance(kind, click.File):
        return "no/such/file"
    return None


OPTIONS = [
    (words, option.opts[0], value)
    for command, words in commands()
    for option in command.params
    if isinstance(option, click.Option)
    for value in [refused(option.type)]
    if value is not None
]


@pytest.mark.parametrize(("words", "option", "value"), OPTIONS, ids=lambda value: str(value))
def test_a_value_of_the_wrong_type_is_a_usage_error(run, words, option, value):
    result = run(*words, option, value)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert f"Invalid value for '{option}'" in result.stderr or "Missing" in result.stderr


@pytest.mark.parametrize("words", [words for _, words in commands()], ids=" ".join)
def test_an_unknown_option_is_a_usage_error(run, words):
    result = run(*words, "--no-such-option")
    assert result.exit_code == 2
    assert "No such option '--no-such-option'" in result.stderr


@pytest.mark.parametrize("option", ["--data", "--root"])
@pytest.mark.parametrize("name", ["attack", "evaluate"])
def test_the_folder_of_data_sets_has_two_names(name, option):
    command = COMMANDS[name].load()
    with command.make_context(name, [option, "sets"], resilient_parsing=True) as ctx:
        assert str(ctx.params["root"]) == "sets"
