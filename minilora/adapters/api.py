"""Adds, loads, saves and merges an adapter on a transformers model, for users with their own training loop.

The package exports these names, and they stay the same. Each function takes a model of `AutoModelForCausalLM`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.adapters import format as adapter_format
from minilora.adapters.format import AdapterConfig, save_folder
from minilora.config import TrainConfig
from minilora.errors import AdapterError
from minilora.lora import LoRALinear, inject, is_quantised, lora_layers
from minilora.models.fingerprint import fingerprint
from minilora.utils import files


def add_adapter(
    model: Any,
    target_modules: str | Sequence[str] = TrainConfig.target_modules,
    *,
    lora_r: int = TrainConfig.lora_r,
    lora_alpha: int = TrainConfig.lora_alpha,
    lora_dropout: float = TrainConfig.lora_dropout,
    use_rslora: bool = TrainConfig.use_rslora,
    use_dora: bool = TrainConfig.use_dora,
    seed: int = TrainConfig.seed,
) -> AdapterConfig:
    """Freeze a model and put a new adapter around its linear layers. Only the adapter's tensors then need a gradient.

    target_modules: names of linear layers, or attn | mlp | all
    Returns the settings, which `save_adapter` needs. Raises ConfigError for invalid values. Raises AdapterError if the
    model already has an adapter.
    """
    _refuse_second(model)
    checked = TrainConfig(
        target_modules=target_modules,  # type: ignore[arg-type]  # a text is accepted too
        lora_r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_rslora=use_rslora,
        use_dora=use_dora,
        seed=seed,
    )
    shape = (checked.lora_r, checked.lora_alpha, checked.lora_dropout)
    inject(model, checked.target_modules, *shape, checked.use_rslora, checked.seed, checked.use_dora)
    _in_step(model)
    name = getattr(model, "name_or_path", "") or ""
    return AdapterConfig(name, *shape, checked.target_modules, checked.use_rslora, checked.use_dora)


def load_adapter(model: Any, folder: str | Path, allow_other_base: bool = False) -> AdapterConfig:
    """Put a saved adapter on the base that it was trained on, to generate answers or to continue training.

    If transformers has loaded the base in 4 or 8 bits, only shapes are checked, not the base's fingerprint.
    Raises AdapterError that names what does not fit. The model is unchanged then.
    """
    _refuse_second(model)
    identity = _identity(model)
    config = adapter_format.load(model, Path(folder), identity, allow_other_base or not identity)
    _in_step(model)
    return config


def save_adapter(
    model: Any, folder: str | Path, config: AdapterConfig, tokenizer: Any = None, system_prompt: str = ""
) -> None:
    """Write the adapter of a model in PEFT's format, with the base's fingerprint. Also write the tokenizer, if given.

    config: what `add_adapter` or `load_adapter` returned
    system_prompt: the system prompt of the training; `chat` uses it
    Raises AdapterError if the model has no adapter, and DivergedError if the adapter is not finite.
    """
    if not _adapted(model):
        raise AdapterError("there is no adapter on this model. Use add_adapter or load_adapter first")
    path = Path(folder)
    metadata = {"system_prompt": system_prompt}
    if identity := _identity(model):
        metadata["base_fingerprint"] = identity
    if tokenizer is not None:
        save_folder(path, model, tokenizer, config, metadata)
        return
    with files.storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    adapter_format.save(path, model, config, metadata)


@torch.no_grad()
def merge_adapter(model: Any) -> None:
    """Add the adapter to the weights, in fp32 with one rounding. The layers are then plain linear layers.

    The function of the model stays the same. Disabled layers lose their adapter, and their weights do not change. A
    model without an adapter stays as it is. `minilora merge` merges from disk to disk, without the model in memory.
    Raises AdapterError for a base in 4 or 8 bits.
    """
    layers = _adapted(model)
    if any(is_quantised(layer.base_layer) for layer in layers.values()):
        raise AdapterError("this base is in 4 or 8 bits: save the adapter, load it on the plain base, and merge there")
    for name, layer in layers.items():
        base = layer.base_layer
        if layer.enabled:
            base.weight.copy_(base.weight.to(layer.lora_A.dtype) + layer.delta())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)


def _identity(model: Any) -> str:
    """The base's fingerprint. Empty if another program loaded the base in 4 or 8 bits: its weights are not known."""
    held = any(isinstance(layer, nn.Linear) and is_quantised(layer) for layer in model.modules())
    return "" if held and not hasattr(model, "base_fingerprint") else fingerprint(model)


def _adapted(model: Any) -> dict[str, LoRALinear]:
    """The adapter's layers by name; empty without an adapter. Raises AdapterError for what is not a model."""
    if not isinstance(model, nn.Module):
        raise AdapterError(
            f"{adapter_format.shown(model)} is not a model: AutoModelForCausalLM.from_pretrained makes one"
        )
    return lora_layers(model)


def _refuse_second(model: Any) -> None:
    if _adapted(model):
        raise AdapterError("there is an adapter on this model: merge_adapter merges it, Adapters holds several")


def _in_step(model: nn.Module) -> None:
    """Put new layers into the mode of the model, so that dropout is active only in training mode."""
    for layer in lora_layers(model).values():
        layer.train(model.training)
