"""What can go wrong while attacking.

AttackError             a person can act on it
├─ BudgetExhausted      more images asked for than the budget has left; nothing was sent
├─ OracleUnavailable    no answer, to the last attempt
├─ OracleRefused        the service said no, and will again
└─ ResumeMismatch       the journal is of another run
"""

from __future__ import annotations


class AttackError(Exception):
    """What was wrong, with which value, and what is allowed."""


class BudgetExhausted(AttackError):
    """More images were asked for than the budget has left; nothing was sent."""


class OracleUnavailable(AttackError):
    """The service gave no answer, to the last attempt."""


class OracleRefused(AttackError):
    """The service refused in a way that trying again does not change."""


class ResumeMismatch(AttackError):
    """The journal holds the answers to other questions than this run asks."""
