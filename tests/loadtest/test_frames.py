"""Shares of functions, counted from hand-made samples."""

from loadtest.frames import shares, tree
from loadtest.pages import flame_boxes


def test_time_of_a_function_is_counted_for_itself_and_with_what_it_calls():
    folded = "loop;parse 3\nloop;parse;decode 6\nloop 1\n"
    assert shares(folded) == {
        "decode": {"self": 0.6, "total": 0.6},
        "parse": {"self": 0.3, "total": 0.9},
        "loop": {"self": 0.1, "total": 1.0},
    }


def test_a_function_that_calls_itself_counts_once():
    assert shares("a;b;a 4")["a"] == {"self": 1.0, "total": 1.0}


def test_stacks_are_nested_and_small_ones_left_out():
    folded = "run;parse;start 300\nrun;parse 100\nrun;infer 599\nrun;rare 1"
    start = {"name": "start", "share": 0.3, "calls": []}
    parse = {"name": "parse", "share": 0.4, "calls": [start]}
    infer = {"name": "infer", "share": 0.599, "calls": []}
    stacks = [{"name": "run", "share": 1.0, "calls": [infer, parse]}]
    assert tree(folded) == stacks
    assert list(flame_boxes(stacks)) == [
        ("run", 0, 0.0, 1.0),
        ("infer", 1, 0.0, 0.599),
        ("parse", 1, 0.599, 0.4),
        ("start", 2, 0.599, 0.3),
    ]
