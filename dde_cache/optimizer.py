"""Learning rates and weight decay by step and parameter."""

from typing import Any

from torch import nn

from dde_cache.runs import FitConfig


def rate_at(step: int, config: FitConfig) -> float:
    """Factor of the learning rate at a step: linear warm-up, then linear decay to 0."""
    warmup = config.warmup * config.steps
    if step < warmup:
        return (step + 1) / max(warmup, 1)
    return (config.steps - step) / (config.steps - warmup)


def parameter_groups(model: nn.Module, config: FitConfig) -> list[dict[str, Any]]:
    """Split parameters by weight decay (none for biases, norms and single vectors) and by the head's learning rate."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            head = name.startswith(("classifier", "head"))
            groups.setdefault((head, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.learning_rate * (config.head_learning_rate_factor if head else 1.0),
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (head, decays), parameters in groups.items()
    ]
