"""A trained student at work: each side encoded once, answers and similarities from the stored vectors.

    student = Student.from_pretrained("runs/first")
    images = student.encode_images(["a.png", "b.png"])
    texts = student.encode_texts(["is there a circle", "is there a red shape"])
    student.answer(texts, images)

Vectors are what the towers' poolers give, float32, not normalised: the shallow interaction reads them so. Whoever
compares them takes cosines.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from dde_cache.batches import torch_device
from dde_cache.canonical import PLACE
from dde_cache.errors import InputError, RunError, bullet_list
from dde_cache.images import EncodedImage, to_rgb
from dde_cache.initial import load_student
from dde_cache.preprocess import Preprocessor
from dde_cache.spec import hash_json
from dde_cache.student import DualEncoder
from dde_cache.teacher import hash_weights

Picture = str | Path | EncodedImage | Image.Image
"""A file's path, encoded bytes, or an opened picture."""


@dataclass(frozen=True)
class Answer:
    """The most probable answer, its probability, and the answers in falling order with their probabilities."""

    answer: str
    probability: float
    probabilities: dict[str, float]


class Student:
    """A dual encoder with its processor, for use.

    Args:
        model: a trained student.
        preprocessor: its processor.
        name: for messages.
    """

    def __init__(self, model: DualEncoder, preprocessor: Preprocessor, name: str = "the student") -> None:
        self.model = model.eval().requires_grad_(False)
        self.preprocessor = preprocessor
        self.name = name

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu") -> "Student":
        """Load the student of a run of `dde-cache train`: the run's folder, or its `model` folder alone.

        Raises:
            RunError: no student is there, or its weights or processor are missing or damaged.
            InputError: there is no such device.
        """
        torch_device(device)
        model, preprocessor = load_student(folder)
        return cls(model.to(device), preprocessor, str(folder))

    @property
    def device(self) -> torch.device:
        """Where the towers run; what they give is on the CPU."""
        return next(self.model.parameters()).device

    @cached_property
    def width(self) -> int:
        """Numbers in a vector."""
        return self.model.width

    @property
    def images(self) -> int:
        """Pictures that an answer takes."""
        return int(self.model.config.images)

    @property
    def labels(self) -> tuple[str, ...]:
        """The answers in logit order; none where vectors are compared."""
        config = self.model.config
        return () if self.compares else tuple(str(config.id2label[number]) for number in range(config.num_labels))

    @property
    def compares(self) -> bool:
        """Whether it compares vectors (task `retrieval`, or pre-trained) rather than answers."""
        return bool(self.model.config.head != "classes")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what vectors and answers depend on: weights, configuration, tokenizer, image processor."""
        config = json.loads(json.dumps(self.model.config.to_dict(), default=str))
        processor = self.preprocessor.processor
        return hash_json(
            {
                "weights": hash_weights(self.model),
                "config": {name: value for name, value in config.items() if name not in PLACE},
                "tokenizer": self.preprocessor.tokenizer_json(),
                "processor": json.loads(processor.image_processor.to_json_string()),
            }
        )

    def pixels(self, picture: Picture) -> Float[np.ndarray, "c y x"]:
        """Decode and process one picture.

        Raises:
            InputError: it cannot be read, or its sides do not suit the patch.
        """
        if isinstance(picture, Image.Image):
            return self.preprocessor.pixels(to_rgb(picture))
        if isinstance(picture, (str, Path)):
            try:
                picture = EncodedImage(Path(picture).read_bytes(), Path(picture).suffix.lstrip(".").lower())
            except OSError as error:
                raise InputError(f"expected a picture, but it cannot be read: {error.strerror or error}") from error
        return self.preprocessor.pixels(picture.decode())

    @torch.inference_mode()
    def encode_pixels(self, pictures: Sequence[Float[np.ndarray, "c y x"]], slot: int = 0) -> Float[Tensor, "n w"]:
        """Encode processed pictures as one batch.

        Args:
            pictures: from `pixels`.
            slot: 0 for the first picture of an answer, 1 for the second.
        """
        if not pictures:
            return torch.empty(0, self.width)
        batch = self.preprocessor.stack(pictures)
        return self.model.image_tower(batch.pixels.to(self.device), batch.grid, slot).pooled.float().cpu()

    def encode_images(
        self, pictures: Sequence[Picture], *, slot: int = 0, batch_size: int = 32
    ) -> Float[Tensor, "n w"]:
        """Encode pictures.

        Args:
            pictures: paths, bytes or opened pictures.
            slot: 0 for the first picture of an answer, 1 for the second (students of two).
            batch_size: pictures a forward pass.

        Raises:
            InputError: some cannot be read, all of which are listed; or the student reads no second picture.
        """
        if slot not in range(self.images):
            raise InputError(f"expected a slot below {self.images} for this student, got {slot}")
        vectors: list[Tensor] = []
        problems: list[str] = []
        for start in range(0, len(pictures), batch_size):
            pixels = []
            for number, picture in enumerate(pictures[start : start + batch_size], start):
                try:
                    pixels.append(self.pixels(picture))
                except InputError as error:
                    name = str(picture) if isinstance(picture, (str, Path)) else f"picture {number}"
                    problems.append(f"{name}: {error}")
            # After the first bad one nothing will be given back; the others are read to name all of them.
            vectors += [] if problems else [self.encode_pixels(pixels, slot)]
        if problems:
            raise InputError(f"{len(problems)} pictures cannot be used:{bullet_list(problems, 20)}")
        return torch.cat([torch.empty(0, self.width), *vectors])

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], *, batch_size: int = 64) -> Float[Tensor, "n w"]:
        """Encode texts, those of like length together; each is cut to the student's text length.

        Args:
            texts: questions or captions.
            batch_size: texts a forward pass.
        """
        vectors = torch.empty(len(texts), self.width)
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            tokens = self.preprocessor.tokens([texts[number] for number in chosen])
            output = self.model.text_tower(tokens.ids.to(self.device), tokens.mask.to(self.device))
            vectors[chosen] = output.pooled.float().cpu()
        return vectors

    @torch.inference_mode()
    def logits(self, texts: Float[Tensor, "n w"], *images: Float[Tensor, "n w"]) -> Float[Tensor, "n c"]:
        """Logits of pairs of stored vectors: the shallow interaction and the head alone run.

        Args:
            texts: vectors of the texts; one stands for all pairs.
            images: for each image slot, vectors of the pictures; one stands for all pairs.

        Raises:
            RunError: this student has no answers, but compares vectors.
            InputError: another number of pictures than it reads, or of vectors of another shape.
        """
        if self.compares:
            raise RunError(f"{self.name}: trained for retrieval, it has no answers; use `similarity`, or search")
        if len(images) != self.images:
            raise InputError(f"expected {self.images} pictures an answer for this student, got {len(images)}")
        sides = (texts, *images)
        pairs = max((len(side) for side in sides if len(side) != 1), default=1)
        wrong = [tuple(side.shape) for side in sides if side.shape not in ((pairs, self.width), (1, self.width))]
        if wrong:
            raise InputError(f"expected vectors [{pairs}, {self.width}] or [1, {self.width}], got {list(wrong[0])}")
        spread = [side.to(self.device).expand(pairs, -1) for side in sides]
        return self.model.answer(*spread).float().cpu()

    def probabilities(self, texts: Float[Tensor, "n w"], *images: Float[Tensor, "n w"]) -> Float[Tensor, "n c"]:
        """The same as probabilities: of one right answer (softmax), or for `vqa` of each answer by itself (sigmoid).

        Raises:
            RunError, InputError: as `logits`.
        """
        logits = self.logits(texts, *images)
        return logits.sigmoid() if self.model.config.task == "vqa" else logits.softmax(-1)

    def answer(
        self, texts: Float[Tensor, "n w"], *images: Float[Tensor, "n w"], top: int | None = None
    ) -> list[Answer]:
        """Answer texts about pictures, pair by pair.

        Args:
            texts: vectors of the texts; one stands for all pairs.
            images: for each image slot, vectors of the pictures; one stands for all pairs.
            top: how many answers to give with their probabilities; None: all. Equal ones keep their order.

        Raises:
            RunError, InputError: as `logits`.
        """
        values, order = self.probabilities(texts, *images).sort(dim=-1, descending=True, stable=True)
        found = []
        for row, numbers in zip(values[:, :top].tolist(), order[:, :top].tolist(), strict=True):
            named = {self.labels[number]: value for number, value in zip(numbers, row, strict=True)}
            found.append(Answer(self.labels[numbers[0]], row[0], named))
        return found

    def similarity(self, texts: Float[Tensor, "n w"], images: Float[Tensor, "m w"]) -> Float[Tensor, "n m"]:
        """Cosines of every text with every picture.

        Raises:
            RunError: the student was not trained to compare vectors; it answers.
        """
        if not self.compares:
            raise RunError(
                f"{self.name}: trained for {self.model.config.task}, its vectors are not comparable by themselves; "
                "use `answer`, or train with --task retrieval"
            )
        sides = [nn.functional.normalize(side.float(), dim=-1) for side in (texts, images)]
        return sides[0] @ sides[1].T
