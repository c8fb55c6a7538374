"""Shares of functions, counted from hand-made samples."""

from loadtest.frames import shares


def test_time_of_a_function_is_counted_for_itself_and_with_what_it_calls():
    folded = "loop;parse 3\nloop;parse;decode 6\nloop 1\n"
    assert shares(folded) == {
        "decode": {"self": 0.6, "total": 0.6},
        "parse": {"self": 0.3, "total": 0.9},
        "loop": {"self": 0.1, "total": 1.0},
    }


def test_a_function_that_calls_itself_counts_once():
    assert shares("a;b;a 4")["a"] == {"self": 1.0, "total": 1.0}
