"""Merges an adapter into its base: W0 + scale * B A (DoRA: rescaled) in fp32, rounded once, written file by file."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from minilora.adapters import format as adapter_format
from minilora.adapters.layerwise import homes, layerwise_logits, read_tensor
from minilora.data.markup import ChatMarkup
from minilora.errors import AdapterError, ModelError
from minilora.models.load import folder_fingerprint, load_tokenizer, weight_files
from minilora.models.probe import probe
from minilora.models.trained import (
    GENERATION,
    RECORD,
    TEMPLATES,
    adapter_system_prompt,
    end_tokens,
    model_config,
    read_generation,
    write_generation,
    write_record,
)
from minilora.utils import files

DTYPES_BY_NAME = {name: dtype for dtype, name in files.SAFETENSORS_DTYPES.items()}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COPIED = (".json", ".jinja", ".txt", ".model")  # tokenizer, chat template and index of the base
NOT_COPIED = (GENERATION, RECORD, adapter_format.CONFIG)  # these are rewritten, or belong to an adapter beside the base
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Agreement:
    """How closely the merged model agrees with base plus adapter over the positions of the probe."""

    max_logit_difference: float
    top1_share: float


def merge(
    adapter_folder: Path,
    output_folder: Path,
    model_name: str | None = None,
    dtype: str = "auto",
    allow_other_base: bool = False,
) -> Agreement:
    """Write a Hugging Face folder of base plus adapter. Only one tensor is in memory at a time.

    The base's files are copied byte for byte, except for what the adapter changes: the weights, the end tokens and the
    system prompt. If config.json has only the key names of transformers 5, those of transformers 4 are added.

    dtype: the type of the floating-point weights; auto keeps the type of each tensor
    Raises AdapterError if the adapter does not fit the base, or if output_folder is not empty.
    """
    config = adapter_format.read_config(adapter_folder)
    base = adapter_format.find_base(model_name, adapter_folder)
    adapter_format.check_output_dir(output_folder)
    try:
        base_config = files.read_json(base / "config.json")
    except ValueError as error:
        raise ModelError(f"{base / 'config.json'}: {error}.") from error
    if missing := [file for file in weight_files(base) if not file.is_file()]:
        raise ModelError(f"{missing[0]} is missing: {base} has no weights to merge into.")
    if "quantization_config" in base_config:
        raise AdapterError(f"{base} is quantised. Merge into the original model instead: --model NAME")
    adapter_format.check_base(adapter_folder, config, folder_fingerprint(base, _all_tensors(base)), allow_other_base)
    updates = adapter_format.read_updates(adapter_folder, config, _shapes(base))
    tokenizer = load_tokenizer(base)
    prompt = adapter_system_prompt(adapter_format.read_metadata(adapter_folder).get("system_prompt"), tokenizer)
    with files.new_folder(output_folder) as aside:
        for file in base.iterdir():
            if file.is_file() and file.suffix in COPIED and file.name not in NOT_COPIED:
                shutil.copyfile(file, aside / file.name)
        if (template := adapter_folder / TEMPLATES[0]).is_file() and template.read_text("utf-8") != _template(base):
            shutil.copyfile(template, aside / template.name)
        merged_config = model_config(base_config, tokenizer, None if dtype == "auto" else dtype)
        if merged_config != base_config:
            files.write_file(aside / "config.json", files.json_chunks(merged_config))
        write_generation(aside, read_generation(base), end_tokens(tokenizer))
        write_record(aside, prompt)
        sizes = [
            _merge_shard(shard, aside / shard.name, updates, None if dtype == "auto" else DTYPES[dtype])
            for shard in weight_files(base)
        ]
        if dtype != "auto" and (aside / INDEX).is_file():
            index = files.read_json(aside / INDEX)
            files.write_file(aside / INDEX, files.json_chunks(index | {"metadata": {"total_size": sum(sizes)}}))
    return _agreement(base, tokenizer, config, updates, output_folder, prompt)


def _template(base: Path) -> Any:
    """The chat template of a model folder, from its template file or from tokenizer_config.json."""
    if (base / TEMPLATES[0]).is_file():
        return (base / TEMPLATES[0]).read_text("utf-8")
    try:
        return files.read_json(base / "tokenizer_config.json").get("chat_template")
    except ValueError:
        return None


def _merge_shard(
    source: Path, target: Path, updates: dict[str, adapter_format.Update], dtype: torch.dtype | None
) -> int:
    """Write the merged tensors of the file `source` to the file `target`. Returns their size in bytes."""
    with safe_open(source, framework="pt") as file:

        def merged(name: str) -> Tensor:
            tensor = read_tensor(source, name)
            if name in updates:
                tensor = updates[name].merged(tensor)
            return tensor.to(specs[name][0])

        specs = {}
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            own = DTYPES_BY_NAME[part.get_dtype()]
            specs[name] = (dtype if dtype and own.is_floating_point else own, tuple(part.get_shape()))
        files.write_file(target, files.lazy_safetensors_chunks(specs, merged, {"format": "pt"}))
        return sum(kind.itemsize * math.prod(shape) for kind, shape in specs.values())


def _all_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    return ((name, read_tensor(path, name)) for name, path in homes(folder).items())


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def _agreement(
    base: Path,
    tokenizer: Any,
    config: adapter_format.AdapterConfig,
    updates: dict[str, adapter_format.Update],
    merged_folder: Path,
    system_prompt: str,
) -> Agreement:
    """Compare both models in fp32, with one layer in memory at a time."""
    ids = probe(ChatMarkup(tokenizer), system_prompt)
    expected = layerwise_logits(base, ids, config, updates)
    logits = layerwise_logits(merged_folder, ids)
    same = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
    return Agreement(float((logits - expected).abs().max()), float(same))
