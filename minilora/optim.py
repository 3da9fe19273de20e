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


def make_optimizer(model: nn.Module, weight_decay: float, loraplus_lr_ratio: float = 1.0) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over the trainable parameters; vectors (biases, norms, magnitudes) are not decayed.

    Each group has an "lr_ratio", by which the step's learning rate is multiplied: that of the B of LoRA+
    (arXiv:2402.12354) is loraplus_lr_ratio, all others' is 1.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            decay = weight_decay if param.ndim >= 2 else 0.0
            ratio = loraplus_lr_ratio if name.endswith(".lora_B") else 1.0
            groups.setdefault((decay, ratio), []).append(param)
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": decay, "lr_ratio": ratio} for (decay, ratio), params in groups.items()],
        lr=0.0,
        fused=True,
    )
