"""Whom one may attack: this machine, and others with their owner's consent.

The host is read as httpx2 reads it, so what is judged here is what is connected to. Nothing is
resolved: a name that happens to point here today is somebody else's tomorrow.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import httpx2

from attacker.errors import AttackError, NoConsent

LONGEST = 4096  # characters of a token
TOKEN = re.compile(rb"([!-~](?:[ -~]*[!-~])?)\r?\n?")
NAME = re.compile(r"(?:[a-z0-9_-]+\.)*localhost")


def check(url: str, *, consent: bool, token: Path | None) -> dict[str, str]:
    """The headers to send to `url`.

    Args:
        url: of the service.
        consent: the person says that the owner agreed.
        token: file with the owner's bearer token; sent wherever it is given.

    Raises:
        NoConsent: `url` is another machine's and one of the two is missing, or the file holds no
            token.
        AttackError: `url` is not one.
    """
    if not loopback(url) and not (consent and token):
        raise NoConsent(
            f"{httpx2.URL(url).host} is not this machine; allowed: localhost, or with the owner's "
            "consent any host, given --i-have-the-owners-consent and --owner-token FILE"
        )
    return {"Authorization": f"Bearer {_read(token)}"} if token else {}


def loopback(url: str) -> bool:
    """Whether `url` is this machine by its name or address alone.

    Raises:
        AttackError: `url` is not http or https, has no host, or has a user's name in it.
    """
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as exc:
        raise AttackError(f"the URL is {url!r}: {exc}") from exc
    if parsed.userinfo:  # would be sent in the token's place, and looks like a host
        raise AttackError(f"the URL of {parsed.host!r} has a user's name; allowed: none")
    if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) > 65535:
        raise AttackError(f"the URL is {url!r}; allowed: http://HOST[:PORT] or https://HOST[:PORT]")
    host = parsed.raw_host.decode("ascii")
    if NAME.fullmatch(host):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False  # a name, or a short form such as 127.1 that resolvers read each in their way
    if isinstance(address, ipaddress.IPv6Address):
        return not address.scope_id and (address.ipv4_mapped or address).is_loopback
    return address.is_loopback


def _read(token: Path) -> str:
    try:
        if not token.is_file():
            raise OSError("not a regular file")
        with token.open("rb") as file:
            found = TOKEN.fullmatch(file.read(LONGEST + 3))
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        raise NoConsent(f"--owner-token is {str(token)!r}: {exc}") from exc
    if not found or len(found[1]) > LONGEST:
        raise NoConsent(
            f"--owner-token is {str(token)!r}; allowed: a file with one line of at most {LONGEST} "
            "printable ASCII characters"
        )
    return found[1].decode("ascii")
