"""The identity of a base model: a hash of its shape and of sampled weights."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES_PER_TENSOR = 64


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base's own tensors under their checkpoint names, whatever is wrapped around its layers."""
    for name, tensor in model.state_dict().items():
        segments = name.split(".")
        if not any(segment.startswith("lora_") for segment in segments):
            yield ".".join(segment for segment in segments if segment != "base_layer"), tensor


def fingerprint(model: nn.Module) -> str:
    """The identity of a loaded base, whatever is wrapped around its layers, in however few bits they are held."""
    if known := getattr(model, "base_fingerprint", None):
        return known
    return fingerprint_of(model.config.to_dict(), base_tensors(model))  # type: ignore[operator, union-attr]


def fingerprint_of(config: dict[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The identity of a base: sha256 over its shape in words, tensor names and shapes, and sampled weights.

    Samples are rounded to bfloat16, so that a base in fp32 and the same base in bf16 are one.
    """
    keys = [*("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")]
    keys += ["num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "hidden_act"]
    digest = hashlib.sha256(json.dumps({key: config.get(key) for key in keys}, sort_keys=True).encode())
    parts = []
    for name, tensor in tensors:
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue  # some files hold the tied copy, some do not
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, len(flat) - 1, min(len(flat), SAMPLES_PER_TENSOR), dtype=torch.float64).long()
        sample = flat[places.to(flat.device)].to(torch.bfloat16).cpu()
        parts.append(f"{name} {tuple(tensor.shape)}".encode() + sample.view(torch.int16).numpy().tobytes())
    for part in sorted(parts):
        digest.update(part)
    return digest.hexdigest()
