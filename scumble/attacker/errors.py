"""Errors of attacks.

AttackError             base class; the message says what is allowed
├─ BadTemplate          the template file is invalid
├─ BudgetExhausted      more images asked for than the budget has left; nothing was sent
├─ NoConsent            the target is another machine, and its owner's consent is missing
├─ OracleUnavailable    no answer, to the last attempt
│  └─ ServiceSpent      a budget of the service is spent
├─ OracleRefused        the service refused in a way that a retry does not change
├─ ResumeMismatch       the journal is of another run
└─ BadResult            a file is not a result of an attack
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


class ServiceSpent(OracleUnavailable):
    """The service gives no account more answers."""


class OracleRefused(AttackError):
    """The service refused in a way that trying again does not change."""


class BadResult(AttackError):
    """A file is not a result of an attack."""


class ResumeMismatch(AttackError):
    """The journal holds the answers to other questions than this run asks."""
