"""An adapter for other programs; and the check that an adapter is what it says."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from minilora.adapters import format as adapter_format
from minilora.adapters.format import CONFIG, PREFIX, WEIGHTS, AdapterConfig
from minilora.errors import AdapterError
from minilora.utils import files

COPIED = (".json", ".jinja", ".txt", ".model", ".md")  # tokenizer, chat template, generation config
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank can be; its default is 16


def export_portable(folder: Path, output_folder: Path) -> AdapterConfig:
    """Write the same adapter with its scale folded into B: lora_alpha = r, use_rslora false, so that the scale is 1.

    For readers that know only alpha / r, or no scale at all. The base is not needed. Returns the source's settings.
    Raises AdapterError when it is not a whole LoRA adapter, or when output_folder already holds something.
    """
    config = adapter_format.read_config(folder)
    if config.dora:
        raise AdapterError(
            f"{folder}: use_dora = True: a program that knows alpha / r at most knows no DoRA, whose magnitudes only a "
            "merged weight can hold: python -m minilora merge"
        )
    if output_folder.exists() and (not output_folder.is_dir() or any(output_folder.iterdir())):
        raise AdapterError(f"{output_folder} is a file, or not empty: give another --output_dir")
    updates = adapter_format.read_updates(folder, config, _weight_shapes(folder, config))
    named: dict[str, Tensor] = {}
    for name, update in updates.items():
        layer = name.removesuffix(".weight")
        named[f"{PREFIX}{layer}.lora_A.weight"] = update.A
        named[f"{PREFIX}{layer}.lora_B.weight"] = update.scale * update.B
    metadata = {key: value for key, value in adapter_format.read_metadata(folder).items() if key != "format"}
    with files.new_folder(output_folder) as aside:
        for file in folder.iterdir():
            if file.is_file() and file.suffix in COPIED and file.name != CONFIG:
                shutil.copyfile(file, aside / file.name)
        adapter_format.write(aside, named, replace(config, alpha=config.rank, rslora=False), metadata)
    return config


def _weight_shapes(folder: Path, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the base's weights as the adapter's own tensors have them; `read_updates` checks the rest."""
    shapes: dict[str, list[int]] = {}
    try:
        header = files.safetensors_header(folder / WEIGHTS, adapter_format.MAX_HEADER_BYTES)
        for name, entry in header.items():
            if found := re.fullmatch(rf"{re.escape(PREFIX)}(.+\.\w+)\.lora_([AB])\.weight", name):
                rows, columns = (int(size) for size in entry["shape"])
                shapes.setdefault(found[1], [0, 0])[found[2] == "A"] = columns if found[2] == "A" else rows
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"{folder / WEIGHTS}: {error}") from error
    return {f"{name}.weight": (shape[0], shape[1]) for name, shape in shapes.items()}


def how_to_use(folder: Path, config: AdapterConfig, system_prompt: str) -> list[tuple[str, str]]:
    """(program, what it takes) for the programs that people put adapters into.

    vLLM: vllm/lora/peft_helper.py (no DoRA, no modules_to_save); llama.cpp: convert_lora_to_gguf.py (reads lora_alpha
    and r, not use_rslora); Ollama: docs/modelfile.mdx, ADAPTER (safetensors of Llama, Mistral and Gemma only).
    """
    base = config.base_model or "BASE"
    rank = next((rank for rank in VLLM_RANKS if rank >= config.rank), config.rank)
    larger = f" --max-lora-rank {rank}" if rank > 16 else ""
    lines = [
        ("vLLM", f"vllm serve {base} --enable-lora{larger} --lora-modules NAME={folder}"),
        ("llama.cpp", f"python convert_lora_to_gguf.py {folder} --base FOLDER_OF_BASE --outfile adapter.gguf"),
        ("", "then llama-cli -m BASE.gguf --lora adapter.gguf"),
        ("Ollama", "takes no safetensors adapter of a Qwen; in its Modelfile: FROM BASE.gguf, ADAPTER adapter.gguf"),
    ]
    if system_prompt:
        lines.append(("system", f"none of them knows the system prompt it was trained with; give it: {system_prompt}"))
    return lines
