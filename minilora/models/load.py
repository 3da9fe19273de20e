"""Loads the base model and its tokenizer from a folder or the hub, and refuses models that it cannot train exactly."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError, ModelError, UnsupportedModelError, first_line
from minilora.models.families import NAMES, family_of, refuse_unknown_type
from minilora.models.fingerprint import completed, fingerprint, fingerprint_of
from minilora.models.quantize import quantise
from minilora.utils import files
from minilora.utils.device import compile_cache_problem, keep_few_products

HUB_TIMEOUT_S = 3.0
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "*.model"]  # never *.bin or *.py
QUANTISED = ("quantization_config", "compression_config")  # parts of config.json that are not models
PADS = ("<|endoftext|>", "<|fim_pad|>", "<|vision_pad|>", "<pad>", "<|pad|>", "[PAD]")  # the first known one is used


def find_model(name: str) -> Path:
    """The folder of a model that is given as a folder or a hub name. The model is downloaded if necessary.

    Raises ModelError that says what was tried. An unreachable hub is noticed within HUB_TIMEOUT_S.
    """
    folder = Path(os.path.expanduser(name))
    if files.denied(folder / "config.json"):
        raise ModelError(f"model {name!r}: Permission denied.")
    if os.path.isdir(folder):  # never raises, for any name
        hint = what_else(folder)
        if hint or not (folder / "config.json").is_file():
            raise ModelError(f"{name} is no model folder: {hint or 'it has no config.json.'}")
        read_config_json(folder)
        return folder
    check_hub_name(name)
    folder = cached_model(name) or _download(name)
    read_config_json(folder)
    return folder


def check_hub_name(name: str) -> None:
    """Raise ModelError for a model that is no folder and has no name that the hub could know."""
    if not os.path.exists(os.path.expanduser(name)) and re.fullmatch(
        r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", name, re.A
    ):
        return
    raise ModelError(f"model {name!r}: there is no such folder, and it is no hub name (OWNER/NAME).")


def read_config_json(folder: Path) -> dict[str, Any]:
    """Read config.json of a model folder. Raises ModelError if it is broken or describes several models."""
    try:
        config = files.read_json(folder / "config.json")
    except ValueError as error:
        raise ModelError(f"{folder}: the model cannot be loaded: config.json: {error}.") from error
    parts = [key for key, value in config.items() if key.endswith("_config") and value and isinstance(value, dict)]
    if parts := [key for key in parts if key not in QUANTISED]:
        raise UnsupportedModelError(
            f"{folder}: model type {config.get('model_type')} is not supported: its config.json describes several "
            f"models ({', '.join(parts)}). minilora trains models of text only: {NAMES}. Give another --model."
        )
    return config


def what_else(folder: Path) -> str:
    """What to give instead of a folder that is an adapter or a run. Empty if the folder may be a model."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return "it holds an adapter: give that as --adapter."
    if not (folder / "metrics.jsonl").is_file():
        return ""
    results = [f"give --{flag} {folder / flag}." for flag in ("adapter", "model") if (folder / flag).is_dir()]
    return f"it is a run: {results[0] if results else 'it has no finished result.'}"


def cached_model(name: str) -> Path | None:
    """The complete copy of a hub model in the local cache, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ModelError(f"model {name!r} is neither a folder nor a hub name: {error}") from error
    complete = (folder / "config.json").exists() and all(file.exists() for file in weight_files(folder))
    return folder if complete else None


def hub_answers(name: str) -> str:
    """An empty text if the hub has this model, else the reason. The answer comes within HUB_TIMEOUT_S."""
    import threading

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    answer = [f"the hub did not answer within {HUB_TIMEOUT_S:g} s"]

    def ask() -> None:
        try:
            HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
            answer[0] = ""
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else "no"
            answer[0] = f"the hub answered with status {status}: there is no such model, or you may not read it"
        except Exception as error:  # proxy, DNS or TLS failure: each client library has its own classes
            answer[0] = f"the hub cannot be reached ({type(error).__name__})"

    thread = threading.Thread(target=ask, daemon=True)  # a timeout per connection does not limit the whole
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return answer[0]


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        why = "HF_HUB_OFFLINE is set"
    else:
        why = hub_answers(name)
    if why:
        raise ModelError(
            f"model {name!r} is not available: there is no folder of that name, the cache {HF_HUB_CACHE} does not "
            f"contain all of it, and {why}. Give --model FOLDER, or try `python train.py demo`."
        )
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:
        raise ModelError(f"model {name!r}: the download failed: {error}. The next run continues it.") from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, with a pad token that is not the end token.

    If both were the same token, a collator that masks padding would also mask the end token. Qwen uses two tokens.
    """
    from transformers import AutoTokenizer

    names = ["tokenizer.json", "tokenizer_config.json"]
    if not ((folder / names[0]).exists() or all((folder / name).exists() for name in ("vocab.json", "merges.txt"))):
        missing = " and ".join(name for name in names if not (folder / name).exists())
        raise ModelError(f"{folder} has no tokenizer: copy {missing} there from the original model.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if (folder / "config.json").exists():
            _config(folder)  # the tokenizer's class reads it too: raises if the mistake is there
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {first_line(error)}") from error
    if embeds(folder, tokenizer, "<|im_end|>"):
        tokenizer.eos_token = "<|im_end|>"
    end = tokenizer.eos_token
    if tokenizer.pad_token == end or not embeds(folder, tokenizer, tokenizer.pad_token):
        pads = [token for token in (*PADS, tokenizer.unk_token) if token != end and embeds(folder, tokenizer, token)]
        if not pads:
            raise ModelError(
                f"{folder}: the tokenizer has no pad token apart from its end token {end}, and none of "
                f'{", ".join(PADS)}. Set "pad_token" in tokenizer_config.json to another of its tokens.'
            )
        tokenizer.pad_token = pads[0]
    return tokenizer


def embeds(folder: Path, tokenizer: Any, token: str | None) -> bool:
    """Whether a text is one token with an embedding in the model. transformers may add tokens that have none."""
    number = tokenizer.convert_tokens_to_ids(token) if token else None  # None or the unknown token's id for other texts
    if number is None or tokenizer.convert_ids_to_tokens(number) != token:
        return False
    size = read_config_json(folder).get("vocab_size") if (folder / "config.json").exists() else None
    return not isinstance(size, int) or number < size


def load_model(folder: Path, dtype: torch.dtype, device: torch.device, bits: int = 0) -> nn.Module:
    """The frozen base model of a folder, in dtype on device. Raises ModelError if minilora cannot train it exactly.

    bits: 4 or 8 to quantise its linear layers; 0 not to quantise them
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shows_progress, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # weights that do not match are refused below, without a table
    config_json, config = read_config_json(folder), _config(folder)
    keep_few_products()
    try:
        weight_files(folder)  # raises if the index names files outside the folder
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the information, which is checked below
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{folder}: the model cannot be loaded: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
    model, info = loaded
    odd = [f"{key} is missing" for key in info["missing_keys"]]
    odd += [f"{key} is not in the model" for key in info["unexpected_keys"]]
    odd += [f"{key} is {tuple(held)}, not {tuple(asked)}" for key, held, asked in info["mismatched_keys"]]
    if odd:
        raise ModelError(
            f"{folder}: its weights do not match its config.json: {len(odd)} tensors; the first: {odd[0]}."
        )
    model.generation_config.pad_token_id = model.generation_config.pad_token_id or config.pad_token_id
    model.config_json = completed(config_json, config.to_dict())  # for the fingerprint
    model.requires_grad_(False)
    place = torch.device("cpu") if bits else device  # unquantised, the model may not fit on the device
    model = nn.Module.to(model, place).eval()
    if bits:
        model.base_fingerprint = fingerprint(model)
        quantise(model, bits, device)
    return nn.Module.to(model, device)


def num_layers(folder: Path) -> int:
    """The number of decoder layers of a model folder. Raises ModelError if minilora cannot train it exactly."""
    return _config(folder).num_hidden_layers


def file_dtype(folder: Path) -> torch.dtype:
    """float32 if config.json says that a model folder is in float32, else bfloat16."""
    config = read_config_json(folder)
    return torch.float32 if config.get("dtype", config.get("torch_dtype")) == "float32" else torch.bfloat16


def weight_shapes(folder: Path) -> dict[tuple[int, int], int]:
    """How many weight matrices of each shape (out, in) a model folder has, by its config.json; the head counts once."""
    config = _config(folder)
    hidden, ffn, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    per_layer = [(query, hidden), (key, hidden), (key, hidden), (hidden, query), (ffn, hidden), (ffn, hidden)]
    return Counter([*per_layer, (hidden, ffn)] * layers + [(config.vocab_size, hidden)])


def ffn_width(folder: Path) -> int:
    """The intermediate_size of a model folder. Raises ModelError if minilora cannot train it exactly."""
    return _config(folder).intermediate_size


def empty_model(folder: Path, dtype: torch.dtype, layers: int) -> Any:
    """The model of a folder with only `layers` layers, on the meta device: it has shapes and no weights."""
    from transformers import AutoModelForCausalLM

    config = _config(folder)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder}: the model cannot be built: {first_line(error)}") from error


def _config(folder: Path) -> Any:
    """The config of a model folder. Raises ModelError if minilora cannot train the model exactly."""
    if problem := compile_cache_problem():
        raise ConfigError(problem)
    model_type = read_config_json(folder).get("model_type")
    if isinstance(model_type, str):  # before transformers, which has other words for a type that it does not know
        refuse_unknown_type(f"{folder}: model type {model_type}", model_type)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder}: the model cannot be loaded: {first_line(error)}") from error
    family_of(config)  # raises where the decoder would compute another function than the model
    return config


def folder_fingerprint(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The identity of the base in a folder. It equals the `fingerprint` of the loaded base."""
    config = _config(folder).to_dict()
    return fingerprint_of(completed(read_config_json(folder), config), tensors)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises ModelError for a name that leads out of the folder."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    try:
        names = json.loads(index.read_bytes())["weight_map"].values()
        names = sorted(set(names))
        bad = [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index}: it does not say which file holds which tensor ({first_line(error)}).") from error
    if bad or not names:
        raise ModelError(f"{index}: {bad[:1] or 'nothing'} is not the name of a safetensors file beside it.")
    return [folder / name for name in names]
