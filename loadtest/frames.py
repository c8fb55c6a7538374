"""Where a worker's time goes under load, by function, as py-spy samples it.

    python -m loadtest.frames          writes loadtest/frames.json

`python -m loadtest.pages` draws the stacks as a flame graph.

It needs the programs `wrk` and `py-spy` (`pip install py-spy`), and the right to look into another
process: that of the same user on most machines, root in others.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import click

from app.inference.bundle import open_bundle
from loadtest.bench import picture
from loadtest.overhead import LINEAR, in_process, make_linear
from loadtest.wrk import load
from scumble.evaluation.local_server import serving
from scumble.machine import processor

OUT = Path(__file__).with_suffix(".json")
MOST = 20
HZ = 200
LEAST = 0.004  # of the samples that a part of a stack has, to be kept


def shares(folded: str) -> dict[str, dict[str, float]]:
    """Shares of the samples by function, the largest first.

    Args:
        folded: lines of stacks, outermost frame first, separated by semicolons, with a count.

    Returns:
        For each function `self`, while it ran itself, and `total`, while it or what it called ran.
    """
    own: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for line in folded.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        own[frames[-1]] += int(count)
        for frame in set(frames):
            total[frame] += int(count)
    samples = own.total()
    return {
        frame: {"self": round(count / samples, 4), "total": round(total[frame] / samples, 4)}
        for frame, count in own.most_common(MOST)
    }


def tree(folded: str) -> list[dict[str, Any]]:
    """The stacks as nested functions, without those that have less than `LEAST` of the samples.

    Args:
        folded: as for `shares`.

    Returns:
        `name`, `share` of all samples and `calls` of each.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for line in folded.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = tuple(stack.split(";"))
        for depth in range(1, len(frames) + 1):
            counts[frames[:depth]] += int(count)
    samples = sum(count for path, count in counts.items() if len(path) == 1)

    def below(path: tuple[str, ...]) -> list[dict[str, Any]]:
        return [
            {"name": at[-1], "share": round(count / samples, 4), "calls": below(at)}
            for at, count in sorted(counts.items())
            if at[:-1] == path and count >= LEAST * samples
        ]

    return below(())


def linear_in(folder: str) -> Path:
    """The folder, with the bundle `linear` in it."""
    in_process(make_linear, Path(folder))
    return Path(folder)


@click.command()
@click.option("--connections", default=64, show_default=True)
@click.option("--seconds", default=10, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True)
def main(connections: int, seconds: int, out: Path) -> None:
    """Sample, print the shares, and write JSON."""
    spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if spy is None:
        raise click.ClickException("py-spy is not installed; run: pip install py-spy")
    found = ""
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(model=LINEAR, model_dir=linear_in(folder), workers=1) as server,
    ):
        body, kind = picture(open_bundle(Path(folder), LINEAR).card)
        (worker,) = server.workers()
        ask = partial(
            load,
            f"{server.url}/v1/predict",
            body=body,
            content_type=kind,
            connections=connections,
            warmup=0,
        )
        ask(seconds=3)  # the forms for its batch sizes are compiled meanwhile
        asking = Thread(target=ask, kwargs={"seconds": seconds + 3})
        asking.start()
        with tempfile.NamedTemporaryFile() as raw:
            options = f"--format raw --function --nonblocking --rate {HZ} --duration {seconds}"
            subprocess.run(  # noqa: S603  # the program just found, and our own arguments
                [spy, "record", *options.split(), "--pid", str(worker), "--output", raw.name],
                check=True,
                capture_output=True,
            )
            found = Path(raw.name).read_text()
        asking.join()
    document = {
        "command": f"python -m loadtest.frames --connections {connections} --seconds {seconds}",
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "python": platform.python_version(),
        "functions": shares(found),
        "stacks": tree(found),
    }
    out.write_text(json.dumps(document, indent=1) + "\n")
    click.echo(json.dumps(document["functions"], indent=1))


if __name__ == "__main__":
    main()
