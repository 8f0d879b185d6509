"""Push to an object store, or whatever else fsspec can write to."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from dde_cache.errors import CacheError, InputError
from dde_cache.remote import Advance, Remote
from dde_cache.spec import MAX_JSON, Manifest, Model, UnitEntry
from dde_cache.store import MANIFEST, UNITS

RECEIPTS = "receipts.json"


class Receipt(Model):
    """A unit that was sent whole: its SHA-256, and by what the server tells whether it is still the same object."""

    sha256: str
    checksum: str


class Receipts(Model):
    """`receipts.json` beside a pushed cache: what a push that goes on, or the next one, need not send again."""

    fingerprint: str
    units: dict[str, Receipt] = Field(default_factory=dict)


class ObjectTarget:
    """A folder behind an fsspec URL that can be written, such as S3.

    Raises:
        CacheError: an unfinished push of other targets is there.
    """

    def __init__(self, url: str) -> None:
        self._remote = Remote(url)
        self.url = self._remote.url
        if self._remote.scheme in ("http", "https"):
            raise InputError(f"{url}: expected a place that can be written (a path, s3:// or hf://), got a web address")
        self._receipts: Receipts | None = None
        self._tag: str | None = None

    def names(self) -> Sequence[str]:
        """What lies in the folder itself."""
        return self._remote.names()

    def read(self, name: str, limit: int) -> bytes | None:
        """A small file, or None where it is not there."""
        if name == MANIFEST:
            self._tag = self._remote.tag(name)
        return self._remote.read(name, limit)

    def held(self, manifest: Manifest) -> set[str]:
        """Units with a receipt for the same bytes, where the object has not changed since."""
        receipts = self._read_receipts(manifest)
        entries = {entry.name: entry for entry in manifest.units}
        there = set(self._remote.names(UNITS))
        return {
            name
            for name, receipt in receipts.units.items()
            if name in entries
            and name in there
            and receipt.sha256 == entries[name].sha256
            and receipt.checksum == self._remote.checksum(f"{UNITS}/{name}")
        }

    def _read_receipts(self, manifest: Manifest) -> Receipts:
        content = self.read(RECEIPTS, MAX_JSON)
        try:
            found = (
                Receipts(fingerprint=manifest.fingerprint) if content is None else Receipts.model_validate_json(content)
            )
        except ValidationError:
            # Nothing is known then, and every unit is sent again.
            found = Receipts(fingerprint=manifest.fingerprint)
        if found.fingerprint != manifest.fingerprint:
            raise CacheError(
                f"{self.url}: holds an unfinished push of other targets (fingerprint {found.fingerprint[:12]}..., here "
                f"{manifest.fingerprint[:12]}...); choose another place, or remove what is there"
            )
        self._receipts = found
        return found

    def send(self, entry: UnitEntry, path: Path, advance: Advance) -> None:
        """Send a unit, then write down that it is there."""
        name = f"{UNITS}/{entry.name}"
        self._remote.put(path, name, advance)
        checksum = self._remote.checksum(name)
        if checksum is None or self._receipts is None:
            raise CacheError(f"{self.url}/{name}: was sent, but is not there; run the same command again")
        self._receipts.units[entry.name] = Receipt(sha256=entry.sha256, checksum=checksum)
        self._remote.write(RECEIPTS, self._receipts.model_dump_json().encode())

    def finish(self, files: Mapping[str, bytes]) -> bool:
        """Send small files, the manifest last; False where it is another than we read last."""
        for name, content in files.items():
            if name != MANIFEST:
                self._remote.write(name, content)
        return self._remote.replace(MANIFEST, files[MANIFEST], self._tag)
