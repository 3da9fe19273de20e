"""For those with a training loop of their own: an adapter put into a transformers model, saved, loaded, folded in.

The names exported by the package stay as they are; all of them take a model as `AutoModelForCausalLM` gives it.
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
from minilora.lora import inject, is_quantised, lora_layers
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
    """Freeze a model and put a fresh adapter around its linear layers; only A and B of each then want a gradient.

    target_modules: names of linear layers, or attn | mlp | all. Returns the settings, which `save_adapter` wants.
    Raises ConfigError for values that cannot be, AdapterError when there is an adapter on the model.
    """
    _refuse_second(model)
    checked = TrainConfig(
        target_modules=target_modules,  # type: ignore[arg-type]  # a text is read, too
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
    """Put a saved adapter on the base it was trained on, to answer with or to go on training.

    Whether it is that base is unknown where transformers has loaded it in 4 or 8 bits; shapes are checked all the same.
    Raises AdapterError that names what does not fit; the model is unchanged then.
    """
    _refuse_second(model)
    identity = _identity(model)
    config = adapter_format.load(model, Path(folder), identity, allow_other_base or not identity)
    _in_step(model)
    return config


def save_adapter(
    model: Any, folder: str | Path, config: AdapterConfig, tokenizer: Any = None, system_prompt: str = ""
) -> None:
    """Write the adapter on a model in PEFT's format, with the base's fingerprint, and the tokenizer where one is given.

    config: what `add_adapter` or `load_adapter` returned. system_prompt: the one it was trained with, for `chat`.
    Raises AdapterError when there is no adapter on the model, DivergedError when it is not finite.
    """
    if not lora_layers(model):
        raise AdapterError("there is no adapter on this model: add_adapter or load_adapter puts one there")
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
    """Fold the adapter into the weights, in fp32 and rounded once: plain linear layers are left, the same function.

    Layers that are disabled lose their adapter without a change. From disk to disk, without a model in memory:
    `minilora merge`. Raises AdapterError for a base in 4 or 8 bits.
    """
    if any(is_quantised(layer.base_layer) for layer in lora_layers(model).values()):
        raise AdapterError("this base is in 4 or 8 bits: save the adapter, load it on the plain base, and merge there")
    for name, layer in lora_layers(model).items():
        base = layer.base_layer
        if layer.enabled:
            base.weight.copy_(base.weight.to(layer.lora_A.dtype) + layer.delta())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)


def _identity(model: Any) -> str:
    """The base's fingerprint; empty where it was loaded in few bits by others, so that nobody has seen its weights."""
    held = any(isinstance(layer, nn.Linear) and is_quantised(layer) for layer in model.modules())
    return "" if held and not hasattr(model, "base_fingerprint") else fingerprint(model)


def _refuse_second(model: nn.Module) -> None:
    if lora_layers(model):
        raise AdapterError("there is an adapter on this model: merge_adapter folds it in, Adapters holds several")


def _in_step(model: nn.Module) -> None:
    """New layers drop out where the model is in training mode, and only there; a loaded base is in evaluation mode."""
    for layer in lora_layers(model).values():
        layer.train(model.training)
