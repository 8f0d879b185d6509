"""ViLT-shaped towers: the paper's, which start from the two halves of one ViLT (DiDE, arXiv 2112.08723)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import ViltConfig
from transformers.models.vilt.modeling_vilt import TextEmbeddings, ViltEncoder, ViltPatchEmbeddings, ViltPooler

from dde_cache.towers.contract import BlockOutput, Tower, TowerOutput
from dde_cache.vilt import capture_query_key, capture_states, embed_patches


class _Twin(Tower):
    """What both towers share: the blocks, the final norm and the pooler on the first token."""

    def __init__(self, config: ViltConfig) -> None:
        heads = config.num_attention_heads
        super().__init__(config.hidden_size, heads, config.hidden_size // heads, config.num_hidden_layers)
        self.encoder = ViltEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViltPooler(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def encode(self, embeds: Float[Tensor, "b n w"], mask: Bool[Tensor, "b n"]) -> TowerOutput:
        """Run the blocks over embedded tokens."""
        bias = torch.zeros(mask.shape, dtype=embeds.dtype, device=embeds.device)
        bias = bias.masked_fill(~mask, torch.finfo(embeds.dtype).min)[:, None, None, :]
        blocks, kept = self.encoder.layer, self.kept()
        with capture_query_key(blocks, kept) as capture, capture_states(blocks, kept) as held:
            states = self.layernorm(self.encoder(embeds, attention_mask=bias).last_hidden_state)
        outputs = {number: BlockOutput(capture[number], held[number]) for number in kept}
        return TowerOutput(self.projection(self.pooler(states)), mask, outputs, states)


class TextTower(_Twin):
    """BERT embeddings, token type 0, and the blocks."""

    def __init__(self, config: ViltConfig) -> None:
        super().__init__(config)
        self.text_embeddings = TextEmbeddings(config)
        self.token_type = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"]) -> TowerOutput:
        """Encode texts."""
        return self.encode(self.text_embeddings(input_ids=input_ids) + self.token_type, attention_mask.bool())


class ImageTower(_Twin):
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
