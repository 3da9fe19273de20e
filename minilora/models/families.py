"""The table of model families: what each `model_type` of a config.json is to the decoder."""

from collections.abc import Mapping
from typing import Any

import torch

from minilora.config import TrainConfig
from minilora.decoder import Decoder, Family, once, recomputed
from minilora.errors import UnsupportedModelError
from minilora.kernels import Policy, compiled, eager

FAMILIES: Mapping[str, Family] = {
    "qwen2": Family(),  # and Qwen2.5
    "qwen3": Family(qk_norm=True),
    "llama": Family(),
    "mistral": Family(),
}
NAMES = "Qwen2, Qwen2.5 and Qwen3, and Llama and Mistral of the same shape"


def refuse_unknown_type(kind: str, model_type: Any) -> None:
    """Raise UnsupportedModelError for a model_type that is in no row of FAMILIES. kind: how the message names it"""
    if model_type not in FAMILIES:
        raise UnsupportedModelError(f"{kind} is not supported: minilora trains {NAMES}. Give another --model.")


def family_of(config: Any) -> Family:
    """The family of a model by its config. Raises UnsupportedModelError if minilora cannot train it exactly."""
    kind = f"{config.name_or_path}: " * bool(config.name_or_path) + f"model type {config.model_type}"
    if getattr(config, "quantization_config", None):
        raise UnsupportedModelError(
            f"{config.name_or_path}: its weights are quantised. Give the original model as --model, with "
            "--load_in_4bit."
        )
    refuse_unknown_type(kind, config.model_type)
    if others := set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        raise UnsupportedModelError(
            f"{kind}: layers of type {', '.join(sorted(others))} are not supported: minilora trains only attention to "
            "all earlier tokens. Give another --model."
        )
    if window := getattr(config, "sliding_window", None):
        raise UnsupportedModelError(
            f"{kind}: its sliding_window of {window:,} tokens is not supported: minilora trains only attention to "
            "all earlier tokens. Give another --model."
        )
    if getattr(config, "attention_dropout", 0.0):
        raise UnsupportedModelError(f"{kind}: attention_dropout is set; it is not supported. Give another --model.")
    if (activation := getattr(config, "hidden_act", "silu")) not in ("silu", "swish"):
        raise UnsupportedModelError(
            f"{kind}: hidden_act = {activation!r} is not supported: only silu is. Give another --model."
        )
    return FAMILIES[config.model_type]


def decoder_of(
    model: Any,
    dtype: torch.dtype,
    device_type: str,
    config: TrainConfig | None = None,
    checkpointing: bool = False,
) -> Decoder:
    """The training forward of a model of one of FAMILIES.

    dtype: of the matrix products; device_type: cpu | cuda
    config: of a run, for its noise and compiled kernels; None for evaluation alone
    checkpointing: compute activations again in the backward pass
    """
    return Decoder(
        model,
        family_of(model.config),
        Policy(device_type, compiled if config is not None and config.torch_compile else eager),
        run_layer=recomputed() if checkpointing else once,
        noise_alpha=0.0 if config is None else config.neftune_noise_alpha,
        dtype=dtype,
    )
