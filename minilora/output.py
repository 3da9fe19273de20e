"""What a run leaves behind: an adapter or a model folder, reloaded from the disk and compared before it is done."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora import adapter, files
from minilora.data import ChatMarkup, Turn
from minilora.errors import AdapterError, DivergedError
from minilora.generate import Sampling, Speaker, answer, probe_logits
from minilora.model import fingerprint, load_model

SAMPLE_PROMPTS = ("你是谁？", "Who made you?", "“大”的反义词是什么？")
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
    tied = model.config.tie_word_embeddings
    weights = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    if broken := [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]:
        raise DivergedError(
            f"the model is not finite ({broken[0]} and {len(broken) - 1} more): not written to {folder}"
        )
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    with files.new_folder(folder) as aside:
        tokenizer.save_pretrained(aside)
        config.save_pretrained(aside)
        model.generation_config.save_pretrained(aside)
        rounded = {name: tensor.detach().to(dtype) for name, tensor in weights.items()}
        files.write_file(aside / "model.safetensors", files.safetensors_chunks(rounded, {"format": "pt"}))


def probe(tokenizer_markup: ChatMarkup, system_prompt: str) -> list[int]:
    """The tokens on which a saved result is compared with the live one."""
    return tokenizer_markup.prompt_ids([Turn("user", SAMPLE_PROMPTS[0])], system_prompt)[:PROBE_TOKENS]


def sample_answers(speaker: Speaker) -> list[str]:
    """Greedy answers to SAMPLE_PROMPTS."""
    return answer(speaker, [[Turn("user", text)] for text in SAMPLE_PROMPTS], Sampling(max_new_tokens=48))


def reload(base_folder: Path, result: Path, method: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """(the base as it lies on the disk, a function that turns it into the saved result and returns that)."""
    base = load_model(base_folder, dtype, device)

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
