"""The one typed object that travels with a request, under any server."""

import pytest

from app.request_context import (
    ALWAYS_CONNECTED,
    KEY,
    ClientConnection,
    RequestContext,
    ensure_context,
    request_context,
)


@pytest.mark.parametrize("scope", [{}, {"state": {}}, {"state": {"parent": 1}}])
def test_a_request_of_another_server_gets_a_context_of_its_own(scope):
    shared = scope.get("state")
    before = dict(shared or {})
    first, second = dict(scope), dict(scope)
    context = ensure_context(first)
    assert context.client is ALWAYS_CONNECTED
    assert request_context(first) is context
    assert ensure_context(second) is not context
    assert first["state"] == before | {KEY: context}
    assert shared in (None, before), "a server may hand the same state to all its requests"


def test_the_context_that_our_server_made_is_kept():
    context = RequestContext(ClientConnection())
    scope = {"state": {KEY: context}}
    assert ensure_context(scope) is context
    assert scope == {"state": {KEY: context}}


def test_a_misspelt_field_is_an_error():
    with pytest.raises(AttributeError):
        RequestContext().refused = "budget"
