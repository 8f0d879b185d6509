"""What goes wrong between here and a server: which errors these are, and when to try again."""

import sys
import time

from dde_cache.errors import CacheError

TRIES = 5
"""How often in a row nothing may come before we give up."""

HUB_TRIES = 2
"""The same for the Hub, whose client has tried six times in half a minute before it says that anything failed."""

PAUSE = 0.5
"""Seconds before the second try; each later pause is twice as long."""


def troubles(*more: type[BaseException]) -> tuple[type[BaseException], ...]:
    """What file systems raise when a network, a server or a name fails; only what is imported can have been raised."""
    kinds: list[type[BaseException]] = [OSError, EOFError, *more]
    for module, name in (
        ("aiohttp", "ClientError"),
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
        ("httpx", "HTTPError"),
        ("httpx2", "HTTPError"),
    ):
        if module in sys.modules:
            kinds.append(getattr(sys.modules[module], name))
    return tuple(kinds)


def status(error: BaseException) -> int | None:
    """The HTTP status behind an error, or behind what it was raised from."""
    for some in (error, error.__cause__, error.__context__):
        response = getattr(some, "response", None)
        if isinstance(response, dict):  # botocore's
            response = response.get("ResponseMetadata", {})
            return response.get("HTTPStatusCode")
        for found in (getattr(some, "status", None), getattr(response, "status_code", None)):
            if isinstance(found, int):
                return found
    return None


def not_there(error: BaseException) -> bool:
    """Whether a server said that there is no such file: fsspec also says so when no server was reached."""
    if not isinstance(error, FileNotFoundError):
        return status(error) in (404, 410)
    cause = error.__cause__
    aiohttp = sys.modules.get("aiohttp")
    unreachable = aiohttp is not None and isinstance(cause, (aiohttp.ClientError, TimeoutError))
    return not unreachable or status(error) in (404, 410)


def pause(what: str, error: BaseException, failed: int) -> None:
    """Wait a little before another try, longer each time.

    Raises:
        CacheError: it was the last one, or another try would not help.
    """
    reason = _reason(error)
    if isinstance(error, PermissionError) or status(error) in (401, 403):
        raise CacheError(f"{what}: access was refused ({reason}); check your credentials for it") from error
    if not_there(error):
        raise CacheError(f"{what}: expected to reach it, but it is not there ({reason}); check the URL") from error
    hub = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "huggingface_hub")
    if failed >= (HUB_TRIES if hub else TRIES) or type(error).__name__ in (
        "OfflineModeIsEnabled",
        "NoCredentialsError",
    ):
        raise CacheError(
            f"{what}: cannot be reached ({reason}), {failed} tries; what came until then is kept: run the same command "
            "again to go on"
        ) from error
    time.sleep(PAUSE * 2 ** (failed - 1))


def _reason(error: BaseException) -> str:
    root = error.__cause__ if isinstance(error, (FileNotFoundError, RuntimeError)) and error.__cause__ else error
    first = (str(root).splitlines() or [""])[0]
    return f"{type(root).__name__}: {first}" if first else type(root).__name__
