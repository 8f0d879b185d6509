"""Attention without its weights: torch's fused kernel in place of the library's matrix products.

None of these families has such a path in the model library, which writes out the weights of every block. Here they are
replaced during a forward pass of ours alone: the model stays the stock one for everybody else.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dde_cache.teachers.contract import split_heads


def attend(
    module: Any, states: Float[Tensor, "b q w"], context: Float[Tensor, "b k c"], mask: Tensor | None
) -> Float[Tensor, "b q w"]:
    """What an attention module with `query`, `key` and `value` gives before its output projection.

    Its linear maps are called, so that hooks on them see what they always do.

    Args:
        module: of the kind that descends from BERT.
        states: where the queries come from.
        context: where keys and values come from.
        mask: added to the logits, or True where a key is seen; broadcast over [b, h, q, k].
    """
    heads = module.num_attention_heads
    query, key = split_heads(module.query(states), heads), split_heads(module.key(context), heads)
    value = split_heads(module.value(context), heads)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def self_attention(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
) -> tuple[Tensor, ...]:
    """In place of the `forward` of a self-attention whose first output is the context."""
    return (attend(module, hidden_states, hidden_states, attention_mask),)


@contextmanager
def quick_attention(model: nn.Module, forwards: Mapping[type[nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Run a model's attention modules by other functions while the context is open.

    Args:
        model: whose modules.
        forwards: by class of module, what is called with the module and the arguments of its `forward`.
    """
    changed = [module for module in model.modules() if type(module) in forwards]
    for module in changed:
        module.forward = partial(forwards[type(module)], module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward
