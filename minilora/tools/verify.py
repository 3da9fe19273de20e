"""`minilora verify` checks that an adapter is complete, finite, of its base, and equivalent when merged."""

from dataclasses import dataclass
from pathlib import Path

import torch

from minilora.adapters import format as adapter_format
from minilora.adapters.format import AdapterConfig
from minilora.errors import AdapterError
from minilora.inference.generate import load_chat_model
from minilora.lora import disabled, lora_layers
from minilora.models.probe import probe, probe_logits

TOLERANCE = 1e-4  # of the largest logit, in fp32


@dataclass(frozen=True)
class Verdict:
    """The result of `verify`. same_base is False if the adapter does not record the fingerprint of its base."""

    config: AdapterConfig
    num_layers: int
    same_base: bool
    largest_effect: float  # of the adapter on a logit of the base, in fp32
    max_logit_difference: float  # between base + adapter and the merged weights, in fp32

    @property
    def changes_nothing(self) -> bool:
        """Whether the adapter has no effect: B of an adapter that was never trained is zero."""
        return self.largest_effect == 0


def verify(folder: Path, model_name: str | None = None, device: str = "auto") -> Verdict:
    """Load an adapter strictly and compare its logits with those of the weights W0 + scale * B A, merged in memory.

    Raises AdapterError if it does not fit its base, is not finite, or gives other logits when merged.
    """
    config = adapter_format.read_config(folder)
    stored = adapter_format.read_metadata(folder).get("base_fingerprint")  # `load` compares it
    chat_model = load_chat_model(model_name, str(folder), "float32", device)
    ids, layers = probe(chat_model.markup, chat_model.system_prompt), lora_layers(chat_model.model)
    with disabled(chat_model.model):
        base = probe_logits(chat_model.model, ids)  # (tokens, vocabulary)
    unmerged = probe_logits(chat_model.model, ids)
    with torch.no_grad():
        for layer in layers.values():
            layer.base_layer.weight += layer.delta()
            layer.enabled = False
    difference = float((probe_logits(chat_model.model, ids) - unmerged).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(unmerged.abs().max())):
        raise AdapterError(
            f"{folder}: merged into the weights, its logits differ by {difference:.3g} from base + adapter"
        )
    return Verdict(config, len(layers), stored is not None, float((unmerged - base).abs().max()), difference)
