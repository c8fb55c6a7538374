"""No foreign name, no foreign page; the same answers on every route of the console."""

import pytest
from starlette.datastructures import Headers

from app.admin.console.guard import check
from app.errors import Forbidden

HOSTS = frozenset({"console.example"})
OURS = {"host": "127.0.0.1:9000", "x-scumble-console": "1"}

GOOD_HOSTS = [
    "127.0.0.1:9000",
    "10.1.2.3",
    "[::1]:9000",
    "localhost",
    "LocalHost:9000",
    "console.example:443",
]
BAD_HOSTS = [
    "evil.example",
    "evil.example:9000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "localhost@evil.example",
    "[::1",
    "",
]


@pytest.mark.parametrize("host", GOOD_HOSTS)
def test_addresses_localhost_and_named_hosts_may_ask(host):
    check("GET", Headers({"host": host}), HOSTS)


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_a_name_that_somebody_else_can_point_here_may_not(host):
    with pytest.raises(Forbidden, match="SCUMBLE_ADMIN_HOSTS"):
        check("GET", Headers({"host": host}), HOSTS)


def test_a_request_without_host_is_refused():
    with pytest.raises(Forbidden):
        check("GET", Headers({}), HOSTS)


@pytest.mark.parametrize("origin", [None, "http://127.0.0.1:9000"])
def test_our_page_and_programs_may_post(origin):
    headers = OURS if origin is None else {**OURS, "origin": origin}
    check("POST", Headers(headers), HOSTS)


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "http://127.0.0.1:8000", "http://127.0.0.1", "null", "http://[", ""],
)
def test_pages_of_other_origins_may_not_post(origin):
    with pytest.raises(Forbidden, match="Origin"):
        check("POST", Headers({**OURS, "origin": origin}), HOSTS)


def test_a_post_needs_the_header_that_forms_cannot_send():
    with pytest.raises(Forbidden, match="x-scumble-console"):
        check("POST", Headers({"host": "127.0.0.1:9000", "origin": "http://127.0.0.1:9000"}), HOSTS)
