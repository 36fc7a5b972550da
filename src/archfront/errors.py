"""Every error that archfront raises on purpose. A leaf: imported by all layers, imports none of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ArchfrontError(Exception):
    """Base of all errors whose message is meant for the user as it stands."""

    exit_code = 2


class InputError(ArchfrontError):
    """A value that the user gave is wrong. The message names field, value and remedy.

    Args:
        field: dotted path of the field, e.g. ``strategy.population``.
        value: what was given.
        problem: why it cannot be used.
        remedy: what would be right.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {value!r} {problem}. {remedy}")
        self.field = field
        self.value = value
        self.problem = problem
        self.remedy = remedy


class InputErrors(InputError):
    """Several input errors found in one pass, reported together."""

    def __init__(self, errors: list[InputError]) -> None:
        first = errors[0]
        super().__init__(first.field, first.value, first.problem, first.remedy)
        self.errors = errors
        self.args = ("\n".join(str(error) for error in errors),)


class LedgerError(ArchfrontError):
    """The database cannot be used: corrupt, read-only, of a newer schema, on a network file system."""


class JobBusyError(ArchfrontError):
    """Another driver holds the lease of this job."""


class LeaseLostError(ArchfrontError):
    """This driver lost its lease to another one; it must not write any more."""

    exit_code = 3


class ChangedCodeError(ArchfrontError):
    """The job was started under other code, packages or plug-ins, and nobody agreed to go on."""


class JobFailedError(ArchfrontError):
    """The job cannot go on: its set-up failed, or every evaluation did."""

    exit_code = 3


class WorkersUnreachableError(ArchfrontError):
    """No worker could be had for too long; nothing is wrong with the job, which is resumable."""

    exit_code = 3


class StoppedError(ArchfrontError):
    """A driver was told to stop, or its job was cancelled, while it waited for workers."""

    exit_code = 130


class MissingExtraError(ArchfrontError):
    """A feature needs a package that is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs a package that is not installed: pip install 'archfront[{extra}]'")


def suggestion(given: str, known: Iterable[str]) -> str:
    """One sentence that helps after an unknown name: the nearest known one, and all that are known."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    meant = f"Did you mean {near[0]!r}? " if near else ""
    return f"{meant}Known: {', '.join(names)}." if names else f"{meant}None is known."
