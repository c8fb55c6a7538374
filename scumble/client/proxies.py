"""Which servers are asked through the proxies that the environment names: none on this machine."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2


def is_loopback(url: httpx2.URL) -> bool:
    """Whether a URL names this machine; a proxy would take it for itself."""
    host = url.host.lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


@contextmanager
def explained() -> Iterator[None]:
    """Says what is missing where the environment names a SOCKS proxy.

    Raises:
        ValueError: httpx2 lacks its extra for them.
    """
    try:
        yield
    except ImportError as exc:
        raise ValueError(
            "proxy of the environment (ALL_PROXY, HTTP_PROXY or HTTPS_PROXY) speaks SOCKS, which "
            "needs: pip install 'httpx2[socks]'"
        ) from exc
