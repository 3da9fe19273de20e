"""Writes adapters in PEFT's file format atomically, reads them strictly, and checks that they fit their base.

Format: https://github.com/huggingface/peft/blob/main/docs/source/developer_guides/checkpoint.md
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import AdapterError, DivergedError, ModelError
from minilora.lora import inject, lora_layers
from minilora.lora_variants import DoRA, LoRA
from minilora.models.load import find_model, what_else
from minilora.models.trained import end_tokens, save_tokenizer, write_generation
from minilora.utils import files

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
MAX_HEADER_BYTES = 2 * 2**20
MERGE_IN_PEFT = (
    "Merge it into its base with PEFT (merge_and_unload, then save_pretrained), and give the result as --model."
)
# The keys of PEFT's LoraConfig that minilora does not implement. Any value that is not listed here is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "task_type": ("CAUSAL_LM", None),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "exclude_modules": (None, []),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None,),
    "megatron_config": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    # other values (pissa, olora, corda, loftq, ...) also change the base, and PEFT repeats this when it loads the file
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
}


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of adapter_config.json that minilora uses."""

    base_model: str
    rank: int
    alpha: int
    dropout: float
    target_modules: tuple[str, ...]
    rslora: bool
    dora: bool = False
    pattern: str = ""  # target_modules of the file if they are not plain names, else empty

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def variant(self) -> LoRA:
        """The variant whose tensors the file holds."""
        return DoRA() if self.dora else LoRA()


def converted(config: AdapterConfig) -> AdapterConfig:
    """The settings of a PiSSA adapter on the original base: twice the rank, and the same scale.

    With rsLoRA, alpha would not be a whole number. In that case the scale becomes 1, and `tensors` multiplies B by the
    old scale.
    """
    rank = 2 * config.rank
    return replace(config, rank=rank, alpha=rank if config.rslora else 2 * config.alpha, rslora=False)


def tensors(model: nn.Module, scale: float) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names: ...q_proj.lora_A.weight (r, in), ...q_proj.lora_B.weight (out, r).

    DoRA also has ...q_proj.lora_magnitude_vector (out,). scale: the factor by which a reader multiplies B A.
    """
    named = {}
    for name, layer in lora_layers(model).items():
        A, B = layer.variant.pair(layer)
        named[f"{PREFIX}{name}.lora_A.weight"] = A.detach()
        named[f"{PREFIX}{name}.lora_B.weight"] = B.detach() * (layer.scale / scale)  # 1, except for `converted` rsLoRA
        named |= {f"{PREFIX}{name}.{key}": getattr(layer, key).detach() for key in layer.variant.trained}
    return named


def save(folder: Path, model: nn.Module, config: AdapterConfig, metadata: Mapping[str, str]) -> None:
    """Write the adapter of a model: call `write` with the tensors of its LoRALinear layers."""
    write(folder, tensors(model, config.scale), config, metadata)


def write(folder: Path, named: Mapping[str, Tensor], config: AdapterConfig, metadata: Mapping[str, str]) -> None:
    """Write adapter_config.json, then adapter_model.safetensors. Each file is replaced atomically.

    named: the result of `tensors`. metadata: base fingerprint, system prompt, ...; it goes into the safetensors header,
    and PEFT ignores it there.
    Raises DivergedError if a tensor is not finite. Such an adapter is never written.
    """
    if broken := [name for name, tensor in named.items() if not torch.isfinite(tensor).all()]:
        raise DivergedError(
            f"the adapter is not finite ({len(broken)} of its tensors, the first {broken[0]}): not written to {folder}"
        )
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
    }
    with files.storage_errors(folder):
        folder.mkdir(exist_ok=True)
    files.replace_file(folder / CONFIG, files.json_chunks(settings))
    files.replace_file(folder / WEIGHTS, files.safetensors_chunks(named, {"format": "pt", **metadata}))


def read_config(folder: Path) -> AdapterConfig:
    """Read and check adapter_config.json. Raises AdapterError that names the file and every invalid key."""
    path = folder / CONFIG
    if files.denied(path):
        raise AdapterError(f"adapter {str(folder)!r}: Permission denied.")
    try:
        raw = files.read_json(path)
    except ValueError as error:
        if (folder / "adapter" / CONFIG).is_file():
            hint = f" Its adapter is {folder / 'adapter'}."
        elif other := what_else(folder):
            hint = f" But {other}"
        else:
            held = " It holds a model: train, generate, chat, eval and inspect take it as --model."
            hint = held * (folder / "config.json").is_file()
        raise AdapterError(f"{folder} is no adapter: {path.name}: {error}.{hint}") from error
    refuse_pickle(folder)
    wrong = [
        f"{key} = {shown(raw[key])} is not supported here (only {allowed[0]!r})"
        for key, allowed in NEUTRAL.items()
        if raw.get(key) is not None and raw[key] not in allowed
    ]
    way_out = f" {MERGE_IN_PEFT}" if wrong and raw.get("peft_type") == "LORA" else ""
    for key in ("r", "lora_alpha"):
        if isinstance(raw.get(key), float) and raw[key].is_integer():
            raw[key] = int(raw[key])  # some programs write 16.0
    targets, dropout = raw.get("target_modules"), raw.get("lora_dropout") or 0.0
    names = [targets] if isinstance(targets, str) else targets
    checks = {
        ("r", "a whole number from 1 to 65536"): _is_int(raw.get("r")) and 1 <= raw["r"] <= 2**16,
        ("lora_alpha", "a whole number"): _is_int(raw.get("lora_alpha")) and abs(raw["lora_alpha"]) < 2**31,
        ("lora_dropout", "a number from 0 to below 1"): isinstance(dropout, (int, float)) and 0 <= dropout < 1,
        ("target_modules", "a list of names"): (
            isinstance(names, list) and bool(names) and all(isinstance(n, str) and n for n in names)
        ),
        ("use_rslora", "true or false"): isinstance(raw.get("use_rslora") or False, bool),
        ("use_dora", "true or false"): isinstance(raw.get("use_dora") or False, bool),
        ("base_model_name_or_path", "a text"): isinstance(raw.get("base_model_name_or_path", ""), (str, type(None))),
    }
    wrong += [
        f"{key} {f'= {shown(raw[key])} is not' if key in raw else 'is missing: it is'} {needed}"
        for (key, needed), good in checks.items()
        if not good
    ]
    if wrong:
        raise AdapterError(f"{path}: " + "; ".join(wrong) + f".{way_out}")
    assert names is not None
    plain = isinstance(targets, list) and all(re.fullmatch(r"\w+", name) for name in names)
    return AdapterConfig(
        base_model=raw.get("base_model_name_or_path") or "",
        rank=raw["r"],
        alpha=raw["lora_alpha"],
        dropout=float(dropout),
        target_modules=tuple(sorted(set(names))) if plain else layer_names(folder, targets),
        rslora=raw.get("use_rslora") or False,
        dora=raw.get("use_dora") or False,
        pattern="" if plain else shown(targets),
    )


def shown(value: Any) -> str:
    """A value of a file as a text for a message. A long text is cut at its end."""
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def check_output_dir(folder: Path) -> None:
    """Raise AdapterError if a folder for a result is in use, StorageError if it cannot be looked at."""
    with files.storage_errors(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise AdapterError(f"{folder} is a file or is not empty: give another --output_dir")


def refuse_pickle(folder: Path) -> None:
    """Raise AdapterError if an adapter has only adapter_model.bin. minilora never loads this file."""
    pickled = folder / "adapter_model.bin"
    if pickled.exists() and not (folder / WEIGHTS).exists():
        raise AdapterError(
            f"{pickled}: this is a pickle. A pickle can run code when it is read, so minilora never loads one. If you "
            f"trust the adapter, load it with PEFT and save it again: save_pretrained writes {WEIGHTS}."
        )


def adapted_layers(folder: Path) -> list[str]:
    """The layers whose tensors are in an adapter's file. Raises AdapterError if the file cannot be read."""
    try:
        header = files.safetensors_header(folder / WEIGHTS, MAX_HEADER_BYTES)
    except ValueError as error:
        raise AdapterError(f"{folder / WEIGHTS}: {error}.") from error
    ending = ".lora_A.weight"
    return [key[len(PREFIX) : -len(ending)] for key in header if key.startswith(PREFIX) and key.endswith(ending)]


def layer_names(folder: Path, targets: Any) -> tuple[str, ...]:
    """The last names of the layers whose tensors are in an adapter's file.

    PEFT matches target_modules (a regular expression, all-linear, endings with dots) against the base's layers, and
    saves the layers that match. So the file itself says which layers they are, and minilora does not run a regular
    expression from a file.
    """
    layers = adapted_layers(folder)
    if isinstance(targets, list):
        fitting = {target: {x for x in layers if x == target or x.endswith(f".{target}")} for target in targets}
        if not all(fitting.values()) or set(layers) != set().union(*fitting.values()):
            raise AdapterError(f"{folder}: target_modules = {shown(targets)} do not match the layers of its {WEIGHTS}.")
    elif re.fullmatch(r"\w+", targets) and targets not in layers:  # a word is a regular expression of one name
        raise AdapterError(
            f"{folder / CONFIG}: target_modules = {shown(targets)} is a text, which PEFT compares with whole names: it "
            f"would find no layer. Write a list: [{json.dumps(targets)}]."
        )
    names = {layer.rpartition(".")[2] for layer in layers}
    if not names:
        raise AdapterError(f"{folder / WEIGHTS}: none of its tensors has a name in PEFT's form ({PREFIX}...).")
    return tuple(sorted(names))


def keys_to_go_on(folder: Path) -> dict[str, Any]:
    """The keys of TrainConfig that a new run takes over from an adapter: its shape, its base, its system prompt.

    Raises AdapterError if minilora does not support the adapter.
    """
    config = read_config(folder)
    prompt = read_metadata(folder).get("system_prompt")
    brought = {"model": config.base_model or None, "system_prompt": prompt}
    return shape_keys(config) | {key: value for key, value in brought.items() if value is not None}


def shape_keys(config: AdapterConfig) -> dict[str, Any]:
    """The keys of TrainConfig that decide the shape and the meaning of an adapter's tensors."""
    return {
        "lora_r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": config.target_modules,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
    }


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def base_of(folder: Path, model_name: str | None = None) -> str:
    """The base of an adapter, as a hub name or a folder: model_name, else the name in its file. Raises AdapterError."""
    config = read_config(folder)
    if name := model_name or config.base_model:
        return name
    raise AdapterError(f"{folder} does not say which base it was trained on: give --model")


def find_base(model_name: str | None, folder: str | Path | None) -> Path:
    """The model folder of a name, or of the base that an adapter's folder names.

    Raises ModelError. If the name comes from the adapter's file, the message says so.
    """
    adapter = Path(os.path.expanduser(folder)) if folder else None
    name = model_name or (base_of(adapter) if adapter else "")
    try:
        return find_model(name)
    except ModelError as error:
        if adapter is None or name not in _named_base(adapter):
            raise
        raise ModelError(f"{error} {adapter / CONFIG} names this base: give its new place as --model.") from error


def _named_base(folder: Path) -> list[str]:
    try:
        return [read_config(folder).base_model]
    except AdapterError:  # a resumed run does not need the adapter that it started from
        return []


def read_metadata(folder: Path) -> dict[str, str]:
    """The metadata of adapter_model.safetensors. minilora writes base_fingerprint, system_prompt, ... there."""
    try:
        metadata = files.safetensors_header(folder / WEIGHTS, MAX_HEADER_BYTES).get("__metadata__") or {}
    except ValueError as error:
        raise AdapterError(f"{folder / WEIGHTS}: {error}.") from error
    if not isinstance(metadata, dict):
        raise AdapterError(f"{folder / WEIGHTS}: its metadata is not an object.")
    return {str(key): str(value) for key, value in metadata.items()}


def load(model: nn.Module, folder: Path, base_fingerprint: str, allow_other_base: bool = False) -> AdapterConfig:
    """Put LoRALinear layers into the base `model` and fill them with the adapter in `folder`, strictly.

    Raises AdapterError that lists all missing and extra tensors and all tensors of a wrong shape. Also raises
    AdapterError if the adapter was trained on another base, unless allow_other_base. The model is unchanged then.
    """
    config, updates = read(model, folder, base_fingerprint, allow_other_base)
    inject(model, config.target_modules, config.rank, config.alpha, config.dropout, config.rslora, dora=config.dora)
    fill(model, updates)
    return config


@torch.no_grad()
def fill(model: nn.Module, updates: Mapping[str, "Update"]) -> None:
    """Copy the values that `read` returned into the LoRALinear layers of a model."""
    for name, layer in lora_layers(model).items():
        update = updates[f"{name}.weight"]
        layer.lora_A.copy_(update.A)
        layer.lora_B.copy_(update.B)
        for key, values in update.own.items():
            getattr(layer, key).copy_(values)


@dataclass(frozen=True)
class Update:
    """An adapter's update of one weight: A (rank, in), B (out, rank) and its variant's own vectors, all in fp32."""

    A: Tensor
    B: Tensor
    scale: float
    variant: LoRA
    own: Mapping[str, Tensor]  # those of `variant.trained`: (out,)

    def merged(self, weight: Tensor) -> Tensor:
        """W0 with this update, in fp32. (out, in)"""
        return self.variant.merged(weight, self.A, self.B, self.scale, self.own)


def read(
    model: nn.Module, folder: Path, base_fingerprint: str, allow_other_base: bool | None = False
) -> tuple[AdapterConfig, dict[str, Update]]:
    """(settings, updates by the weight's name) of an adapter for this base. Changes nothing.

    Other adapters may already be on the base. Raises AdapterError as `load` does.
    """
    config = read_config(folder)
    if head := {"lm_head", "embed_tokens"} & set(config.target_modules):
        raise AdapterError(
            f"{folder / CONFIG}: target_modules names {', '.join(sorted(head))}: adapters on the embedding or the "
            f"output head are not supported here. {MERGE_IN_PEFT}"
        )
    check_base(folder, config, base_fingerprint, allow_other_base)
    linears = {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    shapes = {f"{name}.weight": (linear.out_features, linear.in_features) for name, linear in linears.items()}
    return config, read_updates(folder, config, shapes)


def check_base(folder: Path, config: AdapterConfig, base_fingerprint: str, allow_other_base: bool | None) -> None:
    """Raise AdapterError if the adapter was trained on another base. allow_other_base None: no flag allows this."""
    trained_on = read_metadata(folder).get("base_fingerprint", base_fingerprint)
    if trained_on != base_fingerprint and not allow_other_base:
        way_out = "" if allow_other_base is None else ", or use --allow_other_base to load it anyway"
        raise AdapterError(
            f"{folder} was trained on another base: its fingerprint is {trained_on[:12]}, this model's is "
            f"{base_fingerprint[:12]} (trained on {config.base_model!r}). Give that base as --model{way_out}."
        )


def read_updates(folder: Path, config: AdapterConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Update]:
    """The update of each weight that an adapter changes, by the weight's name. shapes: those of the base's weights

    Raises AdapterError that lists all missing and extra tensors and all tensors of a wrong shape.
    """
    targets = [
        name.removesuffix(".weight")
        for name in shapes
        if name.endswith(".weight") and name.split(".")[-2] in config.target_modules
    ]
    expected: dict[str, tuple[int, ...]] = {}
    for name in targets:
        out_features, in_features = shapes[f"{name}.weight"]
        expected[f"{PREFIX}{name}.lora_A.weight"] = (config.rank, in_features)
        expected[f"{PREFIX}{name}.lora_B.weight"] = (out_features, config.rank)
        expected |= {f"{PREFIX}{name}.{key}": (out_features,) for key in config.variant.trained}
    if not targets:
        raise AdapterError(
            f"{folder / CONFIG}: target_modules {list(config.target_modules)} match nothing in this model"
        )
    named, held = ({name.rpartition(".")[2] for name in names} for names in (targets, adapted_layers(folder)))
    if held and named != held:
        raise AdapterError(
            f"{folder / CONFIG}: target_modules names {', '.join(sorted(named))}, but the tensors of {WEIGHTS} are "
            f"those of {', '.join(sorted(held))}: PEFT would load other layers. Correct target_modules."
        )
    if config.pattern and (lacking := set(targets) - set(adapted_layers(folder))):
        raise AdapterError(
            f"{folder / CONFIG}: target_modules = {config.pattern} leaves out {len(lacking)} of the {len(targets)} "
            f"layers named {', '.join(config.target_modules)}: only adapters on all layers of a name are read. "
            f"{MERGE_IN_PEFT}"
        )
    try:
        loaded = files.read_tensors(folder / WEIGHTS, expected)
    except ValueError as error:
        raise AdapterError(f"{folder / WEIGHTS}: {error}") from error
    if broken := [name for name, tensor in loaded.items() if not torch.isfinite(tensor).all()]:
        raise AdapterError(f"{folder / WEIGHTS}: not finite: {len(broken)} of its tensors, the first {broken[0]}")
    loaded = {name.removeprefix(PREFIX): tensor.float() for name, tensor in loaded.items()}
    return {
        f"{name}.weight": Update(
            loaded[f"{name}.lora_A.weight"],
            loaded[f"{name}.lora_B.weight"],
            config.scale,
            config.variant,
            {key: loaded[f"{name}.{key}"] for key in config.variant.trained},
        )
        for name in targets
    }


def save_folder(
    folder: Path,
    model: Any,
    tokenizer: Any,
    config: AdapterConfig,
    metadata: dict[str, str],
    base_folder: Path | None = None,
) -> None:
    """Write an adapter folder. A new folder appears complete. In an existing one the weights are replaced atomically.

    base_folder: the folder of the tokenizer's files; None: the folder that the tokenizer was loaded from
    """
    with files.storage_errors(folder):
        there = os.path.lexists(folder)
    if there:
        save(folder, model, config, metadata)
        return
    with files.new_folder(folder) as aside:
        save_tokenizer(aside, tokenizer, base_folder)
        write_generation(aside, model.generation_config.to_diff_dict(), end_tokens(tokenizer))
        save(aside, model, config, metadata)
