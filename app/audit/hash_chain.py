"""The format of the audit log, a chain of hashed lines, and its verification.

    {"seq":7,"chain":"<id>","prev":"<seal of line 6>", what happened ,"seal":"<SHA-256>"}

A line's seal is the SHA-256 of all its bytes before `,"seal":`, the seal of the line before
included. A changed byte breaks its own line, and a corrected seal breaks the next line. The last
line has no next one: its seal, the head, must be kept elsewhere to detect that lines are missing at
the end or that all lines were sealed again.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import orjson

START = "0" * 64  # what the first line of a chain has in place of a seal
SEAL = re.compile(rb'(\{"seq":(\d{1,15}),"chain":"([0-9a-f]{16})","prev":"([0-9a-f]{64})".*)'
                  rb',"seal":"([0-9a-f]{64})"\}', re.DOTALL)  # fmt: skip
SEAL_TEXT = re.compile("[0-9a-f]{64}")
MARK = b',"seal":"'
TAIL_BYTES = 2**16  # more than any line has

Kind = Literal["broken", "cut"]


class Link(NamedTuple):
    """Where a chain stands: what the next line must refer to.

    Attributes:
        chain: its id, 16 hexadecimal digits.
        seq: number of the last line; -1 before the first.
        seal: of that line.
    """

    chain: str
    seq: int = -1
    seal: str = START

    def head(self) -> bytes:
        """How the next line begins."""
        return f'{{"seq":{self.seq + 1},"chain":"{self.chain}","prev":"{self.seal}"'.encode()


@dataclass(frozen=True)
class Fault:
    """Where a file is not what was written.

    Attributes:
        kind: `cut` is a last line without its end, as a crash leaves it; all else is `broken`.
        line: counted from 1.
        why: a sentence.
    """

    file: Path
    line: int
    why: str
    kind: Kind = "broken"


@dataclass
class Part:
    """What one file holds of a chain.

    Attributes:
        first: what its first line refers to; None where there is no whole line.
        last: where it ends.
        seals: of all its lines.
    """

    file: Path
    first: Link | None = None
    last: Link | None = None
    seals: list[str] = field(default_factory=list)
    fault: Fault | None = None


def sealed(link: Link, entry: Mapping[str, Any]) -> tuple[bytes, Link]:
    """A line with its end, and where the chain stands after it."""
    body = link.head() + b"," + orjson.dumps(entry)[1:-1]
    seal = hashlib.sha256(body).hexdigest()
    return body + MARK + seal.encode() + b'"}\n', Link(link.chain, link.seq + 1, seal)


def opened(line: bytes) -> tuple[Link, Link] | None:
    """A whole line without its end -> what it refers to and where it leads; None if it is none."""
    found = SEAL.fullmatch(line)
    if found is None or hashlib.sha256(found[1]).hexdigest().encode() != found[5]:
        return None
    chain, seq = found[3].decode(), int(found[2])
    return Link(chain, seq - 1, found[4].decode()), Link(chain, seq, found[5].decode())


def verify(
    files: Sequence[Path], heads: Collection[str] = (), archived: Collection[str] = ()
) -> tuple[list[Part], list[Fault]]:
    """Check files that belong together, in any order.

    Args:
        files: of one or several chains; a chain may go on from file to file.
        heads: seals that were kept elsewhere. The line of each must be in a file: that another line
            refers to it does not show that it is there.
        archived: seals of the last lines of files that are not among `files`. A file may go on from
            such a line.

    Raises:
        OSError: a file cannot be read.
    """
    parts = [read(file) for file in files]
    faults = [part.fault for part in parts if part.fault is not None]
    faults += _unconnected(parts, archived)
    known = {seal for part in parts for seal in part.seals}
    why = (
        "no line has the head {}: lines are missing, or all were sealed again; the head of lines "
        "that are archived elsewhere is given with --archived-through"
    )
    faults += [Fault(files[0], 0, why.format(head)) for head in heads if head not in known]
    return parts, faults


def read(file: Path) -> Part:
    """One file, up to its first fault.

    Raises:
        OSError: it cannot be read.
    """
    part = Part(file)
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            part.fault = _take(part, number, line)
            if part.fault is not None:
                break
    return part


def tail(file: Path) -> tuple[Link | None, bytes]:
    """The last whole line of a file, if it has one, and what stands behind it.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as bytes_:
        bytes_.seek(max(0, bytes_.seek(0, os.SEEK_END) - TAIL_BYTES))
        found = bytes_.read()
    end = len(found)
    while end := found.rfind(b"\n", 0, end) + 1:
        start = found.rfind(b"\n", 0, end - 1) + 1
        whole = opened(found[start : end - 1])
        if whole is not None:
            return whole[1], found[end:]
        end = start
    return None, found


def _unconnected(parts: list[Part], archived: Collection[str]) -> Iterator[Fault]:
    """Beginnings of files that lead nowhere, or where another file leads as well."""
    ends = {part.last for part in parts}
    begun: set[Link | str] = set()
    for part in parts:
        first = part.first
        if first is None:
            continue
        # Of an archived line only the seal is known: no two files go on from one, whatever chain
        # and number they claim for it.
        line = first if first.seal == START else first.seal
        if line in begun:
            yield Fault(part.file, 1, "another file goes on from the same line: one is a copy")
        begun.add(line)
        if first != Link(first.chain) and first not in ends and first.seal not in archived:
            yield Fault(
                part.file,
                1,
                f"goes on from line {first.seq} of chain {first.chain}, with which no file here "
                "ends: a file is missing, or lines at an end or a beginning",
            )


def _take(part: Part, number: int, line: bytes) -> Fault | None:
    if not line.endswith(b"\n"):
        return _without_end(part, number, line)
    whole = opened(line[:-1])
    if whole is None:
        return Fault(part.file, number, "the line was edited: its seal is not that of its content")
    before, after = whole
    if part.last is None:
        part.first = before
    elif before != part.last:
        return Fault(part.file, number, _jump(part.last, before))
    part.last = after
    part.seals.append(after.seal)
    return None


def _without_end(part: Part, number: int, line: bytes) -> Fault:
    """A crash leaves the beginning of the line that was due; anything else was put there."""
    due = b'{"seq":' if part.last is None else part.last.head()
    if due.startswith(line[: len(due)]) and _unfinished(line):
        return Fault(part.file, number, "the last line has no end, as after a crash", "cut")
    return Fault(part.file, number, "the last line was edited: no crash leaves such a line")


def _unfinished(line: bytes) -> bool:
    """Whether there is a way to go on that makes it a line."""
    body, mark, rest = line.rpartition(MARK)
    if not mark or len(rest) > len(START) + 2:
        return not mark and b"\0" not in line
    return (hashlib.sha256(body).hexdigest().encode() + b'"}').startswith(rest)


def _jump(last: Link, before: Link) -> str:
    if before.chain != last.chain:
        return f"chain {before.chain} begins in the middle of chain {last.chain}"
    if before.seq > last.seq:
        return f"lines {last.seq + 1} to {before.seq} are missing before line {before.seq + 1}"
    if before.seq < last.seq:
        return f"line {before.seq + 1} comes after line {last.seq}: reordered or repeated"
    return f"line {before.seq + 1} refers to another line {last.seq}: one was edited and sealed"
