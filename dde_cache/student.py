"""The student as a Hugging Face model: two towers and a shallow head (DiDE, arXiv 2112.08723).

The towers are twins of ViLT's shape, as in the paper, or on one side or both any encoder of Hugging Face.
Each side is encoded alone, so that it can be computed once and stored; only the small head sees both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, ViltConfig, ViltModel
from transformers import initialization as init
from transformers.models.vilt.modeling_vilt import TextEmbeddings
from transformers.utils import ModelOutput

from dde_cache.checkpoint import load_weights, read_config, resolve
from dde_cache.errors import InputError
from dde_cache.towers.contract import Tower
from dde_cache.towers.hugging_face import HuggingFaceImageTower, HuggingFaceTextTower, ImageShape, TextShape
from dde_cache.towers.twins import ImageTower, TextTower
from dde_cache.vilt import position_deviation

FIRST_SCALE = math.log(1 / 0.07)
"""Logarithm of the factor of cosine similarities at the start of a contrastive training (CLIP, arXiv 2103.00020)."""

LARGEST_SCALE = 100.0


@dataclass(frozen=True)
class Head:
    """What a student has above its towers.

    `classes`: shallow interaction and a classifier, over one or two images. `similarity`: nothing but a learned
    temperature; the normalised pooled vectors are compared. `pretraining`: the temperature and the shallow interaction.
    """

    kind: Literal["classes", "similarity", "pretraining"] = "classes"
    images: int = 1
    task: str = "classification"


class DualEncoderConfig(PreTrainedConfig):
    """Shape of a dual encoder.

    Args:
        tower: configuration of a ViLT, whose patches and text length the student was trained with; both towers are its
            twins, but for those that `text` and `image` name.
        head, images: as in `Head`.
        task: what it was trained for.
        text: a `TextShape`, of a text encoder of Hugging Face; None: a twin.
        image: an `ImageShape`, of an image encoder; None: a twin.
    """

    model_type = "dde-dual-encoder"

    def __init__(
        self,
        tower: dict[str, Any] | None = None,
        head: str = "classes",
        images: int = 1,
        task: str = "classification",
        text: dict[str, Any] | None = None,
        image: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.head, self.images, self.task = head, images, task
        self.text, self.image = text, image
        self.tower = tower if tower is not None else ViltConfig().to_dict()
        # Hugging Face draws the weights of every linear map and embedding with this deviation, and with 0.02 where the
        # configuration does not say: far too small for narrow towers.
        self.initializer_range = self.vilt().initializer_range
        kwargs.pop("initializer_range", None)
        super().__init__(**kwargs)

    def vilt(self) -> ViltConfig:
        """The twins' shape as a ViLT configuration."""
        return ViltConfig.from_dict(self.tower)

    @property
    def text_length(self) -> int:
        """Tokens of a text that are read at most."""
        return int(self.vilt().max_position_embeddings if self.text is None else self.text["length"])


@dataclass
class DualEncoderOutput(ModelOutput):
    """Logits [b, c], the `TowerOutput` of both sides, and that of a second image. (Hugging Face wants every field to be
    optional.) Other heads than a classifier give no logits, but `scale`, the factor of their cosines."""

    logits: Any = None
    text: Any = None
    image: Any = None
    second: Any = None
    scale: Any = None


class DualEncoder(PreTrainedModel):
    """Two towers, a shallow interaction and a classification head.

    Where one tower is narrower than the other, its pooled vector goes through a linear map to the other's width w.

    Interaction: cat[text; image] (2w) -> Linear(2w, 2w) -> LayerNorm -> GELU -> Linear(2w, w). Head: Linear(w, 2w) ->
    LayerNorm -> GELU -> Linear(2w, classes). Of two images each meets the text in the interaction, and the head reads
    both results side by side (2w inputs; NLVR2). Students that compare pooled vectors have neither, those of
    pre-training the interaction alone.
    """

    config_class = DualEncoderConfig
    base_model_prefix = "dual_encoder"
    main_input_name = "input_ids"

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__(config)
        shape = config.vilt()
        self.text_tower: Any = (
            TextTower(shape) if config.text is None else HuggingFaceTextTower(TextShape.model_validate(config.text))
        )
        self.image_tower: Any = (
            ImageTower(shape)
            if config.image is None
            else HuggingFaceImageTower(ImageShape.model_validate(config.image), shape.patch_size)
        )
        width = max(tower.width for tower in self.towers)
        for tower in self.towers:
            tower.project(width)
        self.width = width
        if config.head != "classes":
            self.logit_scale = nn.Parameter(torch.tensor(FIRST_SCALE))
        if config.head != "similarity":
            self.fusion = _two_layers(2 * width, 2 * width, width)
        if config.head == "classes":
            self.head = _two_layers(config.images * width, 2 * width, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        deviation = self.config.initializer_range
        if isinstance(module, DualEncoder) and module.config.head != "classes":
            init.constant_(module.logit_scale, FIRST_SCALE)
        if isinstance(module, (TextTower, ImageTower)):
            init.normal_(module.token_type, std=deviation)
        if isinstance(module, ImageTower):
            spread = position_deviation(module.patch_embeddings.projection, deviation)
            init.normal_(module.position_embeddings, std=spread)
        if isinstance(module, TextEmbeddings):
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1]).expand((1, -1)))
            init.zeros_(module.token_type_ids)

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"],
        pixel_values: Float[Tensor, "b c y x"],
        grid: Int[Tensor, "b 2"] | None = None,
        second_pixel_values: Float[Tensor, "b c y x"] | None = None,
        second_grid: Int[Tensor, "b 2"] | None = None,
        *,
        image_padding: Sequence[int] = (0, 0),
    ) -> DualEncoderOutput:
        """Encode both sides and answer.

        Args:
            input_ids: tokens of the texts.
            attention_mask: 1 = valid.
            pixel_values: pictures, padded at the bottom and right.
            grid: patch rows and columns of each picture; without it, every picture fills the whole canvas.
            second_pixel_values, second_grid: the same of the second pictures, for a student of two.
            image_padding: for each image slot, padded tokens beyond those of the batch's largest picture.

        Raises:
            InputError: the student reads another number of pictures.
        """
        given = 1 if second_pixel_values is None else 2
        if given != self.config.images:
            raise InputError(f"expected {self.config.images} images a sample for this student, got {given}")
        text = self.text_tower(input_ids, attention_mask)
        grid = self._grid(pixel_values) if grid is None else grid
        image = self.image_tower(pixel_values, grid, padding=image_padding[0])
        if self.config.head != "classes":
            return DualEncoderOutput(text=text, image=image, scale=self.logit_scale.exp().clamp(max=LARGEST_SCALE))
        if second_pixel_values is None:
            return DualEncoderOutput(logits=self.answer(text.pooled, image.pooled), text=text, image=image)
        grid = self._grid(second_pixel_values) if second_grid is None else second_grid
        second = self.image_tower(second_pixel_values, grid, image_slot=1, padding=image_padding[1])
        logits = self.answer(text.pooled, image.pooled, second.pooled)
        return DualEncoderOutput(logits=logits, text=text, image=image, second=second)

    def keep_blocks(self, numbers: Sequence[int]) -> None:
        """Say of which blocks, beside the last, every output has query and key projections and hidden states.

        Raises:
            InputError: the towers have no such block.
        """
        depth = min(tower.depth for tower in self.towers)
        if any(not 0 <= number < depth for number in numbers):
            raise InputError(f"expected blocks of the student from 0 to {depth - 1}, got {sorted(numbers)}")
        for tower in self.towers:
            tower.kept_blocks = tuple(numbers)

    @property
    def towers(self) -> tuple[Tower, Tower]:
        """Text and image."""
        return self.text_tower, self.image_tower

    def answer(self, text: Float[Tensor, "b w"], *images: Float[Tensor, "b w"]) -> Float[Tensor, "b c"]:
        """Logits from the pooled vectors of a text and its images: all that runs when they were stored."""
        fused = [self.interact(text, image) for image in images]
        return self.head(torch.cat(fused, dim=-1))

    def interact(self, text: Float[Tensor, "b w"], image: Float[Tensor, "b w"]) -> Float[Tensor, "b w"]:
        """The shallow interaction of pooled vectors."""
        return self.fusion(torch.cat([text, image], dim=-1))

    def _grid(self, pixels: Float[Tensor, "b c y x"]) -> Int[Tensor, "b 2"]:
        patch = self.config.vilt().patch_size
        return torch.tensor([[pixels.shape[2] // patch, pixels.shape[3] // patch]]).expand(len(pixels), -1)


def _two_layers(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, outputs))


def new_student(
    tower: ViltConfig,
    labels: Sequence[str],
    dropout: float = 0.0,
    head: Head | None = None,
    *,
    text: TextShape | None = None,
    image: ImageShape | None = None,
) -> DualEncoder:
    """A student with random weights; without a `head`, one that classifies one image; towers as in the config."""
    head = head or Head()
    shape = tower.to_dict() | {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    for name in ("id2label", "label2id", "architectures", "transformers_version", "_name_or_path", "dtype"):
        shape.pop(name, None)
    return DualEncoder(
        DualEncoderConfig(
            tower=shape,
            head=head.kind,
            images=head.images,
            task=head.task,
            text=None if text is None else text.model_dump(mode="json"),
            image=None if image is None else image.model_dump(mode="json"),
            id2label=dict(enumerate(labels)),
            label2id={label: number for number, label in enumerate(labels)},
        )
    )


def student_from_vilt(
    checkpoint: str | Path, labels: Sequence[str], dropout: float = 0.0, head: Head | None = None, **towers: Any
) -> DualEncoder:
    """A student whose twins start from a ViLT checkpoint, as the paper does; the head is new, and so are `towers` (as
    for `new_student`).

    Raises:
        TeacherError: the checkpoint is missing, incomplete, or no ViLT.
    """
    path = resolve(checkpoint)
    config = read_config(path)
    # A checkpoint of masked language modelling has no pooler; both towers then start from the same random one.
    source = load_weights(ViltModel, path, config, optional=["pooler"])
    student = new_student(config, labels, dropout, head, **towers)
    for tower in student.towers:
        if isinstance(tower, (TextTower, ImageTower)):
            tower.encoder.load_state_dict(source.encoder.state_dict())
            tower.layernorm.load_state_dict(source.layernorm.state_dict())
            tower.pooler.load_state_dict(source.pooler.state_dict())
    embeddings, (text, image) = source.embeddings, student.towers
    types = embeddings.token_type_embeddings.weight
    with torch.no_grad():
        if isinstance(text, TextTower):
            text.text_embeddings.load_state_dict(embeddings.text_embeddings.state_dict())
            text.token_type.copy_(types[0])
        if isinstance(image, ImageTower):
            image.patch_embeddings.load_state_dict(embeddings.patch_embeddings.state_dict())
            image.cls_token.copy_(embeddings.cls_token)
            image.position_embeddings.copy_(embeddings.position_embeddings)
            image.token_type[0].copy_(types[1])
            image.token_type[1].copy_(types[2] if len(types) > 2 else types[1])
    return student


# So that AutoModel.from_pretrained loads a saved student once this module is imported.
AutoConfig.register(DualEncoderConfig.model_type, DualEncoderConfig, exist_ok=True)
AutoModel.register(DualEncoderConfig, DualEncoder, exist_ok=True)
