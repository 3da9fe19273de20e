"""What a run leaves behind: an adapter or a model folder, reloaded from the disk and compared before it is done."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora import adapter, files
from minilora.data import ChatMarkup, Turn
from minilora.dist import collect, own_part, whole
from minilora.errors import AdapterError, DivergedError
from minilora.generate import Sampling, Speaker, answer, probe_logits
from minilora.model import fingerprint, load_model

SAMPLE_PROMPTS = ("你是谁？", "Who made you?", "“大”的反义词是什么？")
SAMPLE_TOKENS = 48
PROBE_TOKENS = 32


def save_adapter(
    folder: Path, model: Any, tokenizer: Any, config: adapter.AdapterConfig, metadata: dict[str, str]
) -> None:
    """An adapter folder: complete at once when it is new, its weights exchanged at once when it is not."""
    with files.storage_errors(folder):
        there = os.path.lexists(folder)
    if there:
        adapter.save(folder, model, config, metadata)
        return
    with files.new_folder(folder) as aside:
        tokenizer.save_pretrained(aside)
        model.generation_config.save_pretrained(aside)
        adapter.save(aside, model, config, metadata)


def save_model(folder: Path, model: Any, tokenizer: Any, dtype: torch.dtype) -> None:
    """A Hugging Face model folder with the weights rounded once to dtype. Raises DivergedError for non-finite ones."""
    weights = _weights(model)
    if broken := [name for name, tensor in weights.items() if not torch.isfinite(own_part(tensor)).all()]:
        raise DivergedError(
            f"the model is not finite ({len(broken)} of its tensors, the first {broken[0]}): not written to {folder}"
        )
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    with files.new_folder(folder) as aside:
        tokenizer.save_pretrained(aside)
        config.save_pretrained(aside)
        model.generation_config.save_pretrained(aside)
        specs = {name: (dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
        chunks = files.lazy_safetensors_chunks(specs, lambda name: whole(weights[name]).to(dtype), {"format": "pt"})
        files.write_file(aside / "model.safetensors", chunks)


def take_part(model: Any) -> None:
    """What the other processes do while one writes a model: give it their shards, in the order of `save_model`."""
    collect(_weights(model).values())


def _weights(model: Any) -> dict[str, torch.Tensor]:
    tied = model.config.tie_word_embeddings
    return {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def probe(tokenizer_markup: ChatMarkup, system_prompt: str) -> list[int]:
    """The tokens on which a saved result is compared with the live one."""
    return tokenizer_markup.prompt_ids([Turn("user", SAMPLE_PROMPTS[0])], system_prompt)[:PROBE_TOKENS]


def sample_answers(speaker: Speaker) -> list[str]:
    """Greedy answers to SAMPLE_PROMPTS."""
    return answer(speaker, [[Turn("user", text)] for text in SAMPLE_PROMPTS], Sampling(max_new_tokens=SAMPLE_TOKENS))


def short_answers(speaker: Speaker, conversations: Sequence[Sequence[Turn]]) -> list[str]:
    """The beginnings of the greedy answers to a few conversations, each of which leaves room for a token."""
    longest = max(len(speaker.markup.prompt_ids(turns, speaker.system_prompt)) for turns in conversations)
    room = speaker.model.config.max_position_embeddings - longest
    texts = answer(speaker, conversations, Sampling(max_new_tokens=min(SAMPLE_TOKENS, room)))
    return [text.rstrip("\ufffd") for text in texts]  # cut between the bytes of a character


def reload(
    base_folder: Path, result: Path, method: str, dtype: torch.dtype, device: torch.device, bits: int = 0
) -> tuple[Any, Any]:
    """(the base as it lies on the disk, a function that turns it into the saved result and returns that)."""
    base = load_model(base_folder, dtype, device, bits)

    def apply() -> nn.Module:
        if method == "full":
            return load_model(result, dtype, device)
        adapter.load(base, result, fingerprint(base))
        return base.eval()

    return base, apply


def compare(reference: torch.Tensor, reloaded: nn.Module, ids: list[int], result: Path) -> float:
    """Largest absolute difference of logits between the live model and the reloaded one.

    Raises AdapterError when they are not the same function: the file is then not what was trained; DivergedError when
    the live model's are not finite.
    """
    if not torch.isfinite(reference).all():
        raise DivergedError(
            f"{result}: what was trained answers with numbers that are not finite. Start anew with "
            "a lower --learning_rate or --weight_decay."
        )
    logits = probe_logits(reloaded, ids)
    difference = float((logits - reference).abs().max())
    allowed = 1e-5 if reference.dtype == torch.float32 and next(reloaded.parameters()).dtype == torch.float32 else 1e-2
    if not difference <= allowed * max(1.0, float(reference.abs().max())):
        raise AdapterError(
            f"{result}: reloaded, its logits differ by {difference:.3g} from those of the trained model."
        )
    return difference
