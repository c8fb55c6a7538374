"""The changelog has a section for each release, and the newest one is the package's version."""

import pytest

from docs.generators.releases import ROOT, problems, version

GOOD = """# Changelog

## [Unreleased]

### Added

- more

## [0.2.0] - 2026-11-29

### Fixed

- it

## [0.1.0] - 2026-10-01

[Unreleased]: https://example.org/compare/v0.2.0...main
[0.2.0]: https://example.org/compare/v0.1.0...v0.2.0
[0.1.0]: https://example.org/tag/v0.1.0
"""


def test_the_changelog_and_the_package_agree():
    assert problems((ROOT / "CHANGELOG.md").read_text(), version()) == []


def test_a_changelog_of_releases_is_right_with_links_or_without():
    assert problems(GOOD, "0.2.0") == []
    assert problems(GOOD[: GOOD.index("[Unreleased]: ")], "0.2.0") == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("## [Unreleased]\n", "", "the first heading is"),
        ("[0.2.0] - 2026-11-29", "0.2.0", "not of the form"),
        ("2026-11-29", "2026-13-29", "not of the form"),
        ("2026-11-29", "2026-09-29", "not in order"),
        ("## [0.2.0]", "## [0.0.9]", "not in order"),
        ("## [0.2.0]", "## [0.3.0]", "the newest version is 0.3.0, the package's is 0.2.0"),
        ("### Fixed", "### Repaired", "'Repaired' is not one of"),
        ("[0.2.0]: https", "[0.2.1]: https", "the links are of"),
        ("v0.2.0", "v0.2.1", "do not name the tag v0.2.0"),
    ],
)
def test_what_does_not_agree_is_said(old, new, said):
    assert old in GOOD
    assert any(said in problem for problem in problems(GOOD.replace(old, new), "0.2.0"))
