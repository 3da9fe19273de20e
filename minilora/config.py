"""`TrainConfig`: the only home of every default. Presets and TOML files lie over it, command-line flags over them."""

import dataclasses
import difflib
import math
import operator
import os
import re
import reprlib
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minilora.errors import ConfigError

DEVICE = r"auto|cpu|cuda(:\d{1,3})?"
MAX_TOML_BYTES = 2**20
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 120
PRESET_DIR = Path(__file__).parent / "presets"
PATHS = ("model", "train_file", "eval_file", "output_dir", "resume")
TARGET_GROUPS = {
    "attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


def _key(default: Any, help: str, **limits: float) -> Any:
    """A field with its help text and the limits that `problems` checks: ge, gt, le, lt."""
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a run depends on; names are those of Hugging Face's TrainingArguments and PEFT's LoraConfig."""

    # what is trained on what
    model: str = _key("Qwen/Qwen2-0.5B-Instruct", "hub name or folder of the base model")
    train_file: str = _key("data/train.jsonl", "JSONL file of examples")
    eval_file: str | None = _key(None, "JSONL file for evaluation")
    val_size: float = _key(0.0, "share of train_file set aside for evaluation, when there is no eval_file", ge=0, lt=1)
    output_dir: str | None = _key(None, "the run's folder; default: a new one under runs/")
    resume: str = _key(
        "never", "auto: go on from output_dir's newest valid checkpoint; PATH: from that run or checkpoint"
    )
    # method
    method: Literal["lora", "full"] = _key("lora", "train low-rank adapters, or every weight")
    lora_r: int = _key(8, "rank of the adapters", ge=1, le=4096)
    lora_alpha: int = _key(32, "numerator of the scale alpha / r", ge=1, le=2**20)
    lora_dropout: float = _key(0.05, "dropout on the input of the low-rank path", ge=0, lt=1)
    target_modules: tuple[str, ...] = _key(TARGET_GROUPS["attn"], "linear layers to adapt: names, or attn | mlp | all")
    use_rslora: bool = _key(False, "scale by alpha / sqrt(r) (arXiv:2312.03732)")
    # optimization
    per_device_train_batch_size: int = _key(4, "examples a device takes per accumulation", ge=1)
    gradient_accumulation_steps: int = _key(8, "accumulations per optimizer step", ge=1)
    num_train_epochs: float = _key(10.0, "passes over train_file", gt=0, le=1e6)
    max_steps: int = _key(0, "optimizer steps; 0: as many as num_train_epochs needs", ge=0)
    learning_rate: float = _key(1e-4, "peak learning rate", ge=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = _key("cosine", "shape after the warm-up")
    warmup_ratio: float = _key(0.1, "share of the steps over which the rate rises", ge=0, le=1)
    weight_decay: float = _key(0.01, "AdamW's decoupled decay (not for biases and norms)", ge=0)
    max_grad_norm: float = _key(0.1, "clip the gradient to this norm; 0: never", ge=0)
    early_stopping_patience: int = _key(0, "stop after so many evaluations without a new best; 0: never", ge=0)
    # data
    max_length: int = _key(1024, "tokens of an example beyond which `overlong` applies", ge=2)
    overlong: Literal["truncate", "drop", "error"] = _key("truncate", "what happens to longer examples")
    on_bad_rows: Literal["error", "skip"] = _key("error", "what happens to lines that are no examples")
    train_on_prompt: bool = _key(False, "supervise the prompt's tokens too")
    system_prompt: str = _key("你是一个AI助手", "system turn of rows that bring none; empty: no system turn")
    # speed and memory
    packing: bool = _key(True, "several examples share a micro-batch; false: one each")
    max_tokens_per_micro_batch: int = _key(0, "token budget of a micro-batch; 0: chosen for the device", ge=0)
    share_prefix: Literal["auto", "on", "off"] = _key(
        "auto", "compute tokens that all rows of a micro-batch begin with only once; auto: on the CPU"
    )
    gradient_checkpointing: bool | None = _key(
        None, "recompute activations in the backward pass: slower, smaller; unset: where nothing fits without"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = _key(
        "auto", "of the base; auto: bfloat16 where the hardware has it"
    )
    device: str = _key("auto", "auto | cpu | cuda | cuda:N")
    seed: int = _key(42, "of order, initialisation and dropout", ge=0, le=2**63 - 1)
    # what is said and kept
    logging_steps: int = _key(10, "steps between two lines of the log", ge=1)
    eval_steps: int = _key(0, "steps between two evaluations; 0: at each epoch's end", ge=0)
    save_steps: int = _key(0, "steps between two checkpoints; 0: at each epoch's end", ge=0)
    save_total_limit: int = _key(2, "checkpoints kept; 0: all", ge=0)

    def __post_init__(self) -> None:
        if found := problems(self):
            raise ConfigError("\n".join(found))

    @property
    def examples_per_step(self) -> int:
        """Examples one optimizer step takes on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
TYPES = typing.get_type_hints(TrainConfig)
BOUNDS = {
    "ge": ("at least", operator.ge),
    "gt": ("more than", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("less than", operator.lt),
}


def problems(config: TrainConfig) -> list[str]:
    """Every reason why this configuration cannot be obeyed, one line each."""
    found = []
    for name, field in FIELDS.items():
        value, options = getattr(config, name), choices(name)
        if options and value not in options:
            found.append(f"{name} = {value!r} is not one of {', '.join(options)}.{nearest(str(value), options)}")
        if isinstance(value, float) and not math.isfinite(value):
            found.append(f"{name} = {value} must be a finite number.")
            continue
        for limit, (words, holds) in BOUNDS.items():
            if limit in field.metadata and not holds(value, field.metadata[limit]):
                found.append(f"{name} = {value} must be {words} {field.metadata[limit]}.")
    for name in PATHS:
        value = getattr(config, name)
        if value is not None and (not value.strip() or "\0" in value):
            found.append(f"{name} = {value!r} names nothing: {FIELDS[name].metadata['help']}.")
    if config.eval_file and config.val_size:
        found.append("eval_file and val_size are two ways to evaluate: give one of them.")
    if not re.fullmatch(DEVICE, config.device):
        found.append(f"device = {config.device!r} is not one of auto, cpu, cuda, cuda:N.")
    if config.early_stopping_patience and not (config.eval_file or config.val_size):
        found.append("early_stopping_patience needs evaluations: give eval_file or val_size.")
    if not config.target_modules:
        found.append("target_modules is empty: name linear layers, or attn | mlp | all.")
    return found


def choices(name: str) -> tuple[str, ...]:
    """The values a key is limited to; empty when it is not."""
    return typing.get_args(TYPES[name]) if typing.get_origin(TYPES[name]) is Literal else ()


def nearest(given: str, possible: Sequence[str] | Mapping[str, Any]) -> str:
    """' Did you mean X?' for the closest known name, or nothing."""
    close = difflib.get_close_matches(given, possible, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def resolve(source: str | None, flags: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> TrainConfig:
    """Defaults, then `base` (a run's saved config), then the preset or TOML file `source`, then `flags`.

    An eval_file belongs to the train_file it was named with: a layer with another train_file or a val_size drops it.
    Raises ConfigError with every problem of every layer, one a line.
    """
    layers = [("the run's config.json", dict(base or {}))]
    if source is not None:
        layers.append((source, read_source(source)))
    layers.append(("the command line", dict(flags)))
    values: dict[str, Any] = {}
    found: list[str] = []
    for where, layer in layers:
        if ("train_file" in layer or "val_size" in layer) and "eval_file" not in layer:
            values.pop("eval_file", None)
        for name, given in layer.items():
            if name not in FIELDS:
                found.append(f"{where}: there is no key {SHORT.repr(name)}.{nearest(name[:99], FIELDS)}")
                continue
            try:
                values[name] = coerce(name, given)
            except ValueError as error:
                found.append(f"{where}: {name} = {SHORT.repr(given)} {error}.")
    if found:
        good = {name: value for name, value in values.items() if name in FIELDS}
        raise ConfigError("\n".join(found + _limits_of(good)))
    return TrainConfig(**values)


def _limits_of(values: dict[str, Any]) -> list[str]:
    """The problems of the values that could be read, so that all are reported at once."""
    try:
        TrainConfig(**values)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def read_source(source: str) -> dict[str, Any]:
    """The keys of a preset (lora, full, demo, ...) or of a TOML file."""
    presets = {path.stem: path for path in sorted(PRESET_DIR.glob("*.toml"))}
    path = Path(source) if source.endswith(".toml") else presets.get(source)
    if path is None:
        raise ConfigError(
            f"{source!r} is no preset ({', '.join(presets)}) and no .toml file.{nearest(source, presets)}"
        )
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: cannot be read: {'not a regular file' if path.exists() else 'no such file'}.")
        with open(path, "rb") as file:
            content = file.read(MAX_TOML_BYTES + 1)
        if len(content) > MAX_TOML_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_TOML_BYTES:,} bytes.")
        values = tomllib.loads(content.decode("utf-8-sig"))  # some editors begin a file with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    package = PRESET_DIR.parent  # "@" stands for it in presets, so that the demo runs from any folder
    inside = {k: str(package / v[1:]) for k, v in values.items() if isinstance(v, str) and v.startswith("@")}
    return values | inside if path.parent == PRESET_DIR else values


def coerce(name: str, given: Any) -> Any:
    """A value from TOML, JSON or the command line (text, or a list of texts) in the type of its key."""
    hint = TYPES[name]
    if hint == tuple[str, ...]:
        return expand_targets([given] if isinstance(given, str) else given)
    if hint == str | None:
        if given is None or (isinstance(given, str) and given.lower() == "none"):
            return None
        hint = str
    if hint in (bool, bool | None):
        if isinstance(given, bool) or (given is None and hint is not bool):
            return given
        if isinstance(given, str) and given.lower() in ("true", "false"):
            return given.lower() == "true"
        raise ValueError("is not true or false")
    if hint in (int, float):
        try:
            number = hint(given)
            if not isinstance(given, bool) and (number == given or isinstance(given, str)):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
        raise ValueError(f"is not {'a whole number' if hint is int else 'a number'}")
    if not isinstance(given, str):
        raise ValueError("is not a text")
    return os.path.expanduser(given) if name in PATHS else given  # the shell leaves --key=~/x as it is


def expand_targets(names: Any) -> tuple[str, ...]:
    """attn | mlp | all become the projections they stand for; other names pass, commas separate, repeats go."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError("is not a list of names")
    parts = [part.strip() for name in names for part in name.split(",") if part.strip()]
    return tuple(dict.fromkeys(each for part in parts for each in TARGET_GROUPS.get(part, (part,))))
