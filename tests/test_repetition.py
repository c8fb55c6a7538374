"""No logic is written twice: no two places outside the tests share 16 lines or more."""

import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
CODE = {".css", ".html", ".js", ".py", ".sh", ".toml", ".yaml", ".yml"}
LONGEST = 15


def repeated(files: Mapping[str, str]) -> list[str]:
    """Places whose next lines stand somewhere else, too; blanks and indents do not count."""
    seen: dict[tuple[str, ...], str] = {}
    found = []
    for name, text in files.items():
        lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        for start in range(len(lines) - LONGEST):
            window = lines[start : start + LONGEST + 1]
            place = f"{name}:{window[0][0]}"
            first = seen.setdefault(tuple(line for _, line in window), place)
            if first != place:
                found.append(f"{first} ~ {place}")
    return found


def test_nothing_is_written_twice():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True  # noqa: S607
    ).stdout.splitlines()  # fmt: skip
    files = {
        name: (ROOT / name).read_text()
        for name in listed
        if Path(name).suffix in CODE and not name.startswith("tests/") and (ROOT / name).is_file()
    }
    assert {"app/main.py", "scumble/cli.py"} < set(files)
    assert repeated(files) == []


def test_sixteen_equal_lines_are_found():
    lines = [f"call({n})" for n in range(LONGEST + 1)]
    once = "\n".join(["first", *lines])
    indented = "\n\n".join(f"    {line}" for line in lines)
    assert repeated({"a": once, "b": indented}) == ["a:2 ~ b:1"]
    assert repeated({"a": once, "b": "\n".join(lines[1:])}) == []
