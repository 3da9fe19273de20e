"""Makes a base trainable: puts low-rank adapters around its linear layers, or enables every weight."""

from typing import Any

import torch
from torch import nn

from minilora.config import TrainConfig
from minilora.errors import ConfigError
from minilora.lora import inject, lora_layers
from minilora.lora_variants import PiSSA


def make_trainable(model: Any, config: TrainConfig) -> None:
    """Put adapters around the layers of a base, or enable all its weights."""
    if config.method == "lora":
        shape = (config.lora_r, config.lora_alpha, config.lora_dropout, config.use_rslora)
        inject(model, config.target_modules, *shape, seed=config.seed, dora=config.use_dora)
        if config.init_lora_weights == "pissa":
            start_at_main_directions(model, config.seed)
    else:
        model.requires_grad_(True)


def in_words(config: TrainConfig) -> str:
    """What is trained, as a text for the header."""
    if config.method == "full":
        return "every weight, fp32 masters"
    variants = {
        "rsLoRA": config.use_rslora,
        "DoRA": config.use_dora,
        "PiSSA": config.init_lora_weights == "pissa",
        f"LoRA+ {config.loraplus_lr_ratio:g}": config.loraplus_lr_ratio != 1,
    }
    chosen = "".join(f", {name}" for name, on in variants.items() if on)
    shape = f"r {config.lora_r}, alpha {config.lora_alpha}, dropout {config.lora_dropout}{chosen}"
    held = f", the base in {config.base_bits} bits" if config.base_bits else ""
    return f"{shape} on {', '.join(config.target_modules)}{held}"


def start_at_main_directions(model: nn.Module, seed: int) -> None:
    """PiSSA: initialise A and B with the largest singular directions of their weight, and keep a copy of this start.

    W0 does not change. Raises ConfigError if the rank is larger than a dimension of a weight.
    """
    pissa = PiSSA()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, layer in lora_layers(model).items():
            rank, most = len(layer.lora_A), min(layer.base_layer.weight.shape)
            if rank > most:
                raise ConfigError(f"init_lora_weights = 'pissa': {name} has {most} directions, lora_r is {rank}.")
            pissa.initialise(layer)
            layer.variant = layer.variant.starting_at(pissa)
