"""The accounts that an attack asks under, by turns, until the budget of each is spent.

A service may charge a request when it comes and give back a part of the charge with the answer. So
a refusal is believed only where no other request of the account was on its way.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Accounts:
    """API keys and who uses them; all methods may be called from several threads.

    Args:
        keys: of the accounts; none for a service that asks for none.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = tuple(keys) or ("",)
        self._spent: set[str] = set()
        self._users: Counter[str] = Counter()
        self._alone: set[str] = set()
        self._changed = threading.Condition()

    def turn(self, number: int) -> str:
        """The key of a request; empty for a service without keys."""
        with self._changed:
            left = [key for key in self._keys if key not in self._spent] or self._keys
        return left[number % len(left)]

    @contextmanager
    def using(self, key: str, *, alone: bool) -> Iterator[None]:
        """Wait until nobody uses the key alone, or with `alone`, until nobody uses it."""
        with self._changed:
            self._changed.wait_for(
                lambda: key not in self._alone and not (alone and self._users[key])
            )
            self._users[key] += 1
            if alone:
                self._alone.add(key)
        try:
            yield
        finally:
            with self._changed:
                self._users[key] -= 1
                if alone:
                    self._alone.remove(key)
                self._changed.notify_all()

    def spend(self, key: str) -> bool:
        """Leave the key out from now on; whether it was the last one."""
        with self._changed:
            self._spent.add(key)
            return self._spent.issuperset(self._keys)
