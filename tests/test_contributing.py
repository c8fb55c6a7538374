"""The picture of the request path in CONTRIBUTING.md."""

import pytest

from docs.generators.request_path import ENDPOINT, PAGE, Trace, paths, replaced, text

BORDERS = {"Without keys": 12, "With keys, budgets and the audit log": 16}


@pytest.fixture(scope="module")
def found():
    return paths()


@pytest.mark.parametrize(("name", "most"), BORDERS.items(), ids=["open", "guarded"])
def test_a_request_crosses_few_borders_and_comes_back_to_no_file_but_the_endpoint(
    found, name, most
):
    path = found[name]
    assert ENDPOINT in path.callers
    assert 0 < path.borders <= most
    assert path.again.keys() <= {ENDPOINT}


def test_the_picture_is_current(found):
    page = PAGE.read_text()
    assert page == replaced(page, text(found)), "run python -m docs.generators.request_path"


def test_a_file_that_is_called_from_two_others_is_visited_twice():
    path = Trace()
    for caller, file in [("", "a"), ("a", "b"), ("a", "b"), ("b", "c"), ("", "b"), ("c", "a")]:
        path.add(caller, file)
    assert path.borders == 2
    assert path.again == {"a": {"c"}}
    assert list(path.tree()) == ["a", "└─ b", "   └─ c"]
