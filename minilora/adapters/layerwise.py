"""Computes the logits of a model folder with one layer in memory at a time, for checks that need little memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from minilora.adapters.format import AdapterConfig, Update, fill
from minilora.lora import inject
from minilora.models.load import empty_model, num_layers, weight_files

HEAD_ROWS = 8192  # rows of the head that are in fp32 at a time


def read_tensor(file: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file. It has its own memory map, which is freed together with the tensor."""
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def homes(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a model, by the tensor's name."""
    found: dict[str, Path] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


@torch.no_grad()
def layerwise_logits(
    folder: Path, ids: Sequence[int], config: AdapterConfig | None = None, updates: Mapping[str, Update] | None = None
) -> Tensor:
    """The logits in fp32 of a base, with or without an adapter. It is read layer by layer. (tokens, vocabulary)

    The logits equal those of `probe_logits`. config, updates: the adapter's, from `format.read_updates`
    """
    body = empty_model(folder, torch.float32, num_layers(folder)).model.eval()
    body.rotary_emb = type(body.rotary_emb)(config=body.config)  # it has no weights, so no hook fills it
    files = homes(folder)
    layers = {f"model.layers.{i}": layer for i, layer in enumerate(body.layers)}
    for name, part in {**layers, "model.norm": body.norm}.items():
        part.register_forward_pre_hook(_loader(name, files, config, updates or {}))
        part.register_forward_hook(lambda part, *_: part.to("meta") and None)  # frees the weights of the part
    embedding = read_tensor(files["model.embed_tokens.weight"], "model.embed_tokens.weight")
    embedded = embedding[torch.tensor([list(ids)])].float()  # (1, tokens, hidden)
    del embedding  # the largest tensors are never whole in fp32
    hidden = body(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]
    head = "lm_head.weight" if "lm_head.weight" in files else "model.embed_tokens.weight"  # tied
    parts = read_tensor(files[head], head).split(HEAD_ROWS)
    return torch.cat([hidden @ part.float().T for part in parts], -1)


def _loader(name: str, files: Mapping[str, Path], config: AdapterConfig | None, updates: Mapping[str, Update]) -> Any:
    own = {key.removeprefix(f"{name}."): update for key, update in updates.items() if key.startswith(f"{name}.")}

    def load(part: nn.Module, _: Any) -> None:
        names = {key: f"{name}.{key}" for key in part.state_dict()}
        part.load_state_dict({key: read_tensor(files[full], full).float() for key, full in names.items()}, assign=True)
        if config is not None and own:
            inject(part, config.target_modules, config.rank, config.alpha, rslora=config.rslora, dora=config.dora)
            fill(part, own)
            part.eval()

    return load
