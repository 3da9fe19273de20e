"""An adapter folded into its base: W0 + scale * B A (DoRA: rescaled) in fp32, rounded once, written shard by shard."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from minilora.adapters import format as adapter_format
from minilora.adapters.layerwise import homes, layerwise_logits, read_tensor
from minilora.data.markup import ChatMarkup
from minilora.errors import AdapterError, ModelError
from minilora.models.load import folder_fingerprint, load_tokenizer, weight_files
from minilora.models.probe import probe
from minilora.utils import files

DTYPES_BY_NAME = {name: dtype for dtype, name in files.SAFETENSORS_DTYPES.items()}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Agreement:
    """How close the merged model is to base plus adapter, over the probe's positions."""

    max_logit_difference: float
    top1_share: float


def merge(
    adapter_folder: Path,
    output_folder: Path,
    model_name: str | None = None,
    dtype: str = "auto",
    allow_other_base: bool = False,
) -> Agreement:
    """Write a Hugging Face folder of base plus adapter; one tensor is in memory at a time.

    dtype: of the floating-point weights; auto keeps each tensor's own. Raises AdapterError when the adapter does not
    fit the base, or when output_folder already holds something.
    """
    config = adapter_format.read_config(adapter_folder)
    base = adapter_format.find_base(model_name, adapter_folder)
    if output_folder.exists() and (not output_folder.is_dir() or any(output_folder.iterdir())):
        raise AdapterError(f"{output_folder} is a file, or not empty: give another --output_dir")
    try:
        base_config = files.read_json(base / "config.json")
    except ValueError as error:
        raise ModelError(f"{base / 'config.json'}: {error}.") from error
    if missing := [file for file in weight_files(base) if not file.is_file()]:
        raise ModelError(f"{missing[0]} is missing: {base} has no weights to merge into.")
    if "quantization_config" in base_config:
        raise AdapterError(f"{base} is quantised: merge into the original model instead, --model NAME")
    adapter_format.check_base(adapter_folder, config, folder_fingerprint(base, _all_tensors(base)), allow_other_base)
    updates = adapter_format.read_updates(adapter_folder, config, _shapes(base))
    with files.new_folder(output_folder) as aside:
        for file in base.iterdir():
            if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model"):
                shutil.copyfile(file, aside / file.name)
        for name in ("chat_template.jinja", "generation_config.json"):
            if (adapter_folder / name).is_file():
                shutil.copyfile(adapter_folder / name, aside / name)
        if dtype != "auto":
            named = {key: dtype for key in ("dtype", "torch_dtype") if key in base_config or key == "dtype"}  # new, old
            files.write_file(aside / "config.json", files.json_chunks(base_config | named))
        for shard in weight_files(base):
            _merge_shard(shard, aside / shard.name, updates, None if dtype == "auto" else DTYPES[dtype])
    prompt = adapter_format.read_metadata(adapter_folder).get("system_prompt", "")
    return _agreement(base, config, updates, output_folder, prompt)


def _merge_shard(
    source: Path, target: Path, updates: dict[str, adapter_format.Update], dtype: torch.dtype | None
) -> None:
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
    config: adapter_format.AdapterConfig,
    updates: dict[str, adapter_format.Update],
    merged_folder: Path,
    system_prompt: str,
) -> Agreement:
    """Both models in fp32, a layer at a time."""
    ids = probe(ChatMarkup(load_tokenizer(base)), system_prompt)
    expected = layerwise_logits(base, ids, config, updates)
    logits = layerwise_logits(merged_folder, ids)
    same = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
    return Agreement(float((logits - expected).abs().max()), float(same))
