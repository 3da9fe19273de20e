"""Writes the files beside trained weights: tokenizer, config.json, generation_config.json, the system prompt."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from minilora.data.dataset import Example
from minilora.data.markup import ChatMarkup
from minilora.errors import ModelError
from minilora.models.load import cached_model, load_tokenizer
from minilora.utils import files

RECORD = "minilora.json"  # the system prompt, beside a model's weights; other programs do not read this file
GENERATION = "generation_config.json"
END, TEXT_END = "<|im_end|>", "<|endoftext|>"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "tokenizer.model", *TEMPLATES),
)
MAX_TOKENIZER_BYTES = 2**28
KEPT_FOR_GENERATION = ("bos_token_id", "max_length", "max_new_tokens")  # keys of the base that do not change an answer
ROPE_ROOT_KEYS = ("rope_theta", "partial_rotary_factor")  # transformers 4 reads them at the root of config.json


# ---------------------------------------------------------------------------------------- the system prompt


def trained_system_prompt(folder: Path) -> str | None:
    """The system prompt that the model in a folder was trained with. None if the folder does not give it.

    An adapter has its system prompt in the metadata of its weights. Version 0.1 wrote no record beside a model. In that
    case the settings of the run give the system prompt. Raises ModelError if the record is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return _setting_of_run(folder.parent) if folder.name in ("model", "best") else None
    try:
        prompt = files.read_json(path).get("system_prompt")
    except ValueError as error:
        raise ModelError(f"{path}: {error}. Remove it, and give --system_prompt.") from error
    if not isinstance(prompt, str):
        raise ModelError(f"{path}: system_prompt is not a text. Remove the file, and give --system_prompt.")
    return prompt


def _setting_of_run(run: Path) -> str | None:
    """The setting system_prompt of a run. None if the folder is not a run."""
    if not (run / "metrics.jsonl").is_file():
        return None
    with suppress(ValueError, KeyError, TypeError):
        prompt = files.read_json(run / "config.json")["config"]["system_prompt"]
        return prompt if isinstance(prompt, str) else None
    return None


def write_record(folder: Path, system_prompt: str) -> None:
    """Write the record that `trained_system_prompt` reads."""
    files.write_file(folder / RECORD, files.json_chunks({"system_prompt": system_prompt}))


def template_system_prompt(tokenizer: Any) -> str:
    """The system prompt that the chat template inserts if a conversation has none. Empty if it inserts nothing."""
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except Exception:  # no template or a broken one; the classes of error vary
        return ""
    found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", str(text), re.DOTALL)
    return found[1] if found else ""


def adapter_system_prompt(stored: str | None, tokenizer: Any) -> str:
    """The system prompt that an adapter was trained with: that of its metadata, else that of the chat template.

    Other trainers store no system prompt, and render their rows with the chat template.
    """
    return template_system_prompt(tokenizer) if stored is None else stored


def common_system_prompt(examples: Sequence[Example], markup: ChatMarkup, tokenizer: Any) -> str | None:
    """The text of the system turn that all examples begin with. None if there is no such turn."""
    ids = examples[0].input_ids
    ends = (ids == markup.end).nonzero()[0]
    if ids[0] != markup.start or not len(ends):
        return None
    turn = ids[: int(ends[0]) + 1].tolist()
    text = tokenizer.decode(turn[1:-1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not text.startswith("system\n") or markup.encode([text])[0] != turn[1:-1]:
        return None
    same = all(examples[i].input_ids[: len(turn)].tolist() == turn for i in range(1, len(examples)))
    return text.removeprefix("system\n") if same else None


# ---------------------------------------------------------------------------------------- tokenizer files


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files of a model folder, byte for byte. Raises ModelError if a file is not readable."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            try:
                files.write_file(folder / name, [files.read_bytes(source / name, MAX_TOKENIZER_BYTES)])
            except ValueError as error:
                raise ModelError(f"{source / name}: {error}.") from error


def save_tokenizer(folder: Path, tokenizer: Any, source: Path | None = None) -> None:
    """Write a tokenizer. If possible, its files are copied byte for byte from `source` or from its own folder.

    If the tokenizer has changed since it was loaded, or its files are not on this machine, transformers saves it.
    """
    source = source or _origin(tokenizer)
    if source is not None:
        copy_tokenizer(source, folder)
        return
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    with suppress(ValueError):
        settings = files.read_json(path)
        if isinstance(settings.get("extra_special_tokens"), list):  # transformers 4 takes an object under that name
            settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
            files.write_file(path, files.json_chunks(settings))


def _origin(tokenizer: Any) -> Path | None:
    """The folder of this tokenizer's files. None if there is no such folder, or it has another tokenizer."""
    name = str(getattr(tokenizer, "name_or_path", "") or "")
    with suppress(ModelError):
        folder = Path(name) if Path(name).is_dir() else cached_model(name) if name.count("/") == 1 else None
        if name and folder is not None:
            saved = load_tokenizer(folder)
            same = (saved.get_vocab(), saved.chat_template) == (tokenizer.get_vocab(), tokenizer.chat_template)
            return folder if same else None
    return None


# ---------------------------------------------------------------------------------------- config.json


def model_config(base: Mapping[str, Any], tokenizer: Any, dtype: str | None = None) -> dict[str, Any]:
    """config.json of a result: that of the base, with the keys of transformers 4 and 5 and the trained end token.

    transformers 5 writes rope_parameters and dtype. transformers 4 reads rope_theta, rope_scaling and torch_dtype. If
    rope_theta is missing, transformers 4 uses 10,000.
    """
    config = dict(base)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config |= {key: rope[key] for key in ROPE_ROOT_KEYS if key in rope}
        scaling = {key: value for key, value in rope.items() if key not in ROPE_ROOT_KEYS}
        if scaling.get("rope_type", "default") != "default":
            config["rope_scaling"] = config.get("rope_scaling") or scaling
    if dtype := dtype or config.get("dtype"):
        config |= {"dtype": dtype, "torch_dtype": dtype}
    ends, eos = end_tokens(tokenizer), config.get("eos_token_id")
    if ends and ends[0] not in (eos if isinstance(eos, list) else [eos]):
        config["eos_token_id"] = ends[0]
    return config


# ---------------------------------------------------------------------------------------- generation_config.json


def generation_settings(base: Mapping[str, Any], ends: Sequence[int]) -> dict[str, Any]:
    """generation_config.json of a result: greedy, with the trained end tokens, and nothing else that changes an answer.

    base: that of the base; only the keys of KEPT_FOR_GENERATION are used
    ends: the result of `end_tokens`; if it is empty, the end tokens of the base are used
    """
    kept = {key: base[key] for key in KEPT_FOR_GENERATION if base.get(key) is not None}
    stops = list(ends) or base.get("eos_token_id")
    pad = ends[-1] if len(ends) > 1 else base.get("pad_token_id")
    found = kept | {"do_sample": False, "eos_token_id": stops, "pad_token_id": pad}
    return {key: value for key, value in found.items() if value is not None}


def write_generation(folder: Path, base: Mapping[str, Any], ends: Sequence[int]) -> None:
    """Write the `generation_settings` to a folder."""
    files.write_file(folder / GENERATION, files.json_chunks(generation_settings(base, ends)))


def read_generation(folder: Path) -> dict[str, Any]:
    """generation_config.json of a folder. Empty if there is no readable file."""
    try:
        return files.read_json(folder / GENERATION)
    except ValueError:
        return {}


def end_tokens(tokenizer: Any) -> list[int]:
    """The ids that end an answer: <|im_end|> and <|endoftext|>, if the tokenizer has <|im_end|>, else its end token."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    token_id = getattr(backend, "token_to_id", lambda token: None)
    ids = [id for token in (END, TEXT_END) if (id := token_id(token)) is not None]
    own = getattr(tokenizer, "eos_token_id", None)
    return ids if token_id(END) is not None else [own] if isinstance(own, int) else []
