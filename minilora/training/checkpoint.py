"""Checkpoints hold the complete state of a run in safetensors and JSON files, with a manifest that verifies them."""

import dataclasses
import hashlib
import json
import math
import re
import reprlib
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.config import FIELDS
from minilora.distributed.world import collect, full_tensor, sharded_like
from minilora.errors import CheckpointError, StorageError
from minilora.lora_variants import PiSSA
from minilora.utils import files

SCHEMA = 1
MANIFEST = "manifest.json"
WEIGHTS, MOMENTS, STATE = "trainable.safetensors", "optimizer.safetensors", "state.json"
BEST = "best"  # the folder of the adapter or model with the lowest held-out loss
MAX_HEADER_BYTES = 2**26
EMPTY_SAFETENSORS_BYTES = 64  # a header without tensors
# The keys that a resumed run may change: its length, speed and output. With unchanged keys a run continues bit for bit.
# The keys of the micro-batches change the draws of dropout. The keys of the length change the learning-rate schedule.
FREE_KEYS = frozenset(
    (
        *("model", "train_file", "eval_file"),  # their content is compared, not their path
        *("output_dir", "resume", "device", "on_bad_rows", "logging_steps", "eval_steps", "save_steps"),
        *("save_total_limit", "num_train_epochs", "max_steps", "early_stopping_patience", "eval_samples", "report_to"),
        *("max_tokens_per_micro_batch", "gradient_checkpointing", "packing", "share_prefix", "fsdp", "torch_compile"),
    )
)
NEWER_FIELDS = ("best_step",)  # of TrainState; checkpoints of 0.1 lack them
PER_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")  # their product with the world size must stay
DEFAULTS = {
    name: list(field.default) if isinstance(field.default, tuple) else field.default for name, field in FIELDS.items()
}


@dataclass
class TrainState:
    """The state of a run beyond weights and moments; a resumed run continues with all of it."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0  # inside training steps
    skipped_steps: int = 0  # because loss or gradient was not finite
    skipped_in_a_row: int = 0
    asked_tokens: int = 0  # token budget of a micro-batch in the settings
    max_tokens: int = 0  # the budget in use; running out of memory lowers it
    first_loss: float | None = None
    last_loss: float | None = None
    first_eval_loss: float | None = None
    last_eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_step: int = -1  # the step of that evaluation; -1 if none, or if 0.1 wrote the state without it
    evals_since_best: int = 0
    evaluated_step: int = -1  # the step of the last evaluation


@dataclass(frozen=True)
class Identity:
    """What must be unchanged so that a run can continue from a checkpoint."""

    config: dict[str, Any]
    base_fingerprint: str
    dataset_sha256: str
    versions: dict[str, str]
    world_size: int = 1  # number of processes; it may change if the examples per step do not

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """The changes since `saved` was written, one line each; FREE_KEYS are not compared.

        A key that is newer than `saved` counts as its default there.
        """
        before = saved.get("config")
        before = DEFAULTS | (before if isinstance(before, dict) else {})
        changed = [
            f"{key}: was {reprlib.repr(before.get(key))}, is {value!r}"
            for key, value in self.config.items()
            if key not in FREE_KEYS and key not in PER_STEP and before.get(key) != value
        ]
        was_text, were = per_step(before, saved.get("world_size", 1))
        now_text, are = per_step(self.config, self.world_size)
        if were != are:
            changed.append(f"examples per step: were {was_text}, are {now_text}{_batch_advice(were, self)}")
        for key, words in (("base_fingerprint", "the base model"), ("dataset_sha256", "the training data")):
            if saved.get(key) != getattr(self, key):
                before_it, now_it = str(saved.get(key)), str(getattr(self, key))
                starts = range(0, max(len(before_it), len(now_it)), 64)  # one hash per file; shows the first change
                at = next(start for start in starts if before_it[start : start + 64] != now_it[start : start + 64])
                was, now = (f"{value[at : at + 12] or 'none'}…" for value in (before_it, now_it))
                changed.append(f"{words} has changed: fingerprint was {was}, is now {now}")
        return changed


def per_step(config: Mapping[str, Any], world_size: Any) -> tuple[str, int]:
    """The examples per step, as a product in words and as a number; 0 if the settings are not numbers."""
    factors = [*(config.get(key) for key in PER_STEP), world_size]
    if not all(isinstance(factor, int) and 0 < factor < 2**31 for factor in factors):
        return "unknown", 0
    product = math.prod(factors)
    processes = f" x {world_size} processes" if world_size > 1 else ""
    return f"{factors[0]} x {factors[1]}{processes} = {product}", product


def _batch_advice(examples: int, identity: Identity) -> str:
    """The settings that give this number of examples per step, for a message."""
    size, each = identity.world_size, identity.config[PER_STEP[0]]
    if not examples:
        return ""
    if examples % (size * each) == 0:
        return f"; set --gradient_accumulation_steps {examples // (size * each)}"
    if examples % size == 0:
        return f"; set --per_device_train_batch_size {examples // size} --gradient_accumulation_steps 1"
    return f"; {size} processes cannot share {examples} equally: use a number of processes that divides {examples}"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, in the order of the model."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def starts(model: nn.Module) -> dict[str, Tensor]:
    """The frozen initial values of PiSSA adapters, by name. They are saved because machines round them differently."""
    return {name: buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in PiSSA.frozen}


def checkpoint_path(run: Path, step: int) -> Path:
    """The folder of the checkpoint of this step."""
    return run / "checkpoints" / f"step-{step:06d}"


def save(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, identity: Identity, keep: int
) -> Path:
    """Write the checkpoint of state.step and validate it; then delete abandoned files and old checkpoints.

    keep: the number of newest checkpoints that stay; 0 keeps all. For abandoned files see `remove_abandoned`.
    """
    path = checkpoint_path(run, state.step)
    weights, moments = contents(model, optimizer)
    with files.storage_errors(path.parent):
        files.sweep(path.parent)
    with files.new_folder(path, saved_before=bool(checkpoints(run))) as folder:
        records = {
            WEIGHTS: files.write_file(
                folder / WEIGHTS, files.safetensors_chunks(weights, {"format": "pt"}, full_tensor)
            ),
            MOMENTS: files.write_file(
                folder / MOMENTS, files.safetensors_chunks(moments, {"format": "pt"}, full_tensor)
            ),
            STATE: files.write_file(folder / STATE, files.json_chunks(dataclasses.asdict(state))),
        }
        manifest = {
            "schema": SCHEMA,
            "step": state.step,
            "files": {name: dataclasses.asdict(record) for name, record in records.items()},
            **dataclasses.asdict(identity),
        }
        files.write_file(folder / MANIFEST, files.json_chunks(manifest | {"sha256": _own_sha256(manifest)}))
    try:
        validate(path)
    except CheckpointError as error:  # only the disk can be the cause
        raise StorageError(f"{error} What was saved before is intact.") from error
    remove_abandoned(run, state)
    with files.storage_errors(path.parent):
        for old in checkpoints(run)[keep:] if keep else []:
            if old != path:
                files.remove_folder(old)
    return path


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(trained parameters and frozen initial values, moments of the optimizer), by name, in the order of writing."""
    params = trainable(model)
    moments = {
        f"{name}.{key}": value for name, param in params.items() for key, value in optimizer.state[param].items()
    }
    return params | starts(model), moments


def take_part(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Send the shards of this process to the one that writes the checkpoint, in the order of `save`."""
    for tensors in contents(model, optimizer):
        collect(tensors.values())


def _own_sha256(manifest: Mapping[str, Any]) -> str:
    """The hash that a manifest holds of itself: that of its canonical JSON without the hash."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def remove_abandoned(run: Path, state: TrainState) -> None:
    """Delete the checkpoints of later steps, and best/ if `state` does not know it. Call it after `state` is saved.

    A run that was resumed from an earlier checkpoint has abandoned them. A later checkpoint may also be damaged.
    """
    with files.storage_errors(run):
        if best_is_abandoned(run, state):
            files.remove_folder(run / BEST)
    remove_after(run, state.step)


def best_is_abandoned(run: Path, state: TrainState) -> bool:
    """Whether best/ was saved at another step than the best step of `state`.

    0.1 recorded the step neither in best/ nor in the state. Its best/ stays unless there are later checkpoints.
    """
    if not (run / BEST).is_dir():
        return False
    step = saved_step(run / BEST)
    went_back = any(step_of(path) > state.step for path in checkpoints(run))
    return step != state.best_step or (step < 0 and went_back)


def saved_step(folder: Path) -> int:
    """The step at which an adapter or model was saved, from the header of its weights; -1 if it is not recorded."""
    for name in ("adapter_model.safetensors", "model.safetensors"):
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            return int(files.safetensors_header(folder / name, MAX_HEADER_BYTES)["__metadata__"]["step"])
    return -1


def remove_after(run: Path, step: int) -> None:
    """Delete the checkpoints of later steps."""
    with files.storage_errors(run):
        for path in checkpoints(run):
            if step_of(path) > step:
                files.remove_folder(path)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first; they may be invalid."""
    folder = run / "checkpoints"
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{6,12}", path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder; 0 if the name has none."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else 0


def validate(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError if any byte of the checkpoint has changed."""
    manifest = read_json(path / MANIFEST)
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(f"{path / MANIFEST}: schema is {manifest.get('schema')!r}, this version reads {SCHEMA}.")
    try:
        content = files.read_bytes(path / MANIFEST)
    except ValueError as error:
        raise CheckpointError(f"{path / MANIFEST}: {error}.") from error
    try:
        as_written = b"".join(files.json_chunks(manifest))
        unchanged = manifest.get("sha256") == _own_sha256(manifest) and content == as_written
    except ValueError:  # NaN or lone surrogates, which minilora never writes
        unchanged = False
    if not unchanged:
        raise CheckpointError(f"{path / MANIFEST}: it has changed since it was written (sha256 differs).")
    records = manifest.get("files")
    if not isinstance(records, dict) or set(records) != {WEIGHTS, MOMENTS, STATE}:
        raise CheckpointError(
            f"{path / MANIFEST}: 'files' must name {WEIGHTS}, {MOMENTS} and {STATE}, and nothing else."
        )
    for name in (WEIGHTS, MOMENTS, STATE):
        record, file = records[name], path / name
        if not isinstance(record, dict):
            raise CheckpointError(f"{path / MANIFEST}: the entry of {name} is not an object.")
        try:
            status = file.stat()
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{file}: not a regular file.")
            size = status.st_size
            if size != record.get("size"):
                raise CheckpointError(f"{file}: {size} bytes, the manifest says {record.get('size')}.")
            with open(file, "rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror}.") from error
        if digest != record.get("sha256"):
            raise CheckpointError(f"{file}: its bytes have changed since it was written (sha256 differs).")
    return manifest


def is_valid(path: Path) -> bool:
    """Whether a checkpoint exists and is valid."""
    try:
        validate(path)
    except CheckpointError:
        return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a run. Raises CheckpointError with the name of the file."""
    try:
        return files.read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}.") from error


def newest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """(the newest valid checkpoint, or None; the reasons why newer ones were skipped)."""
    refused: list[str] = []
    for path in checkpoints(run):
        try:
            validate(path)
            return path, refused
        except CheckpointError as error:
            refused.append(str(error))
    return None, refused


def _other_rows(run: Path, identity: Identity, saved: Mapping[str, Any]) -> str:
    """The advice for a finished run whose rows have changed; empty in other cases."""
    flag = "adapter" if identity.config["method"] == "lora" else "model"
    if saved.get("dataset_sha256") == identity.dataset_sha256 or not (run / flag).is_dir():
        return ""
    return f"\nTo train its result on other rows, start a new run from it: --{flag} {run / flag}"


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: Identity) -> TrainState:
    """Load weights and moments, and return the state. Raises CheckpointError before it changes anything."""
    manifest = validate(path)
    if changed := identity.differences(manifest):
        raise CheckpointError(
            f"{path} belongs to another run. Changes:\n  "
            + "\n  ".join(changed)
            + "\nRestore those settings, or start a new run: --resume never with another --output_dir"
            + _other_rows(path.parent.parent, identity, manifest)
        )
    params, frozen = trainable(model), starts(model)
    kept = params | frozen
    weights = _read_tensors(path / WEIGHTS, {name: tuple(tensor.shape) for name, tensor in kept.items()})
    shapes = {f"{name}.{key}": tuple(p.shape) for name, p in params.items() for key in ("exp_avg", "exp_avg_sq")}
    stepped = manifest["files"][MOMENTS]["size"] > EMPTY_SAFETENSORS_BYTES  # false if every step so far was skipped
    moments = _read_tensors(path / MOMENTS, shapes | {f"{name}.step": () for name in params} if stepped else {})
    state = read_state(path)
    with torch.no_grad():
        for name, buffer in frozen.items():
            buffer.copy_(weights[name])
        for name, param in params.items():
            param.copy_(sharded_like(param, weights[name]))
            if stepped:
                keys = ("step", "exp_avg", "exp_avg_sq")
                own = {key: moments[f"{name}.{key}"].to(param.device) for key in keys}
                optimizer.state[param] = {key: sharded_like(param, value) for key, value in own.items()}
    return state


def _read_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    try:
        return files.read_tensors(path, shapes)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_state(checkpoint: Path) -> TrainState:
    """The TrainState of a checkpoint, with checked types. Raises CheckpointError."""
    path = checkpoint / STATE
    saved = read_json(path)
    types = {field.name: field.type for field in dataclasses.fields(TrainState)}
    if unknown := sorted(set(saved) ^ (set(types) - (set(NEWER_FIELDS) - set(saved)))):
        raise CheckpointError(f"{path}: the fields are not those of this version: {unknown[:5]}")
    allowed = {"int": (int,), "float": (int, float), "float | None": (int, float, type(None))}
    for key, value in saved.items():
        fits = isinstance(value, allowed[str(getattr(types[key], "__name__", types[key]))])
        if not fits or isinstance(value, bool) or (value is not None and not abs(value) < 2**62):
            raise CheckpointError(f"{path}: {key} = {reprlib.repr(value)} is not usable.")
    return TrainState(**saved)
