"""Chains of lines: every edit is found, and said where; a crash is told from an edit."""

import subprocess
import sys
from itertools import pairwise

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.audit.chain_file import ChainFile
from app.audit.hash_chain import MARK, Link, opened, read, sealed, tail, verify
from app.commands.audit import audit

CHAIN = "0123456789abcdef"


def chain(count: int, link: Link | None = None) -> list[bytes]:
    link = link or Link(CHAIN)
    lines = []
    for number in range(count):
        line, link = sealed(link, {"kind": "prediction", "number": number, "text": '","seal":"é'})
        lines.append(line)
    return lines


LINES = chain(6)
WHOLE = b"".join(LINES)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "audit"


def faults(file, data: bytes, *heads: str):
    file.write_bytes(data)
    return verify([file], heads)[1]


def end(line: bytes) -> str:
    return opened(line[:-1])[1].seal


def test_what_was_written_is_whole(file):
    assert faults(file, WHOLE, end(LINES[-1])) == []
    (part,), _ = verify([file])
    assert len(part.seals) == 6
    assert part.last == Link(CHAIN, 5, end(LINES[-1]))


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(WHOLE) - 1), byte=st.integers(0, 255))
def test_any_edit_of_any_byte_is_found(file, at, byte):
    if WHOLE[at] == byte:
        return
    (fault,) = faults(file, WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :])
    assert fault.kind == "broken"
    # An end of line that is written over joins two lines; one written in makes two.
    assert fault.line == WHOLE[:at].count(b"\n") + 1


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=st.integers(0, len(WHOLE)),
    gone=st.integers(0, 400),
    put=st.binary(max_size=40) | st.sampled_from(LINES),
)
def test_any_splice_is_found_but_for_an_end_cut_off(file, at, gone, put):
    data = WHOLE[:at] + put + WHOLE[at + gone :]
    found = faults(file, data)
    if WHOLE.startswith(data) and (not data or data.endswith(b"\n")):
        assert found == []  # whole lines at the end: only a head tells
    else:
        assert found
    if data != WHOLE:
        assert faults(file, data, end(LINES[-1])), "the head tells"


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(1, len(WHOLE) - 1))
def test_a_cut_is_told_from_an_edit(file, at):
    found = faults(file, WHOLE[:at])
    if WHOLE[at - 1 : at] == b"\n":
        assert found == []
    else:
        (fault,) = found
        assert (fault.kind, fault.line) == ("cut", WHOLE[:at].count(b"\n") + 1)


REORDERED = {
    "deleted": (LINES[:2] + LINES[3:], 3, "lines 2 to 2 are missing before line 3"),
    "two deleted": (LINES[:1] + LINES[3:], 2, "lines 1 to 2 are missing"),
    "repeated": (LINES[:3] + LINES[2:], 4, "line 2 comes after line 2: reordered or repeated"),
    "swapped": ([LINES[1], LINES[0], *LINES[2:]], 2, "line 0 comes after line 1"),
    "another chain": (LINES[:3] + chain(3, Link("f" * 16)), 4, "begins in the middle of chain"),
    "sealed again": (
        LINES[:2] + chain(1, Link(CHAIN, 1, "a" * 64)),
        3,
        "one was edited and sealed",
    ),
    "first deleted": (LINES[1:], 1, "goes on from line 0"),
    "no log": ([b"hello\n"], 1, "the line was edited"),
    "end written over": ([*LINES[:5], LINES[5][:-1] + b"x"], 6, "the last line was edited"),
    "other line begun": ([*LINES[:5], LINES[3][:60]], 6, "the last line was edited"),
    "end with zeros": ([*LINES[:5], LINES[5][:200] + bytes(9)], 6, "the last line was edited"),
    "wrong seal begun": ([*LINES[:5], LINES[5][:-10] + b"zzz"], 6, "the last line was edited"),
}


@pytest.mark.parametrize("name", REORDERED)
def test_the_fault_is_named_with_its_line(file, name):
    lines, number, why = REORDERED[name]
    fault = faults(file, b"".join(lines))[0]
    assert (fault.line, fault.kind) == (number, "broken")
    assert why in fault.why


def test_a_chain_over_files_is_checked_in_any_order(tmp_path):
    files = [tmp_path / name for name in "abc"]
    for file, lines in zip(files, (LINES[:2], LINES[2:3], LINES[3:]), strict=True):
        file.write_bytes(b"".join(lines))
    assert verify(files[::-1])[1] == []
    (fault,) = verify([files[0], files[2]])[1]
    assert fault.file == files[2]
    assert "goes on from line 2" in fault.why
    # What was archived is vouched for by the head that was kept of it.
    assert verify(files[2:], archived=[end(LINES[2])])[1] == []
    assert verify(files[2:], [end(LINES[5])], [end(LINES[2])])[1] == []
    (tmp_path / "d").write_bytes(b"".join(LINES[2:3]))
    (fault,) = verify([*files, tmp_path / "d"])[1]
    assert "one is a copy" in fault.why


@pytest.mark.parametrize("kept", range(len(LINES)))
def test_a_head_must_be_found_not_only_referred_to(file, kept):
    """Deleting every line up to the head leaves a line that names the head."""
    head = end(LINES[kept])
    found = faults(file, b"".join(LINES[kept + 1 :]), head)
    assert any(f"no line has the head {head}" in fault.why for fault in found)
    if kept + 1 == len(LINES):
        return
    assert verify([file], archived=[head])[1] == []
    assert verify([file], [head], [head])[1], "archived lines are not lines that are here"
    done = run("verify", "--head", head, str(file))
    assert done.exit_code == 1
    assert "--archived-through" in done.output
    assert run("head", str(file)).exit_code == 1
    done = run("head", "--archived-through", head, str(file))
    assert done.output.startswith(end(LINES[-1]))
    assert run("verify", "--archived-through", head, str(file)).exit_code == 0


def test_no_two_files_go_on_from_one_archived_line(tmp_path):
    """Its chain and number are not known, so a forgery could claim others."""
    archived = end(LINES[2])
    for name, lines in (
        ("true", LINES[3:]),
        ("forged", chain(3, Link("f" * 16, 99, archived))),
    ):
        (tmp_path / name).write_bytes(b"".join(lines))
    files = sorted(tmp_path.iterdir())
    (fault,) = verify(files, archived=[archived])[1]
    assert "another file goes on from the same line" in fault.why


@pytest.mark.parametrize("cut", [0, 1, 30, 100, 200])
def test_the_tail_is_where_a_writer_goes_on(file, cut):
    file.write_bytes(WHOLE + chain(1, Link(CHAIN, 5, end(LINES[-1])))[0][:cut])
    last, rest = tail(file)
    assert last == Link(CHAIN, 5, end(LINES[-1]))
    assert len(rest) == cut
    file.write_bytes(LINES[0][:cut])
    assert tail(file) == (None, LINES[0][:cut])


def test_every_line_refers_to_the_one_before():
    links = [opened(line[:-1]) for line in LINES]
    assert all(one[1] == two[0] for one, two in pairwise(links))
    assert all(line.count(MARK) == 1 for line in LINES)


def writer(file, **options) -> ChainFile:
    return ChainFile(file, **{"fsync": "never", **options})


def test_a_writer_goes_on_where_the_last_one_was_killed(tmp_path):
    first = writer(tmp_path / "log")
    first.append([{"n": 1}])
    first.close()
    at = tmp_path / "log.worker-0"
    whole = at.read_bytes()
    at.write_bytes(whole + whole.splitlines(keepends=True)[1][:50])
    assert read(at).fault.why == "the last line was edited: no crash leaves such a line"
    link = read(at).last
    begun = sealed(link, {"n": 2})[0][:170]
    at.write_bytes(whole + begun)
    assert read(at).fault.kind == "cut"
    second = writer(tmp_path / "log")
    second.append([{"n": 3}])
    second.close()
    assert verify([at])[1] == []
    assert len(read(at).seals) == 4
    assert b'"cut":"' in at.read_bytes()  # what the crash left is kept


def test_writers_have_files_of_their_own(tmp_path):
    writers = [writer(tmp_path / "log") for _ in range(3)]
    for n in range(4):
        for each in writers:
            each.append([{"n": n}])
    found = sorted(tmp_path.iterdir())
    assert [path.name for path in found] == ["log.worker-0", "log.worker-1", "log.worker-2"]
    parts, wrong = verify(found)
    assert wrong == []
    assert [len(part.seals) for part in parts] == [5, 5, 5]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in found)


def test_a_renamed_file_goes_on_in_a_new_one(tmp_path):
    one, two = writer(tmp_path / "log"), writer(tmp_path / "log")
    one.append([{"n": 1}])
    two.append([{"n": 1}])
    for number in range(2):
        path = tmp_path / f"log.worker-{number}"
        path.rename(tmp_path / f"log.worker-{number}.1")
    two.append([{"n": 2}])  # takes the first name that is free
    one.append([{"n": 2}])
    two.append([{"n": 3}])
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4
    assert verify(files)[1] == []
    files[1].unlink()
    assert len(verify(sorted(tmp_path.iterdir()))[1]) == 1


def test_an_edited_file_is_left_alone(tmp_path):
    first = writer(tmp_path / "log")
    first.append([{"n": 1}])
    first.close()
    at = tmp_path / "log.worker-0"
    edited = at.read_bytes().replace(b'"n":1', b'"n":7')
    at.write_bytes(edited)
    second = writer(tmp_path / "log")
    second.append([{"n": 2}])
    assert at.read_bytes() == edited
    assert verify([tmp_path / "log.worker-1"])[1] == []


def test_a_full_disk_leaves_no_half_line(tmp_path):
    """A limit on the file's size takes the first part of a write, as a full disk does."""
    code = """
import resource, signal, sys
from pathlib import Path
from app.audit.chain_file import ChainFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = ChainFile(Path(sys.argv[1]), fsync="always")
file.append([{"n": 1}])
size = Path(sys.argv[1] + ".worker-0").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
try:
    file.append([{"n": 2}])
except OSError:
    print(Path(sys.argv[1] + ".worker-0").stat().st_size == size)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
file.append([{"n": 3}])
"""
    at = tmp_path / "log"
    done = subprocess.run(
        [sys.executable, "-c", code, str(at)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"
    assert verify([at.with_name("log.worker-0")])[1] == []


@pytest.mark.parametrize(("fsync", "expected"), [("always", 4), ("everysec", 2), ("never", 0)])
def test_fsync_is_as_often_as_said(tmp_path, fsync, expected):
    synced = []
    times = iter([0.0, 0.6, 1.2, 1.8, 2.4])
    each = writer(tmp_path / "log", fsync=fsync, clock=times.__next__, sync=synced.append)
    for _ in range(4):
        each.append([{"n": 1}])
    assert len(synced) == expected


def run(*arguments: str):
    return CliRunner().invoke(audit, arguments)


def test_the_command_says_where_and_ends_with_1(tmp_path):
    file = tmp_path / "log"
    file.write_bytes(WHOLE)
    done = run("verify", str(file))
    assert done.exit_code == 0
    assert done.output == f"ok: {file}: lines 0 to 5 of chain {CHAIN}\n"
    head = run("head", str(file)).output.split()[0]
    assert head == end(LINES[-1])
    assert run("verify", "--head", head, str(file)).exit_code == 0

    file.write_bytes(b"".join(LINES[:5]))
    assert run("verify", str(file)).exit_code == 0
    done = run("verify", "--head", head, str(file))
    assert done.exit_code == 1
    assert f"no line has the head {head}: lines are missing" in done.output

    file.write_bytes(WHOLE.replace(b'"number":2', b'"number":9'))
    done = run("verify", str(file))
    assert done.exit_code == 1
    assert done.output.startswith(f"BROKEN: {file}:3: the line was edited")
    assert run("head", str(file)).exit_code == 1
    assert run("head", str(file)).stdout == ""

    file.write_bytes(WHOLE[:-40])
    done = run("verify", str(file))
    assert done.exit_code == 3
    assert done.output.startswith(f"CUT SHORT: {file}:6: ")

    file.write_bytes(b"")
    assert run("verify", str(file)).output == f"ok: {file}: empty\n"
    assert run("verify", "--head", "x", str(file)).exit_code == 2
    assert run("verify", "--archived-through", "x", str(file)).exit_code == 2
    assert run("verify", str(tmp_path / "none")).exit_code == 2
