"""From batches of pairs through the teacher to encoded targets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dde_cache.attention import SparseAttention, sparsify
from dde_cache.batches import Batch, pictures_of, to_device, tokens_of
from dde_cache.codec import EncodedAttention, encode, encode_dense
from dde_cache.errors import InputError, TeacherError
from dde_cache.spec import Rows, TargetSpec
from dde_cache.states import encode_int8, mean_of_valid
from dde_cache.teacher import FusionTeacher, HiddenStates
from dde_cache.vilt import image_tokens, token_mask


@dataclass(frozen=True)
class Records:
    """One batch on its way to the disk; the lists run over (image slot, layer)."""

    token_ids: Tensor
    text_tokens: Tensor
    grids: list[Tensor]
    rows: Mapping[Rows, list[EncodedAttention]]
    logits: Tensor | None
    pixel_hashes: Tensor | None = None
    states: Sequence[Mapping[str, Tensor]] = ()


@dataclass
class Kept:
    """Running sums over what was encoded."""

    pairs: int = 0
    mass: float = 0.0
    rows: int = 0
    dense_bytes: int = 0
    bytes: int = 0

    @property
    def mean(self) -> float | None:
        """Mean kept mass of a row."""
        return self.mass / self.rows if self.rows else None


class TargetEncoder:
    """From batches of pairs to encoded targets, through the teacher.

    Args:
        teacher: already on `device`.
        spec: what to keep.
        device: where the teacher is.
    """

    def __init__(self, teacher: FusionTeacher, spec: TargetSpec, device: str) -> None:
        self._teacher, self._spec, self._device = teacher, spec, torch.device(device)
        self.kept = Kept()

    def __call__(self, batch: Batch) -> Records:
        """Run the teacher on one batch and encode its maps.

        Raises:
            InputError: there is not enough memory for a batch of this size.
            TeacherError: the teacher gave NaN or infinity.
        """
        try:
            return self._encode(batch)
        except (RuntimeError, MemoryError) as error:
            # CUDA has a class for it, the CPU's allocator has not.
            if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(
                error
            ):
                raise
            raise InputError(
                f"not enough memory on {self._device} for a batch of {len(batch['pair'])} pairs; pass a smaller "
                "--batch-size (it is never changed by itself: the targets of a pair depend on it, in their last bits)"
            ) from error

    def _encode(self, batch: Batch) -> Records:
        spec = self._spec
        moved = to_device(batch, self._device)
        pictures = pictures_of(moved)
        output = self._teacher(
            tokens_of(moved),
            pictures,
            spec.layers,
            padded_queries=spec.queries == "all",
            whole=spec.has_whole,
            hidden=bool(spec.states),
            logits=spec.classes is not None,
        )
        if output.logits is not None:
            self._check_finite(output.logits)
        text_tokens = batch["attention_mask"].sum(-1)
        encoded: dict[Rows, list[EncodedAttention]] = {name: [] for name in spec.rows}
        states: list[Mapping[str, Tensor]] = []
        for slot, picture in enumerate(pictures):
            words, patches = text_tokens.to(self._device), image_tokens(picture.grid).to(self._device)
            keys = {"t2i": patches, "i2t": words}
            for layer in spec.layers:
                for name in spec.rows:
                    of_text = name in ("t2i", "t2w")
                    filled = words if of_text else patches
                    every = keys.get(name, words + patches)
                    encoded[name].append(
                        self._encode_maps(output.rows(name, slot, layer), filled, every, of_text=of_text)
                    )
                    self.kept.dense_bytes += 2 * spec.stored_heads * int((filled * every).sum())
                if output.hidden:
                    states.append(self._narrow(output.hidden[slot, layer], words, patches))
                    self.kept.dense_bytes += 2 * (spec.hidden_width or 0) * int((words + patches).sum())
                    self.kept.dense_bytes += 2 * (spec.pooled_width or 0) * 2 * len(words)
        self.kept.pairs += len(text_tokens)
        return Records(
            token_ids=batch["input_ids"] * batch["attention_mask"],
            text_tokens=text_tokens,
            grids=[picture.grid for picture in pictures],
            rows=encoded,
            logits=None if output.logits is None else output.logits.cpu(),
            pixel_hashes=batch.get("pixel_hashes"),
            states=states,
        )

    def _narrow(self, states: HiddenStates, words: Tensor, patches: Tensor) -> Mapping[str, Tensor]:
        """Vectors of one block as they are stored, by the names of their arrays; 0 behind the valid tokens."""
        arrays: dict[str, Tensor] = {}
        for kind in self._spec.states:
            for side, part, count in (("text", states.text, words), ("image", states.image, patches)):
                mask, name = token_mask(count, part.shape[1]), f"{kind.group}/{side}"
                part = torch.where(mask[..., None], part, 0) if kind.per_token else mean_of_valid(part, mask)
                narrow = part.to(torch.float16) if kind.codec == "float16" else part
                if not bool(narrow.isfinite().all()):
                    raise TeacherError(
                        f"expected {kind.group} states from the teacher that fit {kind.codec}, got larger or not "
                        f"finite ones; look at its weights, or leave {kind.group} out of --targets"
                    )
                arrays[name] = narrow.cpu()
                if kind.codec == "int8":
                    code, scale = encode_int8(part)
                    arrays |= {name: code.cpu(), f"{name}_scale": scale.cpu()}
        return arrays

    def _check_finite(self, numbers: Tensor) -> None:
        """Refuse what no reader would take.

        Raises:
            TeacherError: the teacher gave NaN or infinity.
        """
        if not bool(numbers.isfinite().all()):
            raise TeacherError(
                f"expected finite logits and attention from the teacher, got others in {self._spec.dtype}; try --dtype "
                "float32 or bfloat16, or look at its weights"
            )

    def _encode_maps(self, maps: Tensor, rows: Tensor, keys: Tensor, *, of_text: bool) -> EncodedAttention:
        """Encode the maps of one layer; rows that are not stored become empty."""
        spec = self._spec
        if spec.heads == "mean":
            maps = maps.mean(1, keepdim=True)
        valid = token_mask(rows, maps.shape[2])
        if spec.queries == "all":
            # Text is padded to the text length, every row counts; of the padded image rows one is kept.
            stored = torch.ones_like(valid) if of_text else token_mask(rows + 1, maps.shape[2])
        else:
            stored = valid
        self.kept.rows += int(valid.sum()) * maps.shape[1]
        if spec.steps is not None:
            self._check_finite(maps.sum(-1))
            self.kept.mass += int(valid.sum()) * maps.shape[1]
            return encode_dense(maps, stored, token_mask(keys, maps.shape[3]), spec.steps)
        sparse = sparsify(maps, None if spec.k is None else min(spec.k, maps.shape[-1]), spec.mass)
        self._check_finite(sparse.tail)
        self.kept.mass += float(((1 - sparse.tail) * valid[:, None]).sum())
        stored = stored[:, None, :]
        blanked = SparseAttention(
            torch.where(stored[..., None], sparse.index, 0),
            torch.where(stored[..., None], sparse.weight, 0.0),
            torch.where(stored, sparse.tail, 0.0),
        )
        return encode(blanked, spec.weights, maps.shape[-1])
