"""AdamW's parameter groups, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn


def learning_rate(step: int, num_steps: int, peak: float, shape: str, warmup_ratio: float) -> float:
    """The rate of optimizer step `step` (counted from 0) of num_steps.

    It rises linearly over the first ceil(warmup_ratio * num_steps) steps, reaching `peak` at the last of them, then
    follows `shape` (cosine, linear, constant) towards 0 one step after the end. No step has rate 0, unlike Hugging
    Face's schedules, whose first step with warm-up learns nothing.
    """
    warmup = math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    if shape == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak * (1 - done) if shape == "linear" else peak


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over the trainable parameters; vectors (biases, norms) are not decayed."""
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    decayed = [param for _, param in named if param.ndim >= 2]
    others = [param for _, param in named if param.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, fused=True)
