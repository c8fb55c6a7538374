import io

from rich.console import Console
from rich.progress import Progress

from scumble.evaluation import commands
from scumble.evaluation.experiment import Cell, Defended
from scumble.progress import bar, from_file, reporting, to_file


def test_bars_report_to_another_process(tmp_path):
    file = tmp_path / "progress"
    assert from_file(file) is None
    with reporting(to_file(file)), bar(40, "fit", "step", shown=False) as shown:
        assert from_file(file) == ("fit", 0, 40)
        shown.update(15)
        shown.refresh()
        assert from_file(file) == ("fit", 15, 40)


def test_a_bar_that_nobody_asked_for_writes_nothing(capfd):
    with bar(40, "fit", "step", shown=False) as shown:
        shown.update(40)
    assert capfd.readouterr().err == ""


def test_a_bar_in_a_pipe_writes_nothing(capfd):
    with bar(40, "queries", "img", shown=True) as shown:
        shown.update(40)
    assert capfd.readouterr().err == ""


def test_a_running_cell_has_a_bar_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cell = Cell("mnist", Defended("dcp", {"beta": 1.2}), seed=3)
    folder = commands.RUNS / cell.key
    folder.mkdir(parents=True)
    report = to_file(folder / commands.PROGRESS)
    progress, inside = Progress(console=Console(file=io.StringIO())), {}
    commands.show_inside(progress, inside, [cell, Cell("mnist")])
    assert inside == {}
    for what, done, total in (("queries", 5, 20), ("queries", 9, 20), ("fit", 1, 600)):
        report(what, done, total)
        commands.show_inside(progress, inside, [cell])
        (task,) = progress.tasks
        assert task.description.strip() == f"dcp, seed 3: {what}"
        assert (task.completed, task.total) == (done, total)
