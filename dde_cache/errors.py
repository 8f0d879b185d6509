"""The errors that callers catch. Each message says what was expected, what came, and what to do."""

from collections.abc import Sequence


class DdeCacheError(Exception):
    """Something the user can put right; the command line prints it without a traceback and exits with 1."""


class InputError(DdeCacheError):
    """Pictures, texts, shards or options that cannot be used as they are."""


class TeacherError(DdeCacheError):
    """A checkpoint that is missing, unreadable, or no fusion encoder that we can read attention from."""


class CacheError(DdeCacheError):
    """A cache that is damaged, incomplete, or made from something else than what it is used with."""


class PixelDrift(CacheError):
    """A view is drawn with other pixels here than the teacher saw."""


class PixelDriftWarning(UserWarning):
    """The same, where it was allowed."""


class RunError(DdeCacheError):
    """A training run that cannot start, resume or be evaluated."""


def bullet_list(lines: Sequence[str], shown: int = 5) -> str:
    """Format the first `shown` lines as an indented list and count the rest."""
    text = "".join(f"\n  - {line}" for line in lines[:shown])
    return text + (f"\n  (+{len(lines) - shown} more)" if len(lines) > shown else "")


def first_line(error: BaseException) -> str:
    """The first line of what an error of a library says that has words, or the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
