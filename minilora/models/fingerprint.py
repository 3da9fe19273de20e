"""Computes the identity of a base model: a hash of its shape and of sampled weights."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES_PER_TENSOR = 64
SHAPE_KEYS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "hidden_act"),
)
SCALED_FROM_LENGTH = ("llama3", "yarn", "longrope")  # types that need the length of the model's pretraining


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the base under their checkpoint names, without adapters around its layers."""
    for name, tensor in model.state_dict().items():
        segments = name.split(".")
        if not any(segment.startswith("lora_") for segment in segments):
            yield ".".join(segment for segment in segments if segment != "base_layer"), tensor


def fingerprint(model: nn.Module) -> str:
    """The identity of a loaded base. Adapters around its layers, or 4 or 8 bits, do not change it.

    A model from `load_model` keeps its config.json as it was read. For another model, transformers' config is used.
    """
    if known := getattr(model, "base_fingerprint", None):
        return known
    config = getattr(model, "config_json", None) or model.config.to_dict()  # type: ignore[operator, union-attr]
    return fingerprint_of(config, base_tensors(model))


def shape_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config.json that decides the function of the model. It is the same for all forms of one model.

    config: the content of the file (rope_theta and rope_scaling, or rope_parameters), or a config that any version of
    transformers has normalised. The result is the form of transformers 5.17 to 5.23, which minilora 0.1 hashed. It must
    never change.
    """
    return {key: config.get(key) for key in SHAPE_KEYS} | {"rope_parameters": rope_parameters(config)}


def completed(config_json: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the defaults of transformers for missing keys, but without defaults for rotary settings."""
    defaults = {key: config.get(key) for key in SHAPE_KEYS if key != "rope_parameters"}
    return defaults | {key: value for key, value in config_json.items() if value is not None}


def rope_parameters(config: Mapping[str, Any]) -> Any:
    """The settings of the rotary embedding in the form of transformers 5, from any form of config.json."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        return given  # settings by layer type: minilora trains no such model
    rope = {"rope_theta": config.get("rope_theta", 10_000.0)} | dict(given)
    rope.setdefault("rope_type", rope.get("type", "default"))
    if (share := config.get("partial_rotary_factor")) is not None:
        rope.setdefault("partial_rotary_factor", share)
    if rope["rope_type"] in SCALED_FROM_LENGTH:
        rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return rope


def fingerprint_of(config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The identity of a base: sha256 over `shape_words`, tensor names and shapes, and sampled weights.

    Samples are rounded to bfloat16, so that the same base in fp32 and in bf16 has the same identity.
    """
    words = shape_words(config)
    digest = hashlib.sha256(json.dumps(words, sort_keys=True).encode())
    parts = []
    for name, tensor in tensors:
        if name == "lm_head.weight" and words["tie_word_embeddings"]:
            continue  # some files contain the tied copy, others do not
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, len(flat) - 1, min(len(flat), SAMPLES_PER_TENSOR), dtype=torch.float64).long()
        sample = flat[places.to(flat.device)].to(torch.bfloat16).cpu()
        parts.append(f"{name} {tuple(tensor.shape)}".encode() + sample.view(torch.int16).numpy().tobytes())
    for part in sorted(parts):
        digest.update(part)
    return digest.hexdigest()
