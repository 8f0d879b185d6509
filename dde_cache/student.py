"""The student as a Hugging Face model: two ViLT-like towers and a shallow head (DiDE, arXiv 2112.08723).

Each side is encoded alone, so that it can be computed once and stored; only the small head sees both.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ViltConfig, ViltModel
from transformers import initialization as init
from transformers.models.vilt.modeling_vilt import TextEmbeddings, ViltEncoder, ViltPatchEmbeddings, ViltPooler
from transformers.utils import ModelOutput

from dde_cache.attention import QueryKey
from dde_cache.errors import InputError
from dde_cache.teacher import load_weights, read_config, resolve
from dde_cache.vilt import capture_query_key, capture_states, embed_patches, position_deviation

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
    """Shape of a dual encoder: both towers are those of a ViLT with configuration `tower`; `head` and `images` as in
    `Head`; `task` names what it was trained for."""

    model_type = "dde-dual-encoder"

    def __init__(
        self,
        tower: dict[str, Any] | None = None,
        head: str = "classes",
        images: int = 1,
        task: str = "classification",
        **kwargs: Any,
    ) -> None:
        self.head, self.images, self.task = head, images, task
        self.tower = tower if tower is not None else ViltConfig().to_dict()
        # Hugging Face draws the weights of every linear map and embedding with this deviation, and with 0.02 where the
        # configuration does not say: far too small for narrow towers.
        self.initializer_range = self.vilt().initializer_range
        kwargs.pop("initializer_range", None)
        super().__init__(**kwargs)

    def vilt(self) -> ViltConfig:
        """The towers' shape as a ViLT configuration."""
        return ViltConfig.from_dict(self.tower)


@dataclass
class BlockOutput:
    """What a block of a tower gave: its query and key projections, and its hidden states."""

    query_key: QueryKey
    states: Float[Tensor, "b n w"]


@dataclass
class TowerOutput:
    """One side of a batch: pooled vector, token mask, what the last block and those that are kept gave, and the states
    of the tokens behind the final norm."""

    pooled: Float[Tensor, "b w"]
    mask: Bool[Tensor, "b n"]
    blocks: Mapping[int, BlockOutput]
    states: Any = None

    @property
    def query_key(self) -> QueryKey:
        """The last block's query and key projections."""
        return self.block(None).query_key

    def block(self, number: int | None) -> BlockOutput:
        """A block that was kept; None: the last."""
        return self.blocks[max(self.blocks) if number is None else number]


@dataclass
class DualEncoderOutput(ModelOutput):
    """Logits [b, c], the `TowerOutput` of both sides, and that of a second image. (Hugging Face wants every field to be
    optional.) Other heads than a classifier give no logits, but `scale`, the factor of their cosines."""

    logits: Any = None
    text: Any = None
    image: Any = None
    second: Any = None
    scale: Any = None


class _Tower(nn.Module):
    """What both towers share: the blocks, the final norm and the pooler on the first token."""

    def __init__(self, config: ViltConfig) -> None:
        super().__init__()
        self.encoder = ViltEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViltPooler(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.kept_blocks: tuple[int, ...] = ()

    def encode(self, embeds: Float[Tensor, "b n w"], mask: Bool[Tensor, "b n"]) -> TowerOutput:
        """Run the blocks over embedded tokens."""
        bias = torch.zeros(mask.shape, dtype=embeds.dtype, device=embeds.device)
        bias = bias.masked_fill(~mask, torch.finfo(embeds.dtype).min)[:, None, None, :]
        blocks = self.encoder.layer
        kept = sorted({*self.kept_blocks, len(blocks) - 1})
        with capture_query_key(blocks, kept) as capture, capture_states(blocks, kept) as held:
            states = self.layernorm(self.encoder(embeds, attention_mask=bias).last_hidden_state)
        outputs = {number: BlockOutput(capture[number], held[number]) for number in kept}
        return TowerOutput(self.pooler(states), mask, outputs, states)


class TextTower(_Tower):
    """BERT embeddings, token type 0, and the blocks."""

    def __init__(self, config: ViltConfig) -> None:
        super().__init__(config)
        self.text_embeddings = TextEmbeddings(config)
        self.token_type = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"]) -> TowerOutput:
        """Encode texts."""
        return self.encode(self.text_embeddings(input_ids=input_ids) + self.token_type, attention_mask.bool())


class ImageTower(_Tower):
    """Patch embeddings in row-major order behind CLS, token type 1 (2 for a second image), and the blocks."""

    def __init__(self, config: ViltConfig) -> None:
        super().__init__(config)
        self.patch_embeddings = ViltPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(
            torch.zeros(1, self.patch_embeddings.num_patches + 1, config.hidden_size)
        )
        self.token_type = nn.Parameter(torch.zeros(2, config.hidden_size))

    def forward(
        self, pixel_values: Float[Tensor, "b c y x"], grid: Int[Tensor, "b 2"], image_slot: int = 0, padding: int = 0
    ) -> TowerOutput:
        """Encode pictures, padded at the bottom and right; `grid` holds the patch rows and columns of each.

        `padding` padded tokens come behind those of the batch's largest picture.
        """
        embeds, mask = embed_patches(
            self.patch_embeddings.projection, self.cls_token, self.position_embeddings, pixel_values, grid, padding
        )
        return self.encode(self.dropout(embeds) + self.token_type[image_slot], mask)


class DualEncoder(PreTrainedModel):
    """Two towers, a shallow interaction and a classification head.

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
        width = shape.hidden_size
        self.text_tower = TextTower(shape)
        self.image_tower = ImageTower(shape)
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
        depth = len(self.text_tower.encoder.layer)
        if any(not 0 <= number < depth for number in numbers):
            raise InputError(f"expected blocks of the student from 0 to {depth - 1}, got {sorted(numbers)}")
        for tower in (self.text_tower, self.image_tower):
            tower.kept_blocks = tuple(numbers)

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
    tower: ViltConfig, labels: Sequence[str], dropout: float = 0.0, head: Head | None = None
) -> DualEncoder:
    """A student with random weights; without a `head`, one that classifies one image."""
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
            id2label=dict(enumerate(labels)),
            label2id={label: number for number, label in enumerate(labels)},
        )
    )


def student_from_vilt(
    checkpoint: str | Path, labels: Sequence[str], dropout: float = 0.0, head: Head | None = None
) -> DualEncoder:
    """A student whose towers both start from a ViLT checkpoint, as the paper does; the head is new.

    Raises:
        TeacherError: the checkpoint is missing, incomplete, or no ViLT.
    """
    path = resolve(checkpoint)
    config = read_config(path)
    # A checkpoint of masked language modelling has no pooler; both towers then start from the same random one.
    source = load_weights(ViltModel, path, config, optional=["pooler"])
    student = new_student(config, labels, dropout, head)
    embeddings = source.embeddings
    types = embeddings.token_type_embeddings.weight
    for tower in (student.text_tower, student.image_tower):
        tower.encoder.load_state_dict(source.encoder.state_dict())
        tower.layernorm.load_state_dict(source.layernorm.state_dict())
        tower.pooler.load_state_dict(source.pooler.state_dict())
    with torch.no_grad():
        student.text_tower.text_embeddings.load_state_dict(embeddings.text_embeddings.state_dict())
        student.text_tower.token_type.copy_(types[0])
        student.image_tower.patch_embeddings.load_state_dict(embeddings.patch_embeddings.state_dict())
        student.image_tower.cls_token.copy_(embeddings.cls_token)
        student.image_tower.position_embeddings.copy_(embeddings.position_embeddings)
        student.image_tower.token_type[0].copy_(types[1])
        student.image_tower.token_type[1].copy_(types[2] if len(types) > 2 else types[1])
    return student
