"""Recipe: run the teacher once over shards and write its targets, one unit a shard."""

import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from dde_cache.batches import Batch, batch_loader, torch_device
from dde_cache.buckets import UnitWork
from dde_cache.card import close_with_card
from dde_cache.encoder import Records, TargetEncoder
from dde_cache.errors import CacheError, InputError, bullet_list
from dde_cache.identity import DTYPES, ExtractConfig, provenance_of, save_assets, target_spec
from dde_cache.interrupt import FinishStep
from dde_cache.partners import check_partners
from dde_cache.plan import SAMPLE, ExtractPlan, Prediction, check_room, free_bytes, generous_bytes, predict
from dde_cache.records import assemble, extraction_dataset, unit_attributes
from dde_cache.samples import Shard
from dde_cache.spec import Model, Provenance, TargetSpec, UnitAttributes, UnitEntry
from dde_cache.store import UNITS, CacheWriter, manifest_to_continue
from dde_cache.stream import PairTable
from dde_cache.teacher import FusionTeacher
from dde_cache.unit import SUFFIX, Unit, UnitArrays, write_unit


@dataclass
class ExtractProgress:
    """What callers may want to show while an extraction runs. Pairs count once for each view and pass but in finished
    units."""

    start: Callable[[int, int, str], None] = lambda pairs, finished, grid: None
    batch: Callable[[int, float], None] = lambda pairs, kept_mass: None
    unit: Callable[[UnitEntry], None] = lambda entry: None


class ExtractSummary(Model):
    """What an extraction did."""

    pairs: int = Field(description="extracted now")
    views: int = Field(description="of each pair")
    passes: int = Field(default=1, description="of each view: forward passes of the teacher")
    skipped_pairs: int = Field(description="in units that were finished before")
    units: int
    seconds: float
    kept_mass: float | None = Field(description="mean over rows of both directions, of the pairs extracted now")
    bytes: int = Field(description="of all units")
    bytes_a_pair: float
    dense_ratio: float | None = Field(description="dense float16 maps of the valid tokens / bytes of these units")
    cut_texts: int = Field(description="texts longer than the text length, which teacher and student see cut")
    cropped_pictures: int = Field(
        default=0, description="pictures of which the teacher's processor cuts a margin off, which nobody sees then"
    )


def extract(
    shards: Sequence[Shard],
    teacher_name: str,
    out: Path,
    config: ExtractConfig,
    progress: ExtractProgress | None = None,
    *,
    check_disk: bool = True,
) -> ExtractSummary:
    """Extract the targets of every shard that has no finished unit yet.

    Args:
        shards: samples.
        teacher_name: folder, hub id, or `sample`.
        out: the cache; new, empty, or begun with the same arguments.
        config: what to keep.
        progress: hooks to show what happens.
        check_disk: refuse to begin what the disk cannot hold.

    Raises:
        InputError: shards that cannot be used, options that do not fit the teacher, texts for which no picture is a
            negative, or no room for the targets.
        TeacherError: the teacher cannot be used.
        CacheError: `out` holds other targets.
    """
    progress = progress or ExtractProgress()
    begin = time.perf_counter()
    ready = _prepare(shards, teacher_name, config)
    with tempfile.TemporaryDirectory() as folder:
        save_assets(ready.teacher, Path(folder))
        writer = CacheWriter(out, ready.spec, Path(folder))
    todo, done = [], []
    for shard in shards:
        entry = writer.finished(_unit_name(shard))
        if entry is None:
            todo.append(shard)
        else:
            _check_finished(writer.unit_path(entry.name), shard)
            done.append(entry)
    if "negative" in config.passes:
        check_partners(todo)
    table = PairTable.of(todo, config.views, len(config.passes))
    run = _Run(ready, config, writer, progress)
    skipped = sum(entry.pairs for entry in done)
    provenance = provenance_of(teacher_name, shards, config)
    if todo:
        if check_disk:
            _check_disk(ready, todo, table, config, out)
        progress.start(len(table), skipped, ready.picture)
        done += run.units(todo, table, provenance)
    close_with_card(writer, provenance)
    size, pairs = sum(entry.size for entry in done), sum(entry.pairs for entry in done)
    kept = run.encoder.kept
    return ExtractSummary(
        pairs=kept.pairs // config.shown,
        views=config.views,
        passes=len(config.passes),
        skipped_pairs=skipped,
        units=len(done),
        seconds=time.perf_counter() - begin,
        kept_mass=kept.mean,
        bytes=size,
        bytes_a_pair=size / max(pairs, 1),
        dense_ratio=kept.dense_bytes / kept.bytes if kept.bytes else None,
        cut_texts=run.cut_texts,
        cropped_pictures=run.cropped_pictures,
    )


def plan_extraction(
    shards: Sequence[Shard], teacher_name: str, out: Path, config: ExtractConfig, sample: int = SAMPLE
) -> ExtractPlan:
    """Encode a random sample of the pairs that are still to extract and predict size and time. Nothing is written.

    Args:
        shards, teacher_name, out, config: as for `extract`.
        sample: pairs to encode, about.

    Raises:
        InputError, TeacherError, CacheError: as `extract` does before its first batch.
    """
    begin = time.perf_counter()
    ready = _prepare(shards, teacher_name, config)
    found = manifest_to_continue(out, ready.spec)
    entries = (
        {} if found is None else {entry.name: entry for entry in found.units if (out / UNITS / entry.name).exists()}
    )
    todo = [shard for shard in shards if _unit_name(shard) not in entries]
    done = [entries[_unit_name(shard)] for shard in shards if _unit_name(shard) in entries]
    if "negative" in config.passes:
        check_partners(todo)
    table = PairTable.of(todo, config.views, len(config.passes))
    setup = time.perf_counter() - begin
    nothing = Prediction(0, setup, 0)
    predicted = predict(todo, table, ready.teacher, ready.spec, config, sample=sample, setup=setup) if todo else nothing
    free = free_bytes(out)
    return ExtractPlan(
        units=len(todo),
        pairs=len(table) // config.shown,
        views=config.views,
        passes=len(config.passes),
        finished_pairs=sum(entry.pairs for entry in done),
        sampled_pairs=predicted.pairs // config.shown,
        bytes=predicted.bytes,
        bytes_a_pair=predicted.bytes * config.shown / max(len(table), 1),
        seconds=predicted.seconds,
        pairs_a_second=len(table) / config.shown / predicted.seconds,
        free_bytes=free,
        fits=predicted.fits(free),
    )


@dataclass(frozen=True)
class _Ready:
    """What an extraction needs before its first batch."""

    teacher: FusionTeacher
    spec: TargetSpec
    picture: str
    image_tokens: int


def _prepare(shards: Sequence[Shard], teacher_name: str, config: ExtractConfig) -> _Ready:
    """Load the teacher and see that shards and options suit it.

    Raises:
        InputError, TeacherError: they do not.
    """
    torch_device(config.device)
    teacher = FusionTeacher.load(teacher_name, DTYPES[config.dtype], config.device)
    spec = target_spec(teacher, config)
    names = [_unit_name(shard) for shard in shards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"expected shards with different file names, got twice:{bullet_list(twice)}")
    picture, image_tokens = _check_first(shards[0], teacher, config)
    return _Ready(teacher, spec, picture, image_tokens)


def _unit_name(shard: Shard) -> str:
    return shard.path.stem + SUFFIX


def _check_disk(ready: _Ready, todo: Sequence[Shard], table: PairTable, config: ExtractConfig, out: Path) -> None:
    """Refuse what the disk cannot hold. A sample is only encoded where a generous estimate does not fit.

    Raises:
        InputError: it does not fit.
    """
    free = free_bytes(out)
    if generous_bytes(ready.spec, ready.image_tokens, len(table), len(todo)) > free:
        check_room(predict(todo, table, ready.teacher, ready.spec, config), out, free)


class _Run:
    """The loop over units; batches never cross a unit, so that they are a pure function of it."""

    def __init__(self, ready: _Ready, config: ExtractConfig, writer: CacheWriter, progress: ExtractProgress) -> None:
        self._preprocessor, self._spec, self._config = ready.teacher.preprocessor, ready.spec, config
        self._writer, self._progress = writer, progress
        self.encoder = TargetEncoder(ready.teacher, ready.spec, config.device)
        self.cut_texts = self.cropped_pictures = 0

    def units(self, shards: Sequence[Shard], table: PairTable, provenance: Provenance) -> list[UnitEntry]:
        """Extract and write the units of some shards."""
        dataset = extraction_dataset(shards, table, self._preprocessor, self._spec)
        ahead: deque[UnitWork] = deque()
        batches = iter(batch_loader(dataset, self._order(shards, table, ahead), self._config.workers))
        entries = []
        for number, shard in enumerate(shards):
            records = self._read(batches, len(table.numbers(number)))
            work = ahead.popleft()
            self.cut_texts += work.cut_texts
            self.cropped_pictures += work.cropped_pictures
            shown = [work.place[row] for batch in work.batches for row in batch]
            arrays = assemble(records, work.samples, shown, self._spec, work.partners)
            own = provenance.model_copy(update={"shards": shard.path.parent.name})
            attributes = unit_attributes(arrays, self._spec, shard.name, own, self._writer.assets)
            entry = self._write(_unit_name(shard), arrays, attributes)
            self._writer.add(entry)
            self.encoder.kept.bytes += entry.size
            self._progress.unit(entry)
            entries.append(entry)
        return entries

    def _order(self, shards: Sequence[Shard], table: PairTable, ahead: deque[UnitWork]) -> Iterator[list[int]]:
        """Batches of pair numbers, each shard looked at when it comes; its work is left in `ahead`."""
        for number, shard in enumerate(shards):
            work = UnitWork.of(shard, self._preprocessor, self._spec, self._config.batch_size)
            ahead.append(work)
            first = table.numbers(number).start
            yield from ([first + row for row in batch] for batch in work.batches)

    def _write(self, name: str, arrays: UnitArrays, attributes: UnitAttributes) -> UnitEntry:
        """Write a unit, unless another extraction into this folder was first with it: then that one counts."""
        try:
            size, digest = write_unit(self._writer.unit_path(name), arrays, attributes, replace=False)
        except FileExistsError:
            return self._writer.described(name)
        return attributes.entry(name, size, digest)

    def _read(self, batches: Iterator[Batch], rows: int) -> list[Records]:
        """Run the teacher on the batches of one unit.

        Raises:
            KeyboardInterrupt: after Ctrl-C, between two batches.
        """
        records = []
        with FinishStep() as interrupt:
            while rows:
                records.append(self.encoder(next(batches)))
                rows -= len(records[-1].text_tokens)
                self._progress.batch(len(records[-1].text_tokens), self.encoder.kept.mean or 0.0)
                interrupt.check()
        return records


def _check_first(shard: Shard, teacher: FusionTeacher, config: ExtractConfig) -> tuple[str, int]:
    """Look at the first sample before hours are spent; return its size and grid in words, and its image tokens.

    Raises:
        InputError: its picture or its number of images does not suit the teacher, or k is larger than both key axes.
    """
    sample = shard.read(shard.keys[0])
    image = sample.images[0].decode()
    try:
        pixels = teacher.preprocessor.pixels(image)
    except InputError as error:
        raise InputError(f"{shard.path}, sample {sample.key!r}: {error}") from error
    if len(sample.images) != teacher.images:
        raise InputError(
            f"{shard.path}, sample {sample.key!r}: expected {teacher.images} image(s) a sample for this teacher, got "
            f"{len(sample.images)}"
        )
    height, width = pixels.shape[1:]
    patch = teacher.preprocessor.patch_size
    tokens = (height // patch) * (width // patch) + 1
    longest = max(tokens, teacher.preprocessor.text_length)
    if config.k is not None and config.mass is None and config.k > longest:
        raise InputError(
            f"expected k up to {longest} (image tokens {tokens}, text tokens {teacher.preprocessor.text_length}), got "
            f"{config.k}; use --k all to keep everything"
        )
    resized = "" if (image.height, image.width) == (height, width) else f", resized to {width} x {height}"
    return f"{image.width} x {image.height} px{resized}: {height // patch} x {width // patch} patches", tokens


def _check_finished(path: Path, shard: Shard) -> None:
    """Refuse to skip a finished unit that was made from other samples: other keys, or another first sample.

    Training compares the content of every sample; comparing all of them here would mean to read all data again.

    Raises:
        CacheError: the shard has changed since.
    """
    unit = Unit(path)
    try:
        same = unit.keys == list(shard.keys)
        if same and unit.keys:
            same = unit.content[0].tobytes() == shard.read(unit.keys[0]).content_hash()
    finally:
        unit.close()
    if not same:
        raise CacheError(
            f"{path}: the finished unit was made from other samples than {shard.path} holds now; delete it, or choose "
            "another --out, and run extract again"
        )
