"""Push to the Hugging Face Hub with its own client: units first, then everything else in one commit.

The Hub keeps large files by SHA-256, so a push that goes on sends only what it does not have, and a commit is seen
whole or not at all. (Reading goes through fsspec, as from everywhere else.)
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dde_cache.errors import CacheError, InputError
from dde_cache.network import not_there, pause, status, troubles
from dde_cache.remote import Advance, Remote
from dde_cache.spec import Manifest, UnitEntry
from dde_cache.store import MANIFEST, UNITS

Value = TypeVar("Value")


class HubTarget:
    """A data set repository. It is created private where there is none: its maker fills in the licences first.

    Args:
        url: `hf://datasets/OWNER/NAME`, and a folder in it if wanted.

    Raises:
        InputError: another URL, or huggingface_hub is not installed.
    """

    def __init__(self, url: str) -> None:
        found = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)/*", url)
        if not found:
            raise InputError(
                f"expected hf://datasets/OWNER/NAME, got {url}: caches are pushed to data set repositories"
            )
        self._remote = Remote(url)
        from huggingface_hub import HfApi

        self.url, self._repo, self._folder = self._remote.url, found[1], found[2].strip("/")
        self._api = HfApi()
        self._sent: list[Any] = []
        self._head: str | None = None
        self.created = False

    def _tried(self, action: Callable[[], Value]) -> Value:
        failed = 0
        while True:
            try:
                return action()
            except troubles(RuntimeError) as error:
                # The client wraps whatever stops an upload in a RuntimeError.
                failed += 1
                pause(self.url, error, failed)

    def _tree(self, folder: str) -> Sequence[Any]:
        path = "/".join(part for part in (self._folder, folder) if part)

        def listed() -> list[Any]:
            try:
                return list(self._api.list_repo_tree(self._repo, path or None, repo_type="dataset"))
            except troubles() as error:
                if not_there(error):
                    return []
                raise

        return self._tried(listed)

    def names(self) -> Sequence[str]:
        """What lies in the folder itself."""
        return [entry.path.rsplit("/", 1)[-1] for entry in self._tree("")]

    def read(self, name: str, limit: int) -> bytes | None:
        """A small file, or None where it is not there."""
        if name == MANIFEST:
            self._head = self._tried(self._newest)
        return self._remote.read(name, limit)

    def _newest(self) -> str | None:
        """The repository's newest commit; what we commit must follow it."""
        try:
            return self._api.repo_info(self._repo, repo_type="dataset").sha
        except troubles() as error:
            if not_there(error):
                return None
            raise

    def held(self, manifest: Manifest) -> set[str]:
        """Units that the repository has with the same SHA-256."""
        there = {
            entry.path.rsplit("/", 1)[-1]: entry.lfs.sha256
            for entry in self._tree(UNITS)
            if getattr(entry, "lfs", None) is not None
        }
        return {entry.name for entry in manifest.units if there.get(entry.name) == entry.sha256}

    def send(self, entry: UnitEntry, path: Path, advance: Advance) -> None:
        """Send a unit to the Hub's storage; it is in the repository once `finish` has committed it."""
        from huggingface_hub import CommitOperationAdd

        self._create()
        addition = CommitOperationAdd(self._inside(f"{UNITS}/{entry.name}"), str(path))
        self._tried(lambda: self._api.preupload_lfs_files(self._repo, [addition], repo_type="dataset"))
        if addition.upload_info.sha256.hex() != entry.sha256:
            raise CacheError(f"unit {entry.name}: changed while it was sent; nothing was committed; push again")
        self._sent.append(addition)
        advance(entry.size)

    def finish(self, files: Mapping[str, bytes]) -> bool:
        """Commit the units that were sent together with the small files; False where another commit came first."""
        from huggingface_hub import CommitOperationAdd

        self._create()
        small = [CommitOperationAdd(self._inside(name), content) for name, content in files.items()]

        def commit() -> bool:
            try:
                self._api.create_commit(
                    self._repo,
                    [*self._sent, *small],
                    commit_message=f"dde-cache push: {len(self._sent)} units",
                    repo_type="dataset",
                    parent_commit=self._head,
                )
            except troubles() as error:
                if status(error) in (409, 412):
                    return False
                raise
            return True

        return self._tried(commit)

    def _create(self) -> None:
        if not self.created:
            self._tried(lambda: self._api.create_repo(self._repo, repo_type="dataset", private=True, exist_ok=True))
        self.created = True

    def _inside(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name
