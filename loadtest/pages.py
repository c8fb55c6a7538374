"""Writes performance.md, its plot, and figures of threat-model.md and training.md from the JSON.

python -m loadtest.pages            writes them
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
PROCESSORS = ("", "-amd")  # suffixes of the files of each
WITH_AMX = ("Intel(R) Xeon(R) Processor",)  # of these
MAIN = ("cifar10", "int8")  # the model of the targets
TIE = 0.1  # a smaller difference counts as none
OVERHEAD = ("whole_us", "engine_us", "beside_us", "application_us")
STAGES = ("read", "decode", "queue", "infer", "defend", "encode")
LIMIT_HEAD = (
    "model",
    "engine alone, batch 1 / 32 / 256",
    "without HTTP",
    "connections",
    "undefended",
    "`dcp`",
    "p50 / p99, ms",
    "`dcp` / batch 1",
    "`dcp` / `none`",
    "taken by the client",
)
PHOTO_HEAD = (
    *("file", "kB", "server", "rps", "p50 / p99, ms", "Scumble over it, rps / p99"),
    "errors",
)
BEGIN, END = "<!-- measured: python -m loadtest.pages -->", "<!-- end of measured -->"
Document = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """What was measured on one processor.

    Attributes:
        bench: of `loadtest.bench`.
        peers: of `loadtest.peers.run`; empty if they did not run there.
        suffix: of the names of both files.
    """

    bench: Document
    peers: Document
    suffix: str = ""


@dataclass(frozen=True)
class Target:
    """A performance target of the project.

    Attributes:
        words: what is measured.
        value: gives it; KeyError where it was not measured.
        least: it should be at least so much.
        most: or at most so much.
        amx: it is for processors with AMX alone (True), or for those without (False).
    """

    words: str
    value: Callable[[Document, Document], float]
    least: float | None = None
    most: float | None = None
    amx: bool | None = None

    def row(self, bench: Document, peers: Document) -> list[str]:
        """Description, target, figure, and whether the target is reached."""
        wanted = f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"
        if self.amx is not None and self.amx != (bench["processor"] in WITH_AMX):
            return [self.words, wanted, "—", ""]
        try:
            value = self.value(bench, peers)
        except (KeyError, IndexError, StopIteration, ValueError):
            return [self.words, wanted, "not measured", ""]
        reached = value >= self.least if self.least is not None else value <= (self.most or 0)
        figure = f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
        return [self.words, wanted, figure, "yes" if reached else "**no**"]


def target_rows(machines: Sequence[Machine]) -> Iterator[list[str]]:
    """Targets, with figure and verdict for each processor."""
    for target in TARGETS:
        rows = [target.row(machine.bench, machine.peers) for machine in machines]
        yield [*rows[0][:2], *(cell for row in rows for cell in row[2:])]


def case_of(bench: Document, model: str, precision: str) -> Document:
    """The figures of one model."""
    return next(
        case
        for case in bench["cases"]
        if (case["model"], case["precision"]) == (model, precision)
    )  # fmt: skip


def ratio(name: str, model: tuple[str, str] = MAIN) -> Callable[[Document, Document], float]:
    """A ratio of the benchmark."""
    return lambda bench, peers: float(case_of(bench, *model)["ratios"][name])


def p99(count: int) -> Callable[[Document, Document], float]:
    """A figure of the defended service."""
    return lambda bench, peers: float(
        case_of(bench, *MAIN)["service"]["dcp"][str(count)]["p99_ms"]
    )  # fmt: skip


def server(peers: Document, name: str, setting: str) -> Document:
    """A server's figures."""
    return next(s for s in peers["servers"] if (s["server"], s["setting"]) == (name, setting))


def others(peers: Document, setting: str | None = None) -> list[Document]:
    """All peers that could be measured."""
    return [
        s
        for s in peers["servers"]
        if s["server"] != "scumble" and setting in (None, s["setting"]) and s.get("loads")
    ]


def at(entry: Document, count: int) -> Document:
    """A server's figures at a number of connections."""
    return next(row for row in entry["loads"] if row["connections"] == count)


def best_peer(setting: str, what: str) -> Callable[[Document, Document], float]:
    """Scumble, defended, over the peer with the most answers per second at 32 connections."""

    def value(bench: Document, peers: Document) -> float:
        best = max(others(peers, setting), key=lambda entry: at(entry, 32)["rps"])
        return float(at(best, 32)["scumble_over_it"]["defended"][what])

    return value


def least_of_peers(what: str, ours: str) -> Callable[[Document, Document], float]:
    """The ratio of Scumble, `undefended` like the peers or `defended`, to the smallest peer."""
    return lambda bench, peers: (
        server(peers, "scumble", ours)[what] / min(entry[what] for entry in others(peers))
    )


NET224 = ("mobilenet", "int8")
TARGETS = [
    Target("64 connections over the loop without HTTP", ratio("c64 over whole"), least=1.9),
    Target(
        "64 connections over model-only at batch 1",
        ratio("c64 over model-only batch 1"),
        least=0.9,
    ),
    *(
        Target(
            f"64 connections over model-only at batch 32, {'with' if amx else 'without'} AMX",
            ratio("c64 over model-only batch 32"),
            least=least,
            amx=amx,
        )
        for amx, least in ((True, 0.65), (False, 0.88))
    ),
    Target("p99 at 8 connections, ms", p99(8), most=4),
    Target("tensors of 256 over model-only", ratio("tensors over model-only"), least=0.8),
    Target("dcp over none, answers per second at 32", ratio("c32 dcp over none rps"), least=0.98),
    Target("dcp over none, p50 at 1 connection", ratio("c1 dcp over none p50"), most=1.02),
    Target(
        "2 workers over 1, 32 connections for each",
        ratio("all workers over one, as much load for each"),
        least=1.8,
    ),
    Target(
        "2 workers over 1, 32 connections for both together",
        ratio("all workers over one, the same load"),
        least=1.8,
    ),
    Target(
        "memory of one more worker, MB",
        lambda bench, peers: float(case_of(bench, *MAIN)["memory_mb"]["each_more"]),
        most=150,
    ),
    Target(
        "mobilenet_v2 at 224x224, 32 connections over model-only at batch 1",
        ratio("c32 over model-only batch 1", NET224),
        least=0.95,
    ),
    Target(
        "the same over model-only at batch 32",
        ratio("c32 over model-only batch 32", NET224),
        least=0.85,
    ),
    Target("best stock peer, answers per second", best_peer("stock", "rps"), least=6),
    Target("best tuned peer, answers per second", best_peer("tuned", "rps"), least=2),
    Target("best tuned peer, p99", best_peer("tuned", "p99_ms"), most=0.5),
    *(
        Target(f"{words}, {ours}", least_of_peers(what, ours), most=1)
        for words, what in (
            ("memory over the smallest peer", "memory_mb"),
            ("start to ready over the quickest peer", "ready_s"),
        )
        for ours in ("undefended", "defended")
    ),
    Target(
        "errors in minutes of load", lambda bench, peers: float(bench["soak"]["errors"]), most=0
    ),
    Target(
        "p99 of its last minute over its first",
        lambda bench, peers: bench["soak"]["p99_ms"][-1] / bench["soak"]["p99_ms"][0],
        most=1.25,
    ),
]  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def page(
    machines: Sequence[Machine],
    overhead: Document | None = None,
    tries: Document | None = None,
    protections: Document | None = None,
    frames: Document | None = None,
    upstreams: Mapping[str, Document] | None = None,
    imagenet: Document | None = None,
    mobilenet: Document | None = None,
) -> str:
    """The whole page; the first machine is the one with all figures."""
    bench = machines[0].bench
    parts = [
        (HERE / "performance.head.md").read_text().rstrip(),
        "## Targets",
        "Measured on `cifar10` int8 with PNG files and `dcp` at beta 1.2, every row perturbed, "
        "unless said; client and server share the cores.",
        table(
            [
                *("target", "wanted"),
                *(c for m in machines for c in (m.bench["processor"], "reached")),
            ],
            target_rows(machines),
        ),
        (HERE / "performance.limits.md").read_text().rstrip(),
        "## Against the machine's limit",
        "Images per second; a ratio is the median of the rounds' ratios.",
        *(part for machine in machines for part in limit_parts(machine)),
        "## Where a request's time goes",
        "Mean microseconds in each stage at 1 connection, undefended and under `dcp`; what is left "
        "of p50 is HTTP, the event loop and the client. Under `dcp` the defense is part of the "
        f"graph, so of `infer`. {bench['processor']}:",
        table(["model", "defense", *STAGES, "sum", "p50"], stage_rows(bench)),
        *soak_parts(bench),
        *(overhead_parts(overhead, tries) if overhead else ()),
        *(frame_parts(frames) if frames else ()),
        *(protection_parts(protections) if protections else ()),
        *(upstream_parts(upstreams) if upstreams else ()),
        *peer_parts([machine for machine in machines if machine.peers]),
        *(imagenet_parts(imagenet, mobilenet) if imagenet else ()),
    ]
    return "\n\n".join(parts) + "\n"


def limit_parts(machine: Machine) -> Iterator[str]:
    """Limits and service on one processor."""
    bench = machine.bench
    yield source(bench, f"bench{machine.suffix}.json")
    yield table(LIMIT_HEAD, limit_rows(bench))
    yield limit(case_of(bench, *MAIN), bench["cores"])


def limit_rows(bench: Document) -> Iterator[list[str]]:
    """Limits and service."""
    for case in bench["cases"]:
        alone, service = case["per_second"]["model_only"], case["service"]
        for i, count in enumerate(service["none"]):
            dcp = service["dcp"][count]
            first = [
                f"`{case['model']}` {case['precision']}",
                " / ".join(f"{v:,}" for v in alone.values()),
                f"{case['per_second']['whole_without_http']:,}",
            ]
            yield [
                *(first if i == 0 else ["", "", ""]),
                count,
                f"{service['none'][count]['rps']:,}",
                f"{dcp['rps']:,}",
                f"{dcp['p50_ms']:.2f} / {dcp['p99_ms']:.2f}",
                f"{case['ratios'][f'c{count} over model-only batch 1']:.2f}",
                f"{case['ratios'][f'c{count} dcp over none rps']:.3f}",
                f"{dcp['client_share']:.0%}",
            ]


def limit(case: Document, cores: int, count: str = "64") -> str:
    """A paragraph on what limits the service."""
    alone, dcp = case["per_second"]["model_only"], case["service"]["dcp"][count]
    left = 1 - dcp["client_share"]
    beside_us = 1e6 * cores * (left / dcp["rps"] - 1 / alone["32"])
    return (
        f"What limits `{case['model']}` {case['precision']}: on this processor a batch of 32 gives "
        f"{alone['32'] / alone['1']:.2f} times the images of single ones, so no batching brings "
        f"more than that over model-only at batch 1. `wrk` takes {dcp['client_share']:.0%} of the "
        f"cores' time at {count} connections. In what is left the service does "
        f"{dcp['rps'] / (left * alone['1']):.2f} of model-only at batch 1 and "
        f"{dcp['rps'] / (left * alone['32']):.2f} at batch 32; the rest, {beside_us:.0f} µs of a "
        "core per request, is sockets, HTTP, decoding and the event loop."
    )


def stage_rows(bench: Document) -> Iterator[list[str]]:
    """Stages."""
    for case in bench["cases"]:
        for defense, stages in case["stage_us_c1"].items():
            yield [
                f"`{case['model']}` {case['precision']}",
                f"`{defense}`",
                *(f"{stages[stage]:.0f}" for stage in STAGES),
                f"{sum(stages.values()):.0f}",
                f"{1000 * case['service'][defense]['1']['p50_ms']:.0f}",
            ]


def soak_parts(bench: Document) -> Iterator[str]:
    """Minutes of load."""
    soak = bench.get("soak")
    if soak:
        yield "## Minutes of load"
        p99s = ", ".join(f"{value:.1f}" for value in soak["p99_ms"])
        yield (
            f"`{soak['model']}` {soak['precision']} at {soak['share_of_capacity']:.0%} of what it "
            f"can, {soak['minutes']} minutes: {soak['errors']} errors, p99 by minute {p99s} ms, "
            f"memory {soak['memory_mb'][0]} MB after the first and {soak['memory_mb'][-1]} MB "
            "after the last."
        )


def overhead_parts(overhead: Document, tries: Document | None = None) -> Iterator[str]:
    """What a request costs beside the engine, and what does not make it less."""
    yield "## Beside the engine"
    yield (HERE / "performance.overhead.md").read_text().rstrip()
    yield source(overhead, "overhead.json")
    yield table(
        [
            *("model", "connections", "images in a batch", "service", "engine", "beside it"),
            *("through ASGI", "bare server", "beside it / bare server"),
            "p50 less the engine",
        ],
        [
            [
                f"`{case['model']}` {case['precision']}",
                count,
                f"{row['batch']:.1f}",
                *(f"{row[name]:.0f}" for name in OVERHEAD),
                f"{row['hello_us']:.1f}",
                f"{row['over_hello']:.1f}",
                f"{row['p50_beside_us']:,.0f}",
            ]
            for case in overhead["cases"]
            for count, row in case["connections"].items()
        ],
    )
    yield (HERE / "performance.tries.md").read_text().rstrip()
    if not tries:
        return
    yield source(tries, "alternatives.json")
    yield table(
        ["try", "in use, µs", "the try, µs", ""],
        [
            [name, f"{row['used_us']:.1f}", f"{row['tried_us']:.1f}", outcome(row)]
            for name, row in tries["tries"].items()
        ],
    )


def outcome(row: Mapping[str, float]) -> str:
    """What a try gained, in words."""
    ratio = row["tried_us"] / row["used_us"]
    return "slower" if ratio > 1 + TIE else "quicker" if ratio < 1 - TIE else "no difference"


def frame_parts(frames: Document) -> Iterator[str]:
    """Where a worker's time goes."""
    yield "## Functions of a busy worker"
    yield (
        "Shares of a worker's time under load, sampled by py-spy: `self` while the function itself "
        "ran, `total` while it or what it called ran."
    )
    yield source(frames, "frames.json")
    yield table(
        ["function", "self", "total"],
        [
            [f"`{name}`", f"{share['self']:.1%}", f"{share['total']:.1%}"]
            for name, share in frames["functions"].items()
        ],
    )
    if "stacks" in frames:
        yield (
            "Each box is a function, and as wide as its share of the time; below it is its caller."
        )
        yield "![Flame graph of a busy worker](../performance-worker.svg)"


def protection_parts(protections: Document) -> Iterator[str]:
    """What keys, budgets and the rest cost."""
    yield "## With protections on"
    yield (HERE / "performance.protections.md").read_text().rstrip()
    yield source(protections, "protections.json")
    yield table(
        ["protection", "µs per request", "more than none", "answers per second over none"],
        [
            [name, f"{row['us']:.0f}", f"{row['more_us']:+.0f}", f"{row['rps_over_none']:.2f}"]
            for name, row in protections["services"].items()
        ],
    )


def upstream_parts(upstreams: Mapping[str, Document]) -> Iterator[str]:
    """What standing in front of another server costs.

    Args:
        upstreams: documents of `loadtest.upstream` by file.
    """
    yield "## In front of another server"
    yield (HERE / "performance.upstream.md").read_text().rstrip()
    for file, found in upstreams.items():
        yield f"**{found['upstream']}.** " + source(found, file)
        cases = [(f"tensors of {case['images']}", case) for case in found["cases"]]
        cases += [("PNG files, JSON answers", found["files"])] if found.get("files") else []
        if cases:
            yield table(
                [
                    "requests",
                    "images per second, alone / behind",
                    "ratio",
                    "p99, ms",
                    "ratio",
                    "errors",
                ],
                [
                    [
                        f"{name}, {case['connections']} connections",
                        " / ".join(
                            f"{case['images_per_s'][who]:,.0f}" for who in ("alone", "front")
                        ),
                        f"{case['throughput_ratio']:.2f}",
                        " / ".join(f"{case['p99_ms'][who]:.1f}" for who in ("alone", "front")),
                        f"{case['p99_ratio']:.2f}",
                        f"{sum(case['errors'].values()):,}",
                    ]
                    for name, case in cases
                ],
            )
            yield (
                f"A worker takes {found['worker_mb']['pss']:.0f} MB, and the service is ready "
                f"{found['process_start_to_ready_s']:.1f} s after its process starts."
            )
        if killed := found["kill"]:
            refused, minutes = sum(killed["refused"].values()), killed["seconds"] / 60
            yield (
                f"Killed {killed['kills']} times in {minutes:.0f} minutes under load: "
                f"{killed['answered']:,} answers, of which {killed['wrong']} wrong and "
                f"{killed['undefended']} undefended; {refused:,} refused, "
                f"{killed['undocumented']} of them other than documented; answers again "
                f"{killed['recovery_s']['median']:.2f} s after it was ready (median, longest "
                f"{killed['recovery_s']['longest']:.2f} s)."
            )


def source(document: Document, file: str) -> str:
    """Where figures come from."""
    return (
        f"`{document['command']}`, [{file}](../../loadtest/{file}): {document['cores']} cores, "
        f"{document['processor']}."
    )


def peer_parts(machines: Sequence[Machine]) -> Iterator[str]:
    """Peers side by side."""
    if not machines:
        return
    yield "## Beside other servers"
    yield (HERE / "performance.peers.md").read_text().rstrip()
    for machine in machines:
        peers = machine.peers
        yield (
            f"{source(peers, f'peers{machine.suffix}.json')[:-1]}; the engine alone does "
            f"{peers['model_only_per_s']:,} images per second at batch 1."
        )
        counts = [row["connections"] for row in others(peers)[0]["loads"]]
        head = ["server", "setting", *(f"rps at {c}" for c in counts), "p99 at 32, ms"]
        yield table(
            [*head, "memory, MB", "ready, s", "errors", "Scumble over it, rps / p99"],
            peer_rows(peers, counts),
        )
        if not machine.suffix:
            yield "![Answers per second of all servers](../performance-peers.png)"


def peer_rows(peers: Document, counts: list[int]) -> Iterator[list[str]]:
    """One row per server and setting; those that did not run say why."""
    for entry in peers["servers"]:
        name = [entry["server"], entry["setting"]]
        if not entry.get("loads"):
            yield [*name, *("—" for _ in counts), "", "", "", "; ".join(entry["failures"])[:80], ""]
            continue
        over = at(entry, 32).get("scumble_over_it", {}).get("defended")
        yield [
            *name,
            *(f"{at(entry, count)['rps']:,.0f}" for count in counts),
            f"{at(entry, 32)['p99_ms']:.1f}",
            f"{entry['memory_mb']:,.0f}",
            f"{entry['ready_s']:.1f}",
            str(sum(row["errors"] for row in entry["loads"])),
            f"{over['rps']:.1f} × / {over['p99_ms']:.2f}" if over else "",
        ]


def imagenet_parts(imagenet: Document, mobilenet: Document | None = None) -> Iterator[str]:
    """Networks of 1,000 classes, and photos."""
    yield "## A network of 1,000 classes, and photos"
    yield (HERE / "performance.imagenet.md").read_text().rstrip()
    yield source(imagenet, "imagenet.json")
    if "--quick" in imagenet["command"]:
        yield "This was a single round beside other work: its ratios say more than its times."
    yield "### Photos beside other servers"
    yield table(
        ["target", "wanted", "figure", "reached"],
        [target.row(imagenet, {}) for target in IMAGENET_TARGETS],
    )
    yield table(PHOTO_HEAD, photo_rows(imagenet))
    yield (HERE / "performance.photos.md").read_text().rstrip()
    if mobilenet:
        yield "### The same with MobileNetV2"
        yield "Its weights are random: its times are realistic, its answers mean nothing."
        yield source(mobilenet, "imagenet-mobilenet.json")
        yield table(PHOTO_HEAD, photo_rows(mobilenet))
    yield "### What the service takes"
    service, alone = imagenet["service"], imagenet["per_second"]["model_only"]
    yield table(
        ["figure", ""],
        [
            ["images per second, engine alone, batch 1 / 32", f"{alone['1']:g} / {alone['32']:g}"],
            *([words, f"{service[name]:g}"] for name, words in IMAGENET_SERVICE.items()),
        ],
    )
    yield "### Defenses of 1,000 classes"
    crops = imagenet["crops"]
    yield (
        f"On {crops['images']} square parts of {crops['pictures']} photos, of which the network's "
        "own label counts as right. Microseconds are those of a single row."
    )
    yield table(
        ["defense", "labels changed", "withheld", "L1", "µs", "times `dcp`"],
        imagenet_defense_rows(imagenet["defenses"]),
    )
    served, label = (imagenet["defenses"][name]["l1"] for name in ("codebook", "label"))
    yield (
        f"The goal for `codebook` and `withhold` is an L1 of at most 0.15. It is {served:.3f}, and "
        f"{label:.3f} from labels only: the network spreads its answers over many classes, and a "
        "row of the pooled codebook has one level for the predicted class and equal shares for "
        "the rest ([goals that are missed](../reference/defenses.md#goals-that-are-missed))."
    )


IMAGENET_TARGETS = [
    Target(
        "photos of 12 megapixels, answers per second over the best other server",
        lambda imagenet, _: float(imagenet["targets"]["large rps over the best"]),
        least=3,
    ),
    Target(
        "p99 of the same",
        lambda imagenet, _: float(imagenet["targets"]["large p99 over the best"]),
        most=0.5,
    ),
    Target(
        "slowest published defense over `dcp`",
        lambda imagenet, _: slowest(imagenet["defenses"]),
        least=37,
    ),
]
IMAGENET_SERVICE = {
    "scumble c1 p50_ms": "p50 at 1 connection, 0.3 megapixels, ms",
    "dcp c1 p50_ms": "the same under `dcp`, ms",
    "dcp over none c1 p50": "p50 under `dcp` over none",
    "dcp over none rps": "answers per second at 8 connections, `dcp` over none",
    "rps over model-only batch 1": "answers per second at 8 connections over the engine at batch 1",
    "rps over model-only batch 32": "the same over batch 32",
    "rps over whole": "the same over decode, infer and encode without HTTP",
    "scumble large c1 p50_ms": "p50 at 1 connection, 12 megapixels, ms",
    "full large c1 p50_ms": "the same, decoded in full (`reduce_jpeg` off), ms",
    "full over reduced decoding p50": "full over reduced decoding",
}
IN_GRAPH = {
    "inference": "the network itself",
    "dcp_in_graph": "`dcp` in the graph, as served",
    "mad_reference": "`mad`, as published",
    "grad2_reference": "`grad2`, as published",
}


def slowest(defenses: Document) -> float:
    """The published form that takes longest, in multiples of dcp."""
    forms = [row["us"] for name, row in defenses.items() if name.endswith("_reference")]
    return float(max(forms) / defenses["dcp"]["us"])


def photo_rows(imagenet: Document) -> Iterator[list[str]]:
    """One row for each file and server."""
    for file, size in imagenet["files"].items():
        for number, (name, files) in enumerate(imagenet["servers"].items()):
            row = files[file]
            over = ""
            if "scumble_over_it_rps" in row:
                over = f"{row['scumble_over_it_rps']:.2f} / {row['scumble_over_it_p99']:.2f}"
            yield [
                *((file, f"{size / 1000:,.0f}") if number == 0 else ("", "")),
                name,
                f"{row['rps']:.1f}",
                f"{row['p50_ms']:.0f} / {row['p99_ms']:.0f}" if row["rps"] else "no answer in time",
                over,
                f"{row['errors']:.0f}",
            ]


def imagenet_defense_rows(defenses: Document) -> Iterator[list[str]]:
    """One row for each defense."""
    for name, row in defenses.items():
        effect = ["", "", ""]
        if "l1" in row:
            effect = [f"{row['changed']:.1%}", f"{row['withheld']:.1%}", f"{row['l1']:.3f}"]
        over = f"{row['us'] / defenses['dcp']['us']:,.1f}"
        yield [IN_GRAPH.get(name, f"`{name}`"), *effect, f"{row['us']:,.0f}", over]


def photo_labels(imagenet: Document) -> str:
    """The label of each photo: of both networks, and under policies."""
    names = list(imagenet["photos"][0])
    names.remove("photo")
    return table(
        ["photo", *(name if name in ("float32", "int8") else f"`{name}`" for name in names)],
        [[row["photo"], *(row[name] for name in names)] for row in imagenet["photos"]],
    )


def flames(frames: Document, path: Path) -> None:
    """A flame graph: functions above their callers, as wide as their share of the time."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    # The same stacks are the same file: no random names, no time.
    mpl.rcParams["svg.hashsalt"] = "worker"
    boxes = list(flame_boxes(frames["stacks"]))
    deepest = max(depth for _, depth, _, _ in boxes)
    figure, axis = plt.subplots(figsize=(12, 0.26 * (deepest + 2)), layout="constrained")
    colours = plt.get_cmap("YlOrRd")
    for name, depth, left, share in boxes:
        shade = colours(0.15 + 0.5 * (zlib.crc32(name.encode()) % 97) / 97)
        axis.barh(depth, share, left=left, height=0.94, color=shade, align="edge")
        shown = name.partition(" (")[0][: int(share * 150)]
        if len(shown) > 2:
            axis.text(left + 0.001, depth + 0.42, shown, va="center", fontsize=7, clip_on=True)
    axis.set(xlim=(0, 1), ylim=(0, deepest + 1))
    axis.axis("off")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def flame_boxes(
    calls: Sequence[Document], depth: int = 0, left: float = 0.0
) -> Iterator[tuple[str, int, float, float]]:
    """Name, depth, left edge and width of each function."""
    for call in calls:
        yield call["name"], depth, left, call["share"]
        yield from flame_boxes(call["calls"], depth + 1, left)
        left += call["share"]


def plot(peers: Document, path: Path) -> None:
    """Answers per second at 32 connections, one bar per server."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    entries = sorted(
        (entry for entry in peers["servers"] if entry.get("loads")),
        key=lambda entry: float(at(entry, 32)["rps"]),
    )
    figure, axis = plt.subplots(figsize=(8, 0.34 * len(entries) + 1), layout="constrained")
    names = [f"{entry['server']}, {entry['setting']}" for entry in entries]
    values = [at(entry, 32)["rps"] for entry in entries]
    colours = ["#c0392b" if e["server"] == "scumble" else "#8fa3b5" for e in entries]
    bars = axis.barh(names, values, color=colours)
    axis.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize="small")
    axis.axvline(peers["model_only_per_s"], color="#444444", linestyle=":", linewidth=1.3)
    axis.set_xlabel("answers per second at 32 connections; dotted: the engine alone, batch 1")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.12)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def promises(
    chaos: Document, abuse: Document, fuzz: Document, bombs: Document | None = None
) -> str:
    """Results of the large runs against keys, budgets and bytes, as far as they were made."""
    rows = []
    if chaos:
        answers = ", ".join(f"{code}: {count:,}" for code, count in chaos["answers"].items())
        rows.append(
            [
                "`make chaos`",
                f"{chaos['seconds'] / 60:g} minutes, {sum(chaos['floods'].values())} floods, "
                f"{chaos['attempted']:,} requests of others ({answers})",
                f"{chaos['lost']} lost, {chaos['over_served']} images over the budget, "
                f"{len(chaos['wrong'])} answers that must not be, largest growth of a worker "
                f"{max(chaos['growth'].values()):.1%}",
                "[chaos.json](../../loadtest/chaos.json)",
            ]
        )
    if abuse:
        theft, keys = abuse["theft"], abuse["wrong_keys"]
        rows += [
            [
                "a thief",
                f"a budget of {theft['budget']:,} images, {theft['replicas']} replicas, "
                f"{theft['connections']} connections, Redis",
                f"{theft['images_served']:,} images served",
                "[abuse.json](../../loadtest/abuse.json)",
            ],
            [
                "wrong keys",
                f"{keys['of_each_kind']:,} wrong in the first character, the last, or all",
                "p50 "
                + ", ".join(f"{us} µs" for us in keys["p50_us"].values())
                + f"; no difference (p = {min(keys['p_value'].values()):.2f} or more), "
                f"{keys['series_added']} series added",
                "[abuse.json](../../loadtest/abuse.json)",
            ],
        ]
    if fuzz:
        allowed = sum(count for code, count in fuzz["answers"].items() if code in ("503", "504"))
        rows.append(
            [
                "fuzzing",
                f"{fuzz['requests']:,} broken requests",
                f"no crash, no 5xx but {allowed:,} documented ones"
                if allowed
                else "no crash, no 5xx",
                "[fuzz.json](../../loadtest/fuzz.json)",
            ]
        )
    if bombs:
        worst = {name: one["value"] for name, one in bombs["worst"].items()}
        rows.append(
            [
                "bombs",
                f"{bombs['requests']} requests of at most 10 MiB, made to cost much; one worker",
                f"event loop held {worst['hold_ms']:g} ms at most, `/livez` in "
                f"{worst['livez_ms']:g} ms, {worst['memory_mib']:g} MiB of memory",
                "[bombs.json](../../loadtest/bombs.json)",
            ]
        )
    return table(["run", "what", "came of it", "figures"], rows)


def within(text: str, figures: str) -> str:
    """The page with new `figures` between its markers."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{figures}\n\n{END}{rest.split(END)[1]}"


def read(name: str) -> Document:
    """A committed document; empty if there is none."""
    path = HERE / name
    return dict(json.loads(path.read_text())) if path.exists() else {}


def committed() -> str:
    """The page of the committed figures."""
    names = ("overhead", "alternatives", "protections", "frames")
    files = ("upstream-triton.json", "upstream.json", "upstream-kill.json")
    upstreams = {file: found for file in files if (found := read(file))}
    machines = [Machine(read(f"bench{s}.json"), read(f"peers{s}.json"), s) for s in PROCESSORS]
    machines = [machine for machine in machines if machine.bench]
    overhead, tries, protections, frames = (read(f"{name}.json") for name in names)
    imagenet, mobilenet = read("imagenet.json"), read("imagenet-mobilenet.json")
    return page(machines, overhead, tries, protections, frames, upstreams, imagenet, mobilenet)


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=DOCS)
def main(out: Path) -> None:
    """Write performance.md and its plot into OUT, and update the other pages there."""
    peers = read("peers.json")
    threats = out / "explanation" / "threat-model.md"
    if threats.exists():
        names = ("chaos.json", "abuse.json", "fuzz.json", "bombs.json")
        documents = [read(name) for name in names]
        threats.write_text(within(threats.read_text(), promises(*documents)))
    training, imagenet = out / "how-to" / "training.md", read("imagenet.json")
    if training.exists() and imagenet:
        training.write_text(within(training.read_text(), photo_labels(imagenet)))
    (out / "explanation" / "performance.md").write_text(committed())
    if peers:
        plot(peers, out / "performance-peers.png")
    if "stacks" in (frames := read("frames.json")):
        flames(frames, out / "performance-worker.svg")


if __name__ == "__main__":
    main()
