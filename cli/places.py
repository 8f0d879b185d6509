"""Where a cache is: a folder or a URL, and what is kept of it on this machine."""

from pathlib import Path

import typer
from rich.markup import escape

from dde_cache.remote import is_url
from dde_cache.store import Cache
from dde_cache.streamed import DEFAULT_LIMIT, default_cache_dir, open_cache, parse_size

from .console import note

CACHE_DIR = typer.Option(
    None, help="For a cache behind a URL: where fetched units are kept. Default DDE_CACHE_DIR, or ~/.cache/dde-cache."
)
CACHE_LIMIT = typer.Option(None, help="Size of what is kept there, for example 50GB. Default 20GB.")


def opened(place: str, cache_dir: Path | None, cache_limit: str | None) -> Cache:
    """Open a cache, and say where its units go if they are fetched."""
    limit = DEFAULT_LIMIT if cache_limit is None else parse_size(cache_limit)
    folder = cache_dir or default_cache_dir()
    cache = open_cache(place, folder, limit)
    if is_url(place):
        size = sum(entry.size for entry in cache.manifest.units)
        text = f"{size / 1e6:,.1f} MB at {place}; at most {limit / 1e6:,.0f} MB of it are kept in {folder}"
        note(escape(text))
    return cache
