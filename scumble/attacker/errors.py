"""What can go wrong while attacking.

AttackError             a person can act on it
├─ BadTemplate          the file that describes an API is not one
├─ BudgetExhausted      more images asked for than the budget has left; nothing was sent
├─ NoConsent            the target is not this machine, and its owner's word is missing
├─ OracleUnavailable    no answer, to the last attempt
├─ OracleRefused        the service said no, and will again
├─ ResumeMismatch       the journal is of another run
└─ BadResult            a file is no result of an attack
"""

from __future__ import annotations


class AttackError(Exception):
    """What was wrong, with which value, and what is allowed."""


class BadTemplate(AttackError):
    """The file does not describe an API: which field, which value, what is allowed."""


class BudgetExhausted(AttackError):
    """More images were asked for than the budget has left; nothing was sent."""


class NoConsent(AttackError):
    """The target is not this machine, and nothing says that its owner agreed."""


class OracleUnavailable(AttackError):
    """The service gave no answer, to the last attempt."""


class OracleRefused(AttackError):
    """The service refused in a way that trying again does not change."""


class BadResult(AttackError):
    """A file is no result of an attack."""


class ResumeMismatch(AttackError):
    """The journal holds the answers to other questions than this run asks."""
