"""Writes an adapter for other programs, and gives the commands to use it there."""

import json
import re
import shlex
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from minilora.adapters import format as adapter_format
from minilora.adapters.format import CONFIG, PREFIX, WEIGHTS, AdapterConfig
from minilora.errors import AdapterError
from minilora.models.trained import GENERATION, end_tokens, read_generation, write_generation
from minilora.utils import files

COPIED = (".json", ".jinja", ".txt", ".model", ".md")  # tokenizer, chat template
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values of vLLM's --max-lora-rank; the default is 16


def export_portable(folder: Path, output_folder: Path) -> AdapterConfig:
    """Write the same adapter with B multiplied by the scale. Then lora_alpha = r, use_rslora is false, the scale is 1.

    It is for programs that read only alpha / r, or no scale. The base is not needed. Returns the source's settings.
    Raises AdapterError if the source is not a whole LoRA adapter, or if output_folder is not empty.
    """
    config = adapter_format.read_config(folder)
    if config.dora:
        raise AdapterError(
            f"{folder}: use_dora = True: programs that read only alpha and r do not read DoRA's magnitudes. Merge the "
            "adapter into its base: python -m minilora merge"
        )
    adapter_format.check_output_dir(output_folder)
    updates = adapter_format.read_updates(folder, config, _weight_shapes(folder, config))
    named: dict[str, Tensor] = {}
    for name, update in updates.items():
        layer = name.removesuffix(".weight")
        named[f"{PREFIX}{layer}.lora_A.weight"] = update.A
        named[f"{PREFIX}{layer}.lora_B.weight"] = update.scale * update.B
    metadata = {key: value for key, value in adapter_format.read_metadata(folder).items() if key != "format"}
    with files.new_folder(output_folder) as aside:
        for file in folder.iterdir():
            if file.is_file() and file.suffix in COPIED and file.name not in (CONFIG, GENERATION):
                shutil.copyfile(file, aside / file.name)
        write_generation(aside, read_generation(folder), _end_tokens(folder))
        adapter_format.write(aside, named, replace(config, alpha=config.rank, rslora=False), metadata)
    return config


def _end_tokens(folder: Path) -> list[int]:
    """The end tokens of the tokenizer beside an adapter. Empty if there is no readable tokenizer."""
    with suppress(Exception):  # the tokenizers library raises nothing more precise
        return end_tokens(Tokenizer.from_file(str(folder / "tokenizer.json")))
    return []


def _weight_shapes(folder: Path, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the base's weights that follow from the adapter's tensors. `read_updates` checks the rest."""
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


def how_to_use(folder: Path, config: AdapterConfig, system_prompt: str | None) -> list[tuple[str, str]]:
    """(program, its command or settings) for each program that uses adapters: greedy, with the trained system prompt.

    system_prompt: None if the adapter does not give it

    Sources:
    vLLM: vllm/lora/peft_helper.py (no DoRA, no modules_to_save), vllm/config (--generation-config takes a folder)
    llama.cpp: convert_lora_to_gguf.py (reads lora_alpha and r, not use_rslora), common/arg.cpp (-sys, --temp)
    Ollama: docs/modelfile.mdx, ADAPTER (safetensors of Llama, Mistral and Gemma only; default repeat_penalty 1.1)
    """
    base = shlex.quote(config.base_model or "BASE")
    where = shlex.quote(str(folder))
    rank = next((rank for rank in VLLM_RANKS if rank >= config.rank), config.rank)
    larger = f" --max-lora-rank {rank}" if rank > 16 else ""
    serve = f"vllm serve {base} --enable-lora{larger} --lora-modules NAME={where}"
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    body = {"model": "NAME", "temperature": 0, "messages": [*messages, {"role": "user", "content": "QUESTION"}]}
    request = shlex.quote(json.dumps(body, ensure_ascii=False))
    # llama.cpp's own chatml template inserts no system turn. The model's template may insert one.
    turn = f" -sys {shlex.quote(system_prompt)}" if system_prompt else " --chat-template chatml" * (system_prompt == "")
    lines = [
        ("vLLM", f"{serve} --generation-config {where} --override-generation-config '{{\"temperature\": 0}}'"),
        ("", f"then curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d {request}"),
        ("llama.cpp", f"python convert_lora_to_gguf.py {where} --base FOLDER_OF_BASE --outfile adapter.gguf"),
        ("", f"then llama-cli -m BASE.gguf --lora adapter.gguf --temp 0 --repeat-penalty 1{turn}"),
        ("Ollama", "reads no safetensors adapters of Qwen. Convert the adapter as for llama.cpp. The Modelfile is:"),
        *(("", line) for line in _modelfile(system_prompt)),
    ]
    inserted = "if a request has no system turn, a server inserts the one of its chat template"
    inserted += " (Qwen2, Qwen2.5: a text such as 'You are a helpful assistant')"
    if system_prompt:
        lines.append(("system", f"every program needs the system prompt of the training: {system_prompt}"))
        lines.append(("", f"without it the answers change: {inserted}"))
    elif system_prompt == "":
        lines.append(("no system", f"it was trained without a system turn, but {inserted}: use another template"))
    return lines


def _modelfile(system_prompt: str | None) -> list[str]:
    """The lines of Ollama's Modelfile."""
    quotes = '"""' if system_prompt and ("\n" in system_prompt or '"' in system_prompt) else '"'
    return [
        "FROM BASE.gguf",
        "ADAPTER adapter.gguf",
        *([f"SYSTEM {quotes}{system_prompt}{quotes}"] if system_prompt else []),
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        "PARAMETER stop <|im_end|>",
    ]
