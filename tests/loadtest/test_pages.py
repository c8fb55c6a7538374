"""Targets judged by hand-made figures."""

import pytest

from loadtest import pages
from loadtest.bench import Rounds, worse
from loadtest.overhead import FIGURES


def service(rps):
    return {
        str(c): {"rps": rps, "p50_ms": 1.0, "p99_ms": 3.0, "client_share": 0.1}
        for c in (1, 8, 32, 64)
    }


def case(model="cifar10", **ratios):
    return {
        "model": model,
        "precision": "int8",
        "errors": 0,
        "per_second": {
            "model_only": {"1": 1000, "32": 1200, "256": 1100},
            "whole_without_http": 900,
            "tensors_of_256": 1000,
            "one_worker_c32": 500,
        },
        "service": {"none": service(910), "dcp": service(900)},
        "stage_us_c1": {d: dict.fromkeys(pages.STAGES, 10.0) for d in ("none", "dcp")},
        "memory_mb": {"one_worker": 200, "each_more": 90},
        "ratios": {
            f"c{c} {name}": 0.95
            for c in (1, 8, 32, 64)
            for name in ("over whole", "over model-only batch 1", "over model-only batch 32")
        }
        | {f"c{c} dcp over none {what}": 0.99 for c in (1, 8, 32, 64) for what in ("rps", "p50")}
        | {"tensors over model-only": 0.7, "all workers over one, the same load": 1.8}
        | ratios,
    }


def peer(name, setting, rps, **more):
    row = {"connections": 32, "rps": rps, "p99_ms": 10.0, "errors": 0}
    if name != "scumble":
        row["scumble_over_it"] = {"defended": {"rps": 900 / rps, "p99_ms": 0.4}}
    return {
        "server": name,
        "setting": setting,
        "memory_mb": 200.0 if name == "scumble" else 400.0,
        "ready_s": 2.0,
        "loads": [row],
        "failures": [],
    } | more


BENCH = {"command": "bench", "cores": 2, "processor": "p", "cases": [case()]}
PEERS = {
    "command": "peers",
    "cores": 2,
    "processor": "p",
    "model_only_per_s": 1000,
    "servers": [
        peer("scumble", "defended", 900.0),
        peer("one", "stock", 100.0),
        peer("two", "stock", 200.0),
        peer("one", "tuned", 300.0),
        {"server": "three", "setting": "tuned", "failures": ["round 1: it did not start"]},
    ],
}


def reached(words, bench=BENCH, peers=PEERS):
    (target,) = [target for target in pages.TARGETS if target.words == words]
    return target.row(bench, peers)[2:]


def test_targets():
    assert reached("64 connections over model-only at batch 1") == ["0.95", "yes"]
    assert reached("64 connections over the loop without HTTP") == ["0.95", "**no**"]
    assert reached("tensors of 256 over model-only") == ["0.7", "**no**"]
    assert reached("memory of one more worker, MB") == ["90", "yes"]
    assert reached("best stock peer, answers per second") == ["4.5", "**no**"]  # of two's 200
    assert reached("best tuned peer, answers per second") == ["3", "yes"]
    assert reached("memory over the smallest peer, defended") == ["0.5", "yes"]
    assert reached("memory over the smallest peer, undefended") == ["not measured", ""]
    assert reached("errors in minutes of load") == ["not measured", ""]
    assert reached("best tuned peer, p99", peers={}) == ["not measured", ""]


def test_a_page_says_what_did_not_run():
    page = pages.page([pages.Machine(BENCH, PEERS)])
    assert "| three | tuned | — |" in page
    assert "it did not start" in page
    assert "| scumble | defended | 900 | 10.0 | 200 | 2.0 | 0 |  |" in page


def test_each_processor_has_its_column_and_its_tables():
    slower = BENCH | {"processor": "q", "cases": [case(**{"tensors over model-only": 0.9})]}
    page = pages.page(
        [pages.Machine(BENCH, PEERS), pages.Machine(slower, {}, "-q")],
    )
    assert "| target | wanted | p | reached | q | reached |" in page
    assert "| tensors of 256 over model-only | ≥ 0.8 | 0.7 | **no** | 0.9 | yes |" in page
    assert "| best stock peer, answers per second | ≥ 6 | 4.5 | **no** | not measured |  |" in page
    assert "[bench.json](../../loadtest/bench.json): 2 cores, p." in page
    assert "[bench-q.json](../../loadtest/bench-q.json): 2 cores, q." in page
    assert "at batch 32, with AMX | ≥ 0.65 | — |  | — |  |" in page
    assert "at batch 32, without AMX | ≥ 0.88 | 0.95 | yes | 0.95 | yes |" in page
    assert page.count("## Beside other servers") == page.count("[peers.json]") == 1


def test_costs_beside_the_engine_and_of_protections_are_tables():
    run = {"command": "c", "cores": 2, "processor": "p"}
    row = dict.fromkeys(FIGURES, 10.0)
    case_ = {"model": "m", "precision": "int8", "connections": {"64": row}}
    protected = {"us": 120.4, "more_us": 20.0, "rps_over_none": 0.9}
    tried = {"one": (10.0, 8.0), "two": (10.0, 10.2), "three": (1.0, 2.0)}
    tries = {name: {"used_us": used, "tried_us": us} for name, (used, us) in tried.items()}
    page = pages.page(
        [pages.Machine(BENCH, PEERS)],
        run | {"cases": [case_]},
        run | {"tries": tries},
        run | {"services": {"keys": protected}},
    )
    assert "| `m` int8 | 64 | 10.0 | 10 | 10 | 10 | 10 | 10.0 | 10.0 | 10 |" in page
    assert "| one | 10.0 | 8.0 | quicker |" in page
    assert "| two | 10.0 | 10.2 | no difference |" in page
    assert "| three | 1.0 | 2.0 | slower |" in page
    assert "| keys | 120 | +20 | 0.90 |" in page


def test_the_cost_of_standing_in_front_is_a_table_for_each_server():
    case_ = {
        "images": 8,
        "connections": 32,
        "images_per_s": {"alone": 1000.0, "front": 900.0},
        "p99_ms": {"alone": 10.0, "front": 12.0},
        "errors": {"alone": 0, "front": 1},
        "throughput_ratio": 0.9,
        "p99_ratio": 1.2,
    }
    killed = {
        "seconds": 600,
        "kills": 9,
        "answered": 5000,
        "refused": {"503": 70},
        "undocumented": 0,
        "wrong": 0,
        "undefended": 0,
        "recovery_s": {"median": 0.1, "longest": 0.4},
    }
    run = {"command": "c", "cores": 2, "processor": "p", "upstream": "Other", "files": case_}
    run |= {"cases": [case_], "kill": killed, "worker_mb": {"pss": 41.2}}
    started = run | {"process_start_to_ready_s": 1.2}
    found = pages.page([pages.Machine(BENCH, PEERS)], upstreams={"u.json": started})
    assert "**Other.** `c`, [u.json](../../loadtest/u.json)" in found
    row = "32 connections | 1,000 / 900 | 0.90 | 10.0 / 12.0 | 1.20 | 1 |"
    assert f"| tensors of 8, {row}" in found
    assert f"| PNG files, JSON answers, {row}" in found
    assert "A worker takes 41 MB, and the service is ready 1.2 s" in found
    assert "Killed 9 times in 10 minutes under load: 5,000 answers" in found
    alone = pages.page(
        [pages.Machine(BENCH, PEERS)], upstreams={"k.json": run | {"cases": [], "files": None}}
    )
    assert "Killed 9 times" in alone
    assert "A worker takes" not in alone


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    found = Rounds()
    for one, other in ((1, 2), (9, 3), (4, 4)):
        found.add("one", one)
        found.add("other", other)
    assert found.ratio("one", "other") == 1.0
    assert found.median("one") == 4


@pytest.mark.parametrize(
    ("name", "value", "counts"),
    [
        ("tensors over model-only", 0.55, True),
        ("tensors over model-only", 0.65, False),
        ("tensors over model-only", 0.9, False),
        ("c1 dcp over none p50", 1.3, True),
        ("c1 dcp over none p50", 0.5, False),
    ],
)
def test_only_what_got_worse_is_told(name, value, counts):
    found = worse({"cases": [case(**{name: value})]}, BENCH, 0.15)
    assert bool(found) == counts
    assert all(name in line for line in found)


def test_the_committed_page_is_made_of_the_committed_figures():
    committed = (pages.DOCS / "explanation" / "performance.md").read_text()
    assert pages.committed() == committed, "run: python -m loadtest.pages"
