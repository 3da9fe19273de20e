"""`TrainConfig` is every setting of a run with its default. A preset or TOML file replaces defaults, a flag both."""

import dataclasses
import difflib
import glob
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
PATHS = ("model", "train_file", "eval_file", "output_dir", "resume", "adapter")
LORA_ONLY = (  # refused with method full; r, alpha, dropout and targets, which presets set, are not looked at
    *("use_rslora", "use_dora", "init_lora_weights", "loraplus_lr_ratio", "adapter", "load_in_4bit", "load_in_8bit"),
)
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

    # the model, its rows and its run
    model: str = _key("Qwen/Qwen2-0.5B-Instruct", "name on the hub, or folder, of the base model")
    train_file: str | tuple[str, ...] = _key(
        "data/train.jsonl", "JSONL file of training examples; commas separate several files"
    )
    train_weights: tuple[float, ...] = _key(
        (), "how many times an epoch uses the rows of each train_file (2,1 or 0.5); empty: once", gt=0, le=1000
    )
    deduplicate: bool = _key(False, "leave out rows of train_file that have the same tokens as an earlier row")
    eval_file: str | None = _key(None, "JSONL file of evaluation examples; none: no file")
    val_size: float = _key(
        0.0, "share of train_file that is kept for evaluation; needs no eval_file; 0: nothing", ge=0, lt=1
    )
    output_dir: str | None = _key(None, "folder of the run; none: a new folder in runs/")
    resume: str = _key(
        "never", "auto: continue from the newest valid checkpoint in output_dir; PATH: continue that run or checkpoint"
    )
    # method
    method: Literal["lora", "full"] = _key("lora", "lora: train low-rank adapters; full: train all weights")
    lora_r: int = _key(8, "rank of the adapters", ge=1, le=4096)
    lora_alpha: int = _key(32, "the adapter's output is multiplied by lora_alpha / lora_r", ge=1, le=2**20)
    lora_dropout: float = _key(0.05, "probability of dropout on the input of the adapter", ge=0, lt=1)
    target_modules: tuple[str, ...] = _key(
        TARGET_GROUPS["attn"], "linear layers that get an adapter: names, or attn | mlp | all"
    )
    use_rslora: bool = _key(False, "multiply by lora_alpha / sqrt(lora_r) instead (arXiv:2312.03732)")
    use_dora: bool = _key(False, "train the length of each row of the weight too (DoRA, arXiv:2402.09353): slower")
    init_lora_weights: Literal["kaiming", "pissa"] = _key(
        "kaiming", "initial values of A and B; pissa: the largest directions of the weight (arXiv:2404.02948)"
    )
    loraplus_lr_ratio: float = _key(
        1.0, "LoRA+ (arXiv:2402.12354): learning rate of B divided by that of A", gt=0, le=1e4
    )
    adapter: str | None = _key(
        None, "folder of an adapter to continue from; its rank, alpha, targets and variant are used"
    )
    load_in_4bit: bool = _key(False, "keep the frozen base in 4 bits (nf4, extra `quant`): smaller, slower, less exact")
    load_in_8bit: bool = _key(False, "keep the frozen base in 8 bits (LLM.int8, extra `quant`)")
    # optimization
    per_device_train_batch_size: int = _key(4, "examples on one device for one accumulation", ge=1)
    gradient_accumulation_steps: int = _key(8, "accumulations in one optimizer step", ge=1)
    num_train_epochs: float = _key(10.0, "passes over train_file", gt=0, le=1e6)
    max_steps: int = _key(0, "number of optimizer steps; 0: the number that num_train_epochs needs", ge=0)
    learning_rate: float = _key(1e-4, "highest learning rate", ge=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = _key(
        "cosine", "how the learning rate changes after the warm-up"
    )
    warmup_ratio: float = _key(0.1, "share of the steps in which the learning rate rises", ge=0, le=1)
    weight_decay: float = _key(0.01, "decay of the weights in AdamW; biases and norms have none", ge=0)
    max_grad_norm: float = _key(
        0.1, "largest norm of the gradient, a larger gradient is scaled down; 0: no limit", ge=0
    )
    early_stopping_patience: int = _key(
        0, "stop after this number of evaluations without a better result; 0: never", ge=0
    )
    neftune_noise_alpha: float = _key(
        0.0,
        "noise on the embeddings in training, at most this / sqrt(tokens x hidden) (arXiv:2310.05914); 0: none",
        ge=0,
    )
    # data
    max_length: int = _key(
        1024, "largest number of tokens of an example; `overlong` says what happens to longer ones", ge=2
    )
    overlong: Literal["truncate", "drop", "error"] = _key(
        "truncate", "what to do with an example that is longer than max_length"
    )
    on_bad_rows: Literal["error", "skip"] = _key("error", "what to do with a line that is not an example")
    train_on_prompt: bool = _key(False, "also learn the tokens of the prompt")
    system_prompt: str = _key("你是一个AI助手", "system turn for rows that have none; empty: no system turn")
    # speed and memory
    packing: bool = _key(True, "put several examples in one micro-batch; false: one example in each")
    max_tokens_per_micro_batch: int = _key(
        0, "largest number of tokens of a micro-batch; 0: chosen for the device", ge=0
    )
    share_prefix: Literal["auto", "on", "off"] = _key(
        "auto",
        "compute only once the tokens with which all rows of a micro-batch begin; auto: on on the CPU, off elsewhere",
    )
    gradient_checkpointing: bool | None = _key(
        None,
        "compute activations a second time in the backward pass: slower, smaller; unset: only where needed",
    )
    torch_compile: bool = _key(False, "compile norms, SwiGLU and rotary embedding with torch.compile")
    fsdp: bool = _key(
        False, "give each process of torchrun a part of every layer (FSDP2), for a base that is too large for one card"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = _key(
        "auto",
        "dtype of the matrix products; auto: bfloat16 where a GPU has it, on a CPU the faster one, which is measured",
    )
    device: str = _key("auto", "auto | cpu | cuda | cuda:N")
    seed: int = _key(42, "seed of the order of rows, the initial values and dropout", ge=0, le=2**63 - 1)
    # what is reported and kept
    report_to: Literal["none", "tensorboard"] = _key(
        "none", "tensorboard: also write curves for TensorBoard (extra `tensorboard`)"
    )
    logging_steps: int = _key(10, "number of steps between two lines of the log", ge=1)
    eval_steps: int = _key(0, "number of steps between two evaluations; 0: at the end of each epoch", ge=0)
    eval_samples: int = _key(0, "number of evaluation prompts that the model answers at each evaluation", ge=0, le=1000)
    save_steps: int = _key(0, "number of steps between two checkpoints; 0: at the end of each epoch", ge=0)
    save_total_limit: int = _key(2, "number of checkpoints that are kept; 0: all", ge=0)

    def __post_init__(self) -> None:
        """Read every value as its flag is read, and raise ConfigError with all problems, one a line."""
        found = []
        for name, field in FIELDS.items():
            given = getattr(self, name)
            try:
                value = coerce(name, given)
            except ValueError as error:
                found.append(f"{name} = {SHORT.repr(given)} {error}.")
                value = field.default  # so that the other values can be checked
            object.__setattr__(self, name, value)
        if found := found + problems(self):
            raise ConfigError("\n".join(found))

    @property
    def train_files(self) -> tuple[str, ...]:
        """The files of train_file, be it one or several."""
        return (self.train_file,) if isinstance(self.train_file, str) else self.train_file

    @property
    def base_bits(self) -> int:
        """Bits in which the base's linear layers are held; 0: those of its dtype."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else 0

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
            each = value if isinstance(value, tuple) else (value,)
            if limit in field.metadata and not all(holds(number, field.metadata[limit]) for number in each):
                found.append(f"{name} = {value} must be {words} {field.metadata[limit]}.")
    for name in PATHS:
        value = getattr(config, name)
        for path in (value or ("",)) if isinstance(value, tuple) else (value,):
            if path is not None and (not path.strip() or "\0" in path):
                found.append(f"{name} = {path!r} names nothing. Give a name: {FIELDS[name].metadata['help']}.")
    files, weights = config.train_files, config.train_weights
    places = [os.path.abspath(os.path.expanduser(path)) for path in files]
    if twice := [path for path, place in zip(files, places, strict=True) if places.count(place) > 1]:
        found.append(f"train_file names {twice[0]} twice: give it a weight of 2, see train_weights.")
    if weights and len(weights) != len(files):
        found.append(
            f"train_weights has {len(weights)} number{'s' * (len(weights) > 1)} ({', '.join(map(str, weights))}), but "
            f"train_file names {len(files)}: give one number for each file, or an empty train_weights."
        )
    if config.eval_file and config.val_size:
        found.append(
            f"eval_file = {config.eval_file!r} and val_size = {config.val_size} both set rows for evaluation: give one "
            "of them. eval_file = none or val_size = 0 removes the other."
        )
    if not re.fullmatch(DEVICE, config.device):
        found.append(f"device = {config.device!r} is not one of auto, cpu, cuda, cuda:N.")
    if config.early_stopping_patience and not (config.eval_file or config.val_size):
        found.append("early_stopping_patience needs evaluations: give eval_file or val_size.")
    found += variant_problems(config)
    if config.eval_samples and not (config.eval_file or config.val_size):
        found.append("eval_samples needs evaluations: give eval_file or val_size.")
    if config.fsdp and config.eval_samples:
        found.append("eval_samples and fsdp: a base in parts gives no answers; leave one of them out.")
    if config.fsdp and config.method == "full" and config.neftune_noise_alpha:
        found.append("neftune_noise_alpha and fsdp with method = full: the embedding is in parts; leave one out.")
    if config.max_tokens_per_micro_batch and not config.packing:
        found.append("max_tokens_per_micro_batch needs packing: without it each example goes alone. Set it to 0.")
    if not config.target_modules:
        found.append("target_modules is empty: name linear layers, or attn | mlp | all.")
    return found


def variant_problems(config: TrainConfig) -> list[str]:
    """Variants of LoRA that do not go with the rest, one line each."""
    found = []
    if config.method == "full":
        given = [name for name in LORA_ONLY if getattr(config, name) != FIELDS[name].default]
        found += [f"{name} = {getattr(config, name)!r} needs method = lora: full has no adapter." for name in given]
    if config.load_in_4bit and config.load_in_8bit:
        found.append("load_in_4bit and load_in_8bit are two forms of one base: give one of them.")
    if config.base_bits:
        bits, barred = f"load_in_{config.base_bits}bit", ("use_dora", "init_lora_weights", "fsdp")
        given = [name for name in barred if getattr(config, name) != FIELDS[name].default]
        found += [f"{bits} and {name} do not go together: leave one of them out." for name in given]
    if config.adapter is not None and config.init_lora_weights != "kaiming":
        found.append(f"init_lora_weights = {config.init_lora_weights!r}: with adapter, A and B begin as its own.")
    return found


def with_method(config: TrainConfig, method: Literal["lora", "full"]) -> TrainConfig:
    """The same settings for another method, without the keys that it does not have."""
    unused: dict[str, Any] = {name: FIELDS[name].default for name in LORA_ONLY} if method == "full" else {}
    return dataclasses.replace(config, method=method, **unused)


def choices(name: str) -> tuple[str, ...]:
    """The values a key is limited to; empty when it is not."""
    return typing.get_args(TYPES[name]) if typing.get_origin(TYPES[name]) is Literal else ()


def nearest(given: str, possible: Sequence[str] | Mapping[str, Any]) -> str:
    """' Did you mean X?' for the closest known name, or nothing."""
    close = difflib.get_close_matches(given, possible, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def resolve(
    source: str | None,
    flags: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
    adapter_keys: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Defaults, then `base` (a run's saved config), then the preset or TOML file `source`, then `flags`.

    adapter_keys: the keys of the adapter to continue from. They replace those of the run and of a preset; a TOML file
    and the flags replace them.
    A preset's eval_file belongs to the preset's train_file: flags with a train_file or a val_size leave it out. A TOML
    file or a run keeps its keys, and values that contradict each other are an error.
    Raises ConfigError with every problem of every layer, one on each line.
    """
    layers = [("the run's config.json", dict(base or {}))]
    if source is not None:
        layer = read_source(source)
        if not source.endswith(".toml") and flags.keys() & {"train_file", "val_size"}:
            layer.pop("eval_file", None)
        layers.append((source, layer))
    if adapter_keys is not None:
        layers.insert(len(layers) - (source or "").endswith(".toml"), ("the adapter", dict(adapter_keys)))
    layers.append(("the command line", dict(flags)))
    values: dict[str, Any] = {}
    found: list[str] = []
    for where, layer in layers:
        for name, given in layer.items():
            if name not in FIELDS:
                found.append(f"{where}: there is no key {SHORT.repr(name)}{_instead(name, given)}")
                continue
            try:
                values[name] = coerce(name, given)
            except ValueError as error:
                found.append(f"{where}: {name} = {SHORT.repr(given)} {error}.")
    if found:
        good = {name: value for name, value in values.items() if name in FIELDS}
        raise ConfigError("\n".join(found + _limits_of(good)))
    return TrainConfig(**values)


def _instead(name: str, given: Any) -> str:
    """What to do about a key that does not exist, behind its name."""
    if isinstance(given, dict):
        return f": tables are not used. Write the keys at the top of the file, without [{name[:99]}]."
    if name not in ("preset", "presets"):
        return f".{nearest(name[:99], FIELDS)}"
    file = presets().get(given, PRESET_DIR) if isinstance(given, str) else PRESET_DIR
    return (
        f": a file does not take over a preset. Copy the keys that you want from {file}, "
        "or name the preset on the command line in place of the file."
    )


def _limits_of(values: dict[str, Any]) -> list[str]:
    """The problems of the values that could be read, so that all are reported at once."""
    try:
        TrainConfig(**values)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def presets() -> dict[str, Path]:
    """The presets by name."""
    return {path.stem: path for path in sorted(PRESET_DIR.glob("*.toml"))}


def read_source(source: str) -> dict[str, Any]:
    """The keys of a preset (lora, full, demo, ...) or of a TOML file."""
    known = presets()
    path = Path(source) if source.endswith(".toml") else known.get(source)
    if path is None:
        raise ConfigError(
            f"{source!r} is no preset ({', '.join(known)}) and no .toml file.{nearest(source, known)}"
            + " Several files: --train_file a.jsonl,b.jsonl, a pattern in quotes." * (".jsonl" in source)
        )
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: cannot be read: {'not a regular file' if path.exists() else 'no such file'}.")
        with open(path, "rb") as file:
            content = file.read(MAX_TOML_BYTES + 1)
        if len(content) > MAX_TOML_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_TOML_BYTES:,} bytes.")
        values = tomllib.loads(content.decode("utf-8-sig"))  # some editors begin a file with a byte order mark
    except ConfigError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    package = PRESET_DIR.parent  # "@" stands for it in presets, so that the demo runs from any folder
    inside = {k: str(package / v[1:]) for k, v in values.items() if isinstance(v, str) and v.startswith("@")}
    return values | inside if path.parent == PRESET_DIR else values


def coerce(name: str, given: Any) -> Any:
    """A value from TOML, JSON, Python or the command line in the type of its key. Raises ValueError."""
    hint = TYPES[name]
    if name in PATHS and isinstance(given, Path):
        given = str(given)
    if hint == tuple[str, ...]:
        return expand_targets([given] if isinstance(given, str) else given)
    if hint == tuple[float, ...]:
        return as_numbers(given)
    if hint == str | tuple[str, ...]:
        return as_paths(given)
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
        return as_number(hint, given)
    if not isinstance(given, str):
        raise ValueError("is not a text")
    return os.path.expanduser(given) if name in PATHS else given  # the shell leaves --key=~/x as it is


def as_number(kind: type[int] | type[float], given: Any) -> int | float:
    """A number from a number or a text. Raises ValueError."""
    try:
        found = kind(given)
        is_nan = found != found  # `problems` reports it
        if not isinstance(given, bool) and (found == given or is_nan or isinstance(given, str)):
            return found
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"is not {'a whole number' if kind is int else 'a number'}")


def as_numbers(given: Any) -> tuple[float, ...]:
    """Numbers from a list, or from a text in which commas separate them. Raises ValueError."""
    parts = given.split(",") if isinstance(given, str) else given if isinstance(given, (list, tuple)) else [given]
    return tuple(as_number(float, part) for part in parts if not isinstance(part, str) or part.strip())


def as_paths(given: Any) -> str | tuple[str, ...]:
    """A path, or several: a list, a text in which commas separate them, a pattern; a name with a comma in it is one."""
    parts = [given]
    if isinstance(given, str) and "," in given and not os.path.lexists(os.path.expanduser(given)):
        parts = [part.strip() for part in given.split(",")]
    elif isinstance(given, (list, tuple)):
        parts = [str(part) if isinstance(part, Path) else part for part in given]
    if not parts or not all(isinstance(part, str) for part in parts):
        raise ValueError("is not a text")
    found = tuple(path for part in parts for path in _matches(os.path.expanduser(part)))  # the shell leaves --key=~/x
    return found[0] if len(found) == 1 and (isinstance(given, str) or "," not in found[0]) else found


def _matches(path: str) -> list[str]:
    """The files that a pattern (*, ?, [...]) stands for, in the order of their names; any other path is itself."""
    if os.path.lexists(path) or not glob.has_magic(path) or "\0" in path:
        return [path]
    if found := sorted(each for each in glob.glob(path, recursive=True) if not os.path.isdir(each)):
        return found
    raise ValueError(f"has {SHORT.repr(path)}, a pattern that matches no file")


def expand_targets(names: Any) -> tuple[str, ...]:
    """attn | mlp | all become the projections they stand for; other names pass, commas separate, repeats go."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError("is not a list of names")
    parts = [part.strip() for name in names for part in name.split(",") if part.strip()]
    return tuple(dict.fromkeys(each for part in parts for each in TARGET_GROUPS.get(part, (part,))))
