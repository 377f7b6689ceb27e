"""Errors a user can cause. A bug of ours raises AssertionError, never one of these."""

from collections.abc import Iterable


class MegatronError(Exception):
    """Base of every error that the user, not the developer, can fix."""


class ConfigError(MegatronError, ValueError):
    """One or more options contradict each other or the machine."""

    problems: tuple[str, ...] = ()
    """One sentence each, where ``raise_if_any`` made the error."""

    @classmethod
    def raise_if_any(cls, problems: Iterable[str], advice: str | None = None) -> None:
        """Raise one error that lists every problem, so that a user fixes them in one go.

        Args:
            problems: One sentence each.
            advice: A line under the list, such as what would be legal.
        """
        found = list(problems)
        if found:
            lines = ["invalid configuration:", *(f"  - {p}" for p in found)]
            error = cls("\n".join(lines if advice is None else [*lines, advice]))
            error.problems = tuple(found)
            raise error


class DataError(MegatronError):
    """A file of text, tokens or samples is missing, damaged or of another kind."""


class CheckpointError(MegatronError):
    """A checkpoint is missing, incomplete or does not fit the model."""


class DivergedError(MegatronError):
    """Training has left the numbers: step after step is not finite."""


class BackendError(MegatronError):
    """An optional package was asked for and cannot be used."""
