"""Pictures to encode: a folder of files, or the pictures of shards, read one by one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from dde_cache.errors import InputError, bullet_list
from dde_cache.images import IMAGE_FORMATS
from dde_cache.samples import INDEX_NAME, Shard, open_shards

MAX_KEY = 1000
"""Bytes of a picture's path below its folder."""


class Pictures(Protocol):
    """Pictures by number, each with its key and image slot."""

    name: str

    def __len__(self) -> int: ...

    def place(self, number: int) -> tuple[str, int]:
        """Key and image slot."""

    def read(self, number: int) -> bytes:
        """The picture's encoded bytes.

        Raises:
            InputError: they cannot be read.
        """


class FolderPictures:
    """The pictures below a folder in the order of their paths; keys are paths below it, with slashes.

    Args:
        folder: searched to any depth; files and folders whose names begin with a dot are passed over.
        slots: image slots of the student; a picture may stand in each, and has a row for each.

    Raises:
        InputError: there are none, or names cannot be keys; all of these are listed.
    """

    def __init__(self, folder: Path, slots: int = 1) -> None:
        self.name = folder.name
        self._folder, self._slots = folder, slots
        below = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower()[1:] in IMAGE_FORMATS)
        self._keys = sorted(path.as_posix() for path in below if not any(part.startswith(".") for part in path.parts))
        if not self._keys:
            raise InputError(f"{folder}: expected pictures ({', '.join(IMAGE_FORMATS)}) or shards, found none")
        wrong = [repr(key) for key in self._keys if not key.isprintable() or len(key.encode()) > MAX_KEY]
        if wrong:
            raise InputError(
                f"{folder}: expected printable paths of at most {MAX_KEY} bytes in UTF-8, got {len(wrong)} others; "
                f"rename them:{bullet_list(wrong, 20)}"
            )

    def __len__(self) -> int:
        return len(self._keys) * self._slots

    def place(self, number: int) -> tuple[str, int]:
        """Path below the folder, and image slot."""
        return self._keys[number // self._slots], number % self._slots

    def read(self, number: int) -> bytes:
        """Read a file.

        Raises:
            InputError: it cannot be read.
        """
        try:
            return (self._folder / self._keys[number // self._slots]).read_bytes()
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror or error}") from error


class ShardPictures:
    """The pictures of shards in their order; keys are those of the samples.

    Args:
        shards: opened.
        slots: image slots of the student, and pictures that each sample must have.
    """

    def __init__(self, shards: Sequence[Shard], slots: int = 1) -> None:
        self.name = shards[0].path.parent.name
        self._slots = slots
        self._samples = [(shard, key) for shard in shards for key in shard.keys]

    def __len__(self) -> int:
        return len(self._samples) * self._slots

    def place(self, number: int) -> tuple[str, int]:
        """Sample key, and image slot."""
        return self._samples[number // self._slots][1], number % self._slots

    def read(self, number: int) -> bytes:
        """Read a picture of a sample.

        Raises:
            InputError: the sample breaks the schema, or has another number of pictures.
        """
        shard, key = self._samples[number // self._slots]
        images = shard.read(key).images
        if len(images) != self._slots:
            raise InputError(f"{shard.path}: expected {self._slots} pictures a sample, got {len(images)}")
        return images[number % self._slots].content


def open_pictures(place: str, slots: int = 1) -> Pictures:
    """Open a folder of pictures, or shards (a folder with tars, one tar, or a brace pattern).

    Raises:
        InputError: neither is there, or a folder holds both.
    """
    folder = Path(place)
    tars = folder.is_dir() and ((folder / INDEX_NAME).is_file() or any(folder.glob("*.tar")))
    loose = folder.is_dir() and any(path.suffix.lower()[1:] in IMAGE_FORMATS for path in folder.iterdir())
    if tars and loose:
        raise InputError(
            f"{place}: expected a folder of pictures or one of shards, got one with both; move one of them"
        )
    if folder.is_file() and folder.suffix.lower()[1:] in IMAGE_FORMATS:
        raise InputError(f"{place}: expected a folder of pictures, or shards, got one picture; name its folder")
    if folder.is_dir() and not tars:
        return FolderPictures(folder, slots)
    return ShardPictures(open_shards(place), slots)
