"""What generators write between marks leaves the rest of a page as it was."""

import pytest

from docs.generators.marks import between


def test_only_what_is_between_the_marks_changes():
    page = "before <a>old</a> after\n"
    assert between(page, "<a>", "new", "</a>") == "before <a>new</a> after\n"
    assert between(page, "<a>", "old", "</a>") == page


@pytest.mark.parametrize("page", ["", "<a> alone", "</a> alone", "</a> in the wrong order <a>"])
def test_a_page_without_both_marks_is_refused(page):
    with pytest.raises(ValueError, match="lacks the marks '<a>' and '</a>'"):
        between(page, "<a>", "new", "</a>")
