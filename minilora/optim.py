"""Makes AdamW with its parameter groups, and computes the learning rate from the number of the step."""

import math

import torch
from torch import nn


def learning_rate(step: int, num_steps: int, peak: float, shape: str, warmup_ratio: float) -> float:
    """The learning rate of optimizer step `step` (counted from 0) of num_steps.

    The rate rises linearly over the first ceil(warmup_ratio * num_steps) steps and reaches `peak` at the last of them.
    Then it follows `shape` (cosine, linear, constant). Cosine and linear would reach 0 one step after the end.
    No step has rate 0. In Hugging Face's schedules the first step of a warm-up has rate 0 and changes nothing.
    """
    warmup = math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    if shape == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak * (1 - done) if shape == "linear" else peak


def make_optimizer(model: nn.Module, weight_decay: float, loraplus_lr_ratio: float = 1.0) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over the trainable parameters. Vectors (biases, norms, magnitudes) have no weight decay.

    Each group has an "lr_ratio", which multiplies the learning rate of the step. It is loraplus_lr_ratio for the B
    matrices (LoRA+, arXiv:2402.12354) and 1 for all other parameters.
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
