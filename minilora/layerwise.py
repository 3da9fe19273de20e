"""Logits of a model folder with one layer in memory at a time: for a check that must not need the memory of a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from minilora.adapter import AdapterConfig, Update, fill
from minilora.lora import inject
from minilora.model import empty_model, num_layers, weight_files


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a safetensors file, in a mapping of its own, which goes when the tensor goes."""
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def homes(folder: Path) -> dict[str, Path]:
    """The file that each of a model's tensors lies in, by the tensor's name."""
    found: dict[str, Path] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


@torch.no_grad()
def layerwise_logits(
    folder: Path, ids: Sequence[int], config: AdapterConfig | None = None, updates: Mapping[str, Update] | None = None
) -> Tensor:
    """Logits in fp32, as `probe_logits` has them, of a base (and an adapter on it) read layer by layer.

    config, updates: the adapter's, as `adapter.read_updates` gives them. (tokens, vocabulary)
    """
    model = empty_model(folder, torch.float32, num_layers(folder))
    body = model.model
    body.rotary_emb = type(body.rotary_emb)(config=model.config)  # holds no weights: nothing would fill it
    files = homes(folder)
    parts: dict[str, nn.Module] = {f"model.layers.{i}": layer for i, layer in enumerate(body.layers)}
    parts |= {"model.embed_tokens": body.embed_tokens, "model.norm": body.norm, "lm_head": model.lm_head}
    for name, part in parts.items():
        part.register_forward_pre_hook(_loader(name, files, config, updates or {}))
        part.register_forward_hook(lambda part, *_: part.to("meta") and None)  # what it held is given free
    return model.eval()(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def _loader(name: str, files: Mapping[str, Path], config: AdapterConfig | None, updates: Mapping[str, Update]) -> Any:
    own = {key.removeprefix(f"{name}."): update for key, update in updates.items() if key.startswith(f"{name}.")}

    def load(part: nn.Module, _: Any) -> None:
        names = {key: f"{name}.{key}" for key in part.state_dict()}
        if name == "lm_head" and "lm_head.weight" not in files:  # tied
            names = {"weight": "model.embed_tokens.weight"}
        part.load_state_dict({key: read_tensor(files[full], full).float() for key, full in names.items()}, assign=True)
        if config is not None and own:
            inject(part, config.target_modules, config.rank, config.alpha, rslora=config.rslora, dora=config.dora)
            fill(part, own)
            part.eval()

    return load
