"""What of a base is trained: low-rank adapters around its linear layers, or every weight."""

from typing import Any

from minilora.config import TrainConfig
from minilora.fast import speed_up
from minilora.lora import inject


def make_trainable(model: Any, config: TrainConfig, checkpointing: bool, preserve_rng_state: bool = True) -> None:
    """Put into a base what is trained in it, and give its modules their lean forms.

    checkpointing: recompute activations in the backward pass; preserve_rng_state: with the same random numbers
    """
    if config.method == "lora":
        shape = (config.lora_r, config.lora_alpha, config.lora_dropout, config.use_rslora)
        inject(model, config.target_modules, *shape, seed=config.seed)
    else:
        model.requires_grad_(True)
    speed_up(model)
    if checkpointing:  # transformers gave its method a new name in 5.2x
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": preserve_rng_state})
