"""Which hosts may be attacked: this machine, and others with the consent of their owner.

The host is read as httpx2 reads it, so what is judged here is what is connected to. Nothing is
resolved: a name that points to this machine today may point elsewhere tomorrow. That holds for the
names below `localhost` too, which some resolvers ask the network for: `transport` connects them to
a loopback address itself.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import httpx2

from scumble.attacker.errors import AttackError, NoConsent
from scumble.client import wire

LONGEST = 4096  # characters of a token
TOKEN = re.compile(rb"([!-~](?:[ -~]*[!-~])?)\r?\n?")
NAME = re.compile(r"(?:[a-z0-9_-]+\.)*localhost")
ADDRESSES = ("127.0.0.1", "::1")  # of those names, in the order in which they are tried


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
        why = "" if "@" in url else f": {exc}"  # it may quote a part of a password
        raise AttackError(f"the URL is {wire.typed(url)}{why}") from None
    if parsed.userinfo:  # would be sent in the token's place, and looks like a host
        raise AttackError(f"the URL of {parsed.host!r} has a user's name; allowed: none")
    if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) > 65535:
        raise AttackError(
            f"the URL is {wire.typed(url)}; allowed: http://HOST[:PORT] or https://HOST[:PORT]"
        )
    return _own(parsed.raw_host.decode("ascii"))


class LoopbackTransport(httpx2.BaseTransport):
    """Carries requests to this machine only: what is connected to is a loopback address.

    Args:
        inner: carries what is addressed to one.
    """

    def __init__(self, inner: httpx2.BaseTransport | None = None) -> None:
        self._inner = inner or httpx2.HTTPTransport()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request; its `Host` header and the name in its certificate stay as they are.

        Raises:
            ConnectError: another machine is asked for, as by a redirect, or nobody listens here.
        """
        host = request.url.raw_host.decode("ascii")
        if not _own(host):
            raise httpx2.ConnectError(f"{host} is not this machine", request=request)
        if not NAME.fullmatch(host):
            return self._inner.handle_request(request)
        for address in ADDRESSES[:-1]:
            try:
                return self._inner.handle_request(_addressed(request, address))
            except httpx2.ConnectError:  # before any of the body was read
                continue
        return self._inner.handle_request(_addressed(request, ADDRESSES[-1]))

    def close(self) -> None:
        """Close the connections."""
        self._inner.close()


def transport(url: str) -> httpx2.BaseTransport | None:
    """A transport that cannot leave this machine if `url` is on it; None for other hosts.

    Raises:
        AttackError: `url` is not one.
    """
    # A client with a custom transport uses no proxy, whose localhost is another machine.
    return LoopbackTransport() if loopback(url) else None


def _addressed(request: httpx2.Request, address: str) -> httpx2.Request:
    return httpx2.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions={**request.extensions, "sni_hostname": request.url.host},
    )


def _own(host: str) -> bool:
    """Whether a host is this machine by its name or address alone."""
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
