"""One whole cell over HTTP, the records it leaves, and the pages made of them."""

import io
import json
import shlex
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing import active_children

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from app.access.keys import KeyFile, write_keys
from app.settings import default_model_dir
from docs.generators import results
from scumble.attacker import attacks
from scumble.attacker.errors import AttackError
from scumble.attacker.run import configure
from scumble.cli import main
from scumble.evaluation import checks, commands
from scumble.evaluation.experiment import Cell, Defended
from scumble.evaluation.plans import PLANS, published
from scumble.evaluation.record import BadRecord, read
from scumble.evaluation.referee import Recorder, job, judge
from scumble.evaluation.summary import best, cell_of, load, summarise
from scumble.evaluation.tables import stolen
from tests.app.access.test_admission import row

OF_A_CELL = (
    *("victim", "precision", "defense", "params", "url", "attack", "adapt", "changes", "budget"),
    *("queries", "test", "profile", "recipe", "student", "test_images", "transport", "seed"),
)
SMALL = ("fit.epochs=1", "attack.curve=[]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 noisy pictures in four class folders."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for kind in ("red", "green", "blue", "grey"):
        (root / kind).mkdir()
        for i in range(15):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(
                root / kind / f"{i}.png"
            )
    return root


@pytest.fixture(scope="module")
def others(folder):
    """The same under another name: images of another kind than those of the test."""
    path = folder.with_name("others")
    path.symlink_to(folder)
    return path


@pytest.fixture
def cell(models, folder, others):
    return Cell(
        str(models / "tiny"),
        Defended("dcp", {"beta": 1.2, "gamma": 0.2}),
        budget=50,
        queries=str(others),
        test=str(folder),
        student="small_cnn",
        changes=SMALL,
    )


@pytest.mark.server
def test_a_cell_from_servers_to_pages(cell, tmp_path):
    cells = [cell, replace(cell, seed=1), replace(cell, adapt=("argmax",))]
    cells.append(replace(cell, defense=Defended()))
    (tmp_path / "cells").mkdir()
    for one in cells:
        record = judge(one, tmp_path / one.key, root=None, command=f"test {one.seed}")
        (tmp_path / "cells" / f"{one.key}.json").write_text(record.model_dump_json())
    record = read(tmp_path / cell.key / "record.json")
    assert record.cell == cell.described()
    assert record.attack.ledger.difference == 0
    assert record.attack.ledger.spent == 50
    assert record.transfer.images == 50
    assert record.served.images == 60
    assert record.served.l1_mean > 0.3
    assert record.served.l1_max <= 2
    assert 0 < record.served.latency_ms["p50"] <= record.served.latency_ms["p99"]
    assert record.model_sha256 == record.attack.victim.sha256
    assert record.secret == "drawn"
    bare = read(tmp_path / cells[3].key / "record.json")
    assert bare.served.l1_max == pytest.approx(0, abs=1e-5)
    assert bare.served.accuracy == bare.served.clean_accuracy
    assert bare.served.ranking == bare.served.clean_ranking
    assert (bare.served.answered, bare.transfer.answered, bare.transfer.true) == (1, 1, 1)
    assert record.transfer.bits == pytest.approx(np.log2(50))
    # The clean side is the same model, whatever defends it.
    assert bare.served.clean_accuracy == record.served.clean_accuracy

    lines = summarise(load(tmp_path / "cells"))
    assert sorted(line.seeds for line in lines) == [(0,), (0,), (0, 1)]
    both = next(line for line in lines if line.seeds == (0, 1))
    assert both.stolen.half is not None
    assert {line.attacker for line in lines} == {"knockoff centred", "knockoff centred + argmax"}
    # A single epoch on noise: most of these copies answer one class, and are marked.
    assert len(best(replace(line, failed=None) for line in lines)) == 2
    assert {line.failed for line in lines} <= {
        one.attack_failed for one in load(tmp_path / "cells")
    }

    done = CliRunner().invoke(
        results.main, ["--cells", str(tmp_path / "cells"), "--out", str(tmp_path / "docs")]
    )
    assert done.exit_code == 0, done.output
    page = (tmp_path / "docs" / "explanation" / "results.md").read_text()
    assert "dcp (beta 1.2, gamma 0.2)" in page
    assert f"| {stolen(both)} |" in page
    assert "\ntest 0\ntest 1\n" in page
    report = (tmp_path / "docs" / "results" / "report.html").read_text()
    assert "src=" not in report  # nothing is loaded from elsewhere
    assert str(both.stolen) in report


@pytest.mark.server
def test_the_referee_tells_the_mask_where_the_truth_is(cell, tmp_path):
    """The truth is asked outside of the budget, and is not part of the cell."""
    wrong = Defended("round", {"decimals": 1})
    seen = {}
    for adapt in ((), ("oracle_mask",)):
        one = replace(cell, defense=wrong, adapt=adapt, budget=60)
        record = judge(one, tmp_path / one.key, root=None, command="test")
        seen[adapt] = record
    masked = seen["oracle_mask",]
    assert masked.attack.adapt[0].settings["clean"].startswith("http://127.0.0.1:")
    assert masked.attack.ledger.difference == 0
    assert masked.cell["changes"] == seen[()].cell["changes"]


@pytest.mark.server
def test_evaluate_runs_cells_once(cell, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "--victim", cell.victim, "--defense", "dcp", "--params", '{"beta": 1.2}']
    words += ["--budget", "20", "--queries", str(folder), "--test", str(folder), "--seeds", "2"]
    words += ["--out", str(tmp_path / "out"), "--jobs", "2", "--no-beside"]
    for change in SMALL:
        words += ["--set", change]
    done = CliRunner(env={"COLUMNS": "200"}).invoke(main, words)
    assert done.exit_code == 0, done.output
    files = sorted((tmp_path / "out").glob("*.json"))
    assert {read(file).cell["seed"] for file in files} == {0, 1}
    assert "dcp (beta 1.2)" in done.output
    times = [file.stat().st_mtime_ns for file in files]
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 0, again.output
    assert [file.stat().st_mtime_ns for file in files] == times


@pytest.mark.server
def test_undefended_and_label_only_stand_beside_a_result(cell, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "--victim", cell.victim, "--defense", "dcp", "--params", '{"beta": 1.2}']
    words += ["--budget", "20", "--queries", str(folder), "--test", str(folder), "--jobs", "1"]
    for change in SMALL:
        words += ["--set", change]
    done = CliRunner(env={"COLUMNS": "80"}).invoke(main, words)
    assert done.exit_code == 0, done.output
    for shown in ("none", "label", "dcp"):
        assert f" {shown} " in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


@pytest.mark.server
def test_a_service_at_a_url_is_judged_too(cell, serve, tmp_path):
    theirs = serve(defense="round", defense_params={"decimals": 1})
    one = replace(cell, defense=Defended("theirs", url=theirs.url))
    record = judge(one, tmp_path / "url", root=None, command="test")
    assert record.served.l1_mean > 0
    assert record.attack.ledger.server is None


@pytest.mark.server
def test_so_is_one_that_asks_for_a_key(cell, serve, tmp_path):
    keys = tmp_path / "keys.json"
    write_keys(keys, KeyFile(keys=(row("owner"),)))
    theirs = serve(defense="round", defense_params={"decimals": 1}, keys_file=keys)
    one = replace(cell, defense=Defended("theirs", url=theirs.url))
    headers = {"Authorization": "Bearer owner"}
    record = judge(one, tmp_path / "url", root=None, command="test", headers=headers)
    assert record.served.l1_mean > 0
    with pytest.raises(AttackError, match="401"):
        judge(one, tmp_path / "keyless", root=None, command="test")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--params", "[1]"], "allowed: a JSON object"),
        (["--params", "{"], "Expecting property name"),
        (["--params", '{"beta": 1, "beta": 2}'], "params has 'beta' twice; allowed: once"),
        (["--set", "fit.epochs=1", "--set", "fit.epochs=2"], "fit.epochs is set twice"),
        (["--adapt", "argmax,argmax"], "modifier 'argmax' is given twice"),
        (["--url", "http://localhost:1", "--defense", "dcp"], "remove --defense and --params"),
        (["--url", "http://localhost:1", "--params", '{"a": 1}'], "remove --defense and --params"),
        (["--attack", "guess", "--commands"], "attack is 'guess'; allowed: knockoff"),
        (["--attack", "guess"], "attack is 'guess'; allowed: knockoff, dfme, maze, jbda"),
        (["--url", "http://example.com"], "example.com is not this machine"),
    ],
)
def test_what_cannot_be_judged_is_said(words, message):
    done = CliRunner().invoke(main, ["evaluate", *words])
    assert done.exit_code == 1
    assert message in done.output


def run(cells, folder, **more):
    """How many cells failed, and what was said; records are in `folder`/out."""
    said = io.StringIO()
    (folder / "out").mkdir()
    options = {"finished": 0, "jobs": 1, "threads": 1, "headers": None, **more}
    console = Console(file=said, width=200)
    return commands.run_cells(cells, folder / "out", None, console=console, **options), said


@pytest.mark.server
def test_a_cell_that_fails_does_not_stop_the_others(cell, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = replace(cell, defense=Defended("dcp", {"beta": "x"}))
    failed, said = run([bad, cell], tmp_path)
    assert failed == 1
    assert "beta" in said.getvalue()
    assert len(list((tmp_path / "out").glob("*.json"))) == 1


def test_cells_that_have_not_ended_in_time_are_left_for_the_next_time(cell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clock = iter((0.0, 61.0)).__next__
    failed, said = run([cell, replace(cell, seed=1)], tmp_path, seconds=60, clock=clock)
    assert failed == 0
    assert "the time is over; 0 of 2 cells are recorded in" in said.getvalue()
    assert "run the same command to continue" in said.getvalue()
    assert not active_children()


@pytest.mark.server
def test_records_without_what_makes_them_worth_something_are_refused(cell, tmp_path):
    judge(cell, tmp_path / "run", root=None, command="test")
    path = tmp_path / "run" / "record.json"
    whole = json.loads(path.read_text())
    for member, place in (
        ("seeds", whole),
        ("model_sha256", whole),
        ("transport", whole),
        ("ledger", whole["attack"]),
        ("l1_mean", whole["served"]),
        ("l1_mean", whole["transfer"]),
    ):
        value = place.pop(member)
        path.write_text(json.dumps(whole))
        with pytest.raises(BadRecord, match=member):
            read(path)
        place[member] = value
    path.write_text(json.dumps(whole | {"seeds": {}}))
    with pytest.raises(BadRecord, match="seeds"):
        read(path)


def test_the_recorder_keeps_a_uniform_sample():
    class Counting:
        labels, shape, step, remaining = 2, (1, 1, 1), 0.0, 10**6

        def __call__(self, images):
            return np.repeat(images[:, :, 0, 0], 2, axis=1)

    recorder = Recorder(Counting(), 200, seed=0)
    for i in range(0, 2000, 50):
        recorder(np.arange(i, i + 50, dtype=np.float32).reshape(-1, 1, 1, 1))
    images, answers = recorder.sample()
    values = images.ravel()
    np.testing.assert_array_equal(answers[:, 0], values)
    assert len(set(values)) == 200
    assert 850 < values.mean() < 1150
    small = Recorder(Counting(), 200, seed=0)
    small(np.zeros((3, 1, 1, 1), np.float32))
    assert len(small.sample()[0]) == 3


@pytest.mark.parametrize("plan", PLANS)
def test_published_cells_have_the_papers_attack_and_nothing_of_the_plans(plan):
    same = "victim", "precision", "defense", "attack", "queries", "adapt", "transport", "seed"
    for cell in PLANS[plan]():
        paper = published(cell)
        assert all(getattr(paper, name) == getattr(cell, name) for name in same)
        assert paper.budget > cell.budget
        assert (paper.student, paper.test_images) == ("auto", 0)
        attack, modifiers = configure(job(paper, "http://localhost", None, None, 1))
        whole = attacks.make(cell.attack, "paper", seed=cell.seed)
        if hasattr(attack, "fitting") and not cell.victim.startswith("cifar"):
            assert attack.fitting.augment == "crops"  # mirrored, a 2 or a sign means another thing
            attack = replace(attack, fitting=replace(attack.fitting, augment="flips"))
        assert attack == whole
        assert modifiers == configure(job(cell, "http://localhost", None, None, 1))[1]


@pytest.mark.parametrize(("profile", "change"), [("cpu", lambda cell: cell), ("paper", published)])
def test_the_profile_of_a_plan_counts(profile, change):
    words = ["--plan", "matrix", "--profile", profile]
    with commands.evaluate.make_context("evaluate", words) as context:
        planned = commands.planned(context, context.params["plans"], {"profile": profile})
    assert planned == [change(cell) for cell in PLANS["matrix"]()]
    assert profile == "cpu" or {cell.budget for cell in planned} == {50_000}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--defense", "dcp"], "--defense"),
        (["--set", "fit.epochs=1", "--profile", "paper"], "--set"),
        (["--budget", "20000", "--transport", "png"], "--budget, --transport"),
    ],
)
def test_options_that_a_plan_would_ignore_are_refused(words, named, tmp_path):
    done = CliRunner().invoke(main, ["evaluate", "--plan", "ci", *words, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert f"--plan defines its own cells; remove {named}\n" in done.output


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("profile", [lambda cell: cell, published], ids=["cpu", "paper"])
def test_the_printed_command_of_a_cell_is_that_cell(plan, profile):
    for cell in map(profile, PLANS[plan]()):
        words = shlex.split(commands.command_of(cell))
        assert words[:2] == ["scumble", "evaluate"]
        with commands.evaluate.make_context("evaluate", words[2:]) as context:
            given = context.params
        assert commands.single(**{name: given[name] for name in OF_A_CELL}) == cell


@pytest.mark.parametrize(
    ("victim", "test", "queries"),
    [
        ("mnist", None, "fashion_mnist"),
        ("mnist-outliers", "mnist", "fashion_mnist"),
        ("gtsrb-outliers", "gtsrb", "cifar10"),
        ("cifar100", "cifar100-split", "cifar10"),
        (str(default_model_dir() / "gtsrb-outliers"), "gtsrb", "cifar10"),
        (str(default_model_dir() / "cifar100"), "cifar100-split", "cifar10"),
    ],
)
def test_the_card_says_what_a_victim_is_measured_and_asked_with(victim, test, queries):
    with commands.evaluate.make_context("evaluate", ["--victim", victim]) as context:
        given = {name: context.params[name] for name in OF_A_CELL}
    cell = commands.single(**given)
    assert (cell.test, cell.queries) == (test, queries)
    cell = commands.single(**given | {"test": "digits", "queries": "svhn"})
    assert (cell.test, cell.queries) == ("digits", "svhn")


def test_commands_are_printed_and_nothing_is_run(tmp_path):
    words = ["evaluate", "--plan", "ci", "--commands", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert len(done.output.splitlines()) == len(list(PLANS["ci"]()))
    assert not (tmp_path / "out").exists()


def test_a_printed_command_runs_one_cell():
    words = ["evaluate", "--defense", "dcp", "--params", '{"beta": 1.2}', "--commands"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert len(lines) == 3
    for line in lines:
        again = CliRunner().invoke(main, [*shlex.split(line)[1:], "--commands"])
        assert again.output.splitlines() == [line]


def test_a_record_of_another_model_is_not_taken(tmp_path):
    one = next(results.CELLS.glob("mnist-float32-dcp-b1.2-g0.2-dfme-s0-*.json"))
    cell = cell_of(read(one))
    (tmp_path / one.name).write_bytes(one.read_bytes())
    assert commands.recorded(tmp_path, cell) == read(one)
    other = read(one).model_copy(update={"model_sha256": "0" * 64})
    (tmp_path / one.name).write_text(other.model_dump_json())
    assert commands.recorded(tmp_path, cell) is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AttackError("why"), ": why"),
        (KeyError("x"), ": KeyError: 'x'"),
        (SystemExit(0), ": SystemExit: 0"),
    ],
)
def test_whatever_a_cell_raises_the_others_go_on(error, said, cell, tmp_path):
    future, output = Future(), io.StringIO()
    future.set_exception(error)
    assert not commands.kept(future, cell, tmp_path, Console(file=output, width=200))
    assert output.getvalue().endswith(f"{said}\n")


def test_a_record_that_cannot_be_kept_fails_its_cell_alone(cell, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "RUNS", tmp_path / "runs")
    one = next(results.CELLS.glob("mnist-float32-dcp-b1.2-g0.2-dfme-s0-*.json"))
    (tmp_path / "runs" / cell.key).mkdir(parents=True)
    made = tmp_path / "runs" / cell.key / "record.json"
    made.write_bytes(one.read_bytes())
    (tmp_path / f"{cell.key}.json").mkdir()  # in its place
    future, output = Future(), io.StringIO()
    future.set_result(read(one))
    assert not commands.kept(future, cell, tmp_path, Console(file=output, width=2000))
    assert f"the record is in {made}" in output.getvalue()
    assert not list(tmp_path.glob("*.part"))
    (tmp_path / f"{cell.key}.json").rmdir()
    assert commands.kept(future, cell, tmp_path, Console(file=output, width=2000))
    assert read(tmp_path / f"{cell.key}.json") == read(one)


def test_a_time_limit_is_a_number():
    done = CliRunner().invoke(main, ["evaluate", "--minutes", "nan", "--no-beside"])
    assert done.exit_code == 2
    assert "--minutes is nan; allowed: a number above 0" in done.output


@pytest.mark.parametrize("plan", PLANS)
def test_plans_have_no_cell_twice(plan):
    keys = [cell.key for cell in PLANS[plan]()]
    assert len(set(keys)) == len(keys) > 2


THEIRS = """
from dataclasses import dataclass

import numpy as np
from helper import SHARE
from parts.powers import POWER
from scumble.attacker.adapt.base import Mapped
from scumble.attacker.attacks.knockoff import Knockoff


@dataclass(frozen=True)
class Half(Knockoff):
    share: float = SHARE

    def _plan(self, oracle, pool, student):
        plan = super()._plan(oracle, pool, student)
        plan._order = plan._order[: int(self.share * oracle.remaining)]
        return plan


@dataclass(frozen=True)
class Sharpen:
    power: float = POWER

    def __call__(self, oracle, student):
        def answer(rows, images):
            sharp = rows ** self.power
            return sharp / sharp.sum(axis=1, keepdims=True)
        return Mapped(oracle, answer)
"""


@pytest.fixture
def theirs(tmp_path):
    """Files of a third party: an attack and a modifier, a neighbour and a package they import."""
    folder = tmp_path / "theirs"
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "__init__.py").touch()
    (folder / "parts" / "powers.py").write_text("POWER = 2.0")
    (folder / "mine.py").write_text(THEIRS)
    (folder / "helper.py").write_text("SHARE = 0.5")
    return folder / "mine.py"


@pytest.mark.server
def test_attacks_and_modifiers_of_others_run_and_their_files_are_in_the_record(
    cell, theirs, tmp_path
):
    one = replace(
        cell,
        attack=f"{theirs}:Half",
        adapt=(f"{theirs}:Sharpen", "argmax"),
        changes=(*SMALL, "Sharpen.power=3"),
    )
    hashed = checks.with_hashes(one)
    record = judge(hashed, tmp_path / hashed.key, root=None, command="test")
    assert record.attack.ledger.spent == 25
    assert record.attack.adapt[0].settings == {"power": 3.0}
    names = ("mine.py", "helper.py", "parts/__init__.py", "parts/powers.py")
    assert set(record.cell["files"]) == {str(theirs.parent / name) for name in names}
    assert record.attack.files == record.cell["files"]
    assert "-Half-" in hashed.key


@pytest.mark.parametrize("edited", ["mine.py", "helper.py", "parts/powers.py"])
def test_an_edited_file_makes_another_cell(cell, theirs, edited):
    one = replace(cell, attack=f"{theirs}:Half")
    before = checks.with_hashes(one).key
    assert checks.with_hashes(one).key == before
    (theirs.parent / edited).write_text((theirs.parent / edited).read_text() + "\n# edited\n")
    assert checks.with_hashes(one).key != before


@pytest.mark.parametrize(
    ("defense", "files"),
    [
        (Defended("dcp", {"beta": 1.2}), set()),
        (Defended("codebook"), {"mnist/codebook.float32.json"}),
        (Defended("mad", {"epsilon": 0.5}), {"mnist/surrogate.onnx"}),
    ],
    ids=str,
)
def test_what_a_defense_reads_from_the_bundle_is_part_of_the_cell(defense, files):
    assert set(checks.with_hashes(Cell("mnist", defense)).files) == files


def test_cells_without_such_files_keep_the_keys_of_their_records():
    for record in load(results.CELLS):
        assert (results.CELLS / f"{cell_of(record).key}.json").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py:Attack", "nowhere.py cannot be loaded"),
        ("{0}:Nothing", "has no class 'Nothing'"),
        ("{0}:Sharpen", "is not an attack; needed: a dataclass with the field seed"),
        ("{0}:Silent", "is not an attack; needed: .* the methods check and __call__"),
        ("{0}:Needy", "cannot be made: TypeError: .* missing 1 required"),
        ("{0}:Angry", "cannot be made: KeyError: 'no'"),
    ],
)
def test_a_file_without_an_attack_is_refused(name, message, theirs):
    theirs.write_text(f"{THEIRS}{WRONG}")
    with pytest.raises(AttackError, match=message):
        attacks.make(name.format(theirs))
    with pytest.raises(AttackError, match="profile is 'paper'; allowed with an attack of a file"):
        attacks.make(f"{theirs}:Half", "paper")


WRONG = """
@dataclass(frozen=True)
class Silent:
    seed: int = 0

    def check(self, budget, *, images):
        pass


@dataclass(frozen=True)
class Needy(Half):
    power: float = None
    def __init__(self, power, seed=0):
        pass


@dataclass(frozen=True)
class Angry(Half):
    def __post_init__(self):
        raise KeyError("no")


class Plain:
    def __call__(self, oracle, student):
        return oracle


@dataclass(frozen=True)
class Cross(Sharpen):
    def __post_init__(self):
        raise KeyError("no")


class fit(Sharpen):
    pass
"""


@pytest.mark.parametrize(
    ("adapt", "changes", "message"),
    [
        ("{0}:Plain", (), "is not a modifier; needed: a dataclass with the method __call__"),
        ("{0}:Cross", (), "cannot be made: KeyError: 'no'"),
        ("{0}:Sharpen", ("Sharpen.power=abc",), "Sharpen.power is 'abc'; allowed: a valid number"),
        ("{0}:Sharpen,./{0}:Sharpen", (), "'Sharpen' would be two things to --set"),
        ("{0}:fit", (), "'fit' would be two things to --set"),
    ],
)
def test_a_file_without_a_modifier_is_refused(adapt, changes, message, cell, theirs):
    theirs.write_text(f"{THEIRS}{WRONG}")
    names = tuple(adapt.format(theirs).split(","))
    with pytest.raises(AttackError, match=message):
        checks.check_settings([replace(cell, adapt=names, changes=(*SMALL, *changes))])
