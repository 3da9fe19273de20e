"""The state of a whole run in a folder: safetensors and JSON, a manifest written last, found again only when whole."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minilora import files
from minilora.errors import CheckpointError

SCHEMA = 1
MANIFEST = "manifest.json"
WEIGHTS, MOMENTS, STATE = "trainable.safetensors", "optimizer.safetensors", "state.json"
MAX_MANIFEST_BYTES = 4 * 2**20
EMPTY_SAFETENSORS_BYTES = 64  # a header without tensors
# Keys a resumed run may change: they decide how long, how fast and how talkative a run is, not what a step computes.
FREE_KEYS = frozenset(
    (
        *("model", "train_file", "eval_file"),  # their content is compared, not their place
        *("output_dir", "resume", "device", "on_bad_rows", "logging_steps", "eval_steps", "save_steps"),
        *("save_total_limit", "num_train_epochs", "max_steps", "early_stopping_patience"),
        *("max_tokens_per_micro_batch", "gradient_checkpointing", "packing", "share_prefix"),
    )
)


@dataclass
class TrainState:
    """What a run knows beyond weights and moments; all of it survives a resume."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0  # inside training steps
    skipped_steps: int = 0  # for non-finite loss or gradient
    skipped_in_a_row: int = 0
    asked_tokens: int = 0  # token budget of a micro-batch as the settings say
    max_tokens: int = 0  # the one in force: lowered by out-of-memory
    first_loss: float | None = None
    last_loss: float | None = None
    first_eval_loss: float | None = None
    last_eval_loss: float | None = None
    best_eval_loss: float | None = None
    evals_since_best: int = 0
    evaluated_step: int = -1  # the step of the last evaluation


@dataclass(frozen=True)
class Identity:
    """What must be the same for a checkpoint to continue exactly."""

    config: dict[str, Any]
    base_fingerprint: str
    dataset_sha256: str
    versions: dict[str, str]

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """What has changed since `saved` was written, a line each; FREE_KEYS may."""
        before = saved.get("config", {})
        changed = [
            f"{key}: was {before.get(key)!r}, is {value!r}"
            for key, value in self.config.items()
            if key not in FREE_KEYS and before.get(key) != value
        ]
        for key, words in (("base_fingerprint", "the base model"), ("dataset_sha256", "the training data")):
            if saved.get(key) != getattr(self, key):
                changed.append(f"{words} has changed: fingerprint {saved.get(key)}, is {getattr(self, key)}")
        return changed


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name, in the model's order."""
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:06d}"


def save(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, identity: Identity, keep: int
) -> Path:
    """Write the checkpoint of state.step, check it, then delete all but the newest `keep` (0: none)."""
    path = checkpoint_path(run, state.step)
    params = trainable(model)
    moments = {
        f"{name}.{key}": value for name, param in params.items() for key, value in optimizer.state[param].items()
    }
    with files.new_folder(path) as folder:
        records = {
            WEIGHTS: files.write_file(folder / WEIGHTS, files.safetensors_chunks(params, {"format": "pt"})),
            MOMENTS: files.write_file(folder / MOMENTS, files.safetensors_chunks(moments, {"format": "pt"})),
            STATE: files.write_file(folder / STATE, files.json_chunks(dataclasses.asdict(state))),
        }
        manifest = {
            "schema": SCHEMA,
            "step": state.step,
            "files": {name: dataclasses.asdict(record) for name, record in records.items()},
            **dataclasses.asdict(identity),
        }
        files.write_file(folder / MANIFEST, files.json_chunks(manifest | {"sha256": _own_sha256(manifest)}))
    validate(path)
    with files.storage_errors(path.parent):
        for old in checkpoints(run)[keep:] if keep else []:
            if old != path:
                files.remove_folder(old)
    return path


def _own_sha256(manifest: Mapping[str, Any]) -> str:
    """The hash a manifest carries of itself: of its canonical JSON without that hash."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def remove_after(run: Path, step: int) -> None:
    """Delete the checkpoints of later steps: damaged, or of a way that the run is taken back from."""
    with files.storage_errors(run):
        for path in checkpoints(run):
            if int(path.name[5:]) > step:
                files.remove_folder(path)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first, valid or not."""
    folder = run / "checkpoints"
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{6,12}", path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def validate(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint all of whose bytes are as they were written. Raises CheckpointError."""
    manifest = read_json(path / MANIFEST)
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(f"{path / MANIFEST}: schema is {manifest.get('schema')!r}, this version reads {SCHEMA}.")
    as_written = b"".join(files.json_chunks(manifest))
    if manifest.get("sha256") != _own_sha256(manifest) or (path / MANIFEST).read_bytes() != as_written:
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
            size = file.stat().st_size
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
    """Whether a checkpoint is there and whole."""
    try:
        validate(path)
    except CheckpointError:
        return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of moderate size. Raises CheckpointError naming the file."""
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes, this is none of ours.")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is needed.")
    return value


def newest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint that is whole, or None; why newer ones were passed over)."""
    refused: list[str] = []
    for path in checkpoints(run):
        try:
            validate(path)
            return path, refused
        except CheckpointError as error:
            refused.append(str(error))
    return None, refused


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: Identity) -> TrainState:
    """Put a checkpoint's weights, moments and counters in place. Raises CheckpointError before anything is changed."""
    manifest = validate(path)
    if changed := identity.differences(manifest):
        raise CheckpointError(
            f"{path} belongs to another run; what has changed:\n  "
            + "\n  ".join(changed)
            + "\nGo back to those settings, or start anew: --resume never with another --output_dir"
        )
    params = trainable(model)
    weights = _read_tensors(path / WEIGHTS, {name: tuple(param.shape) for name, param in params.items()})
    shapes = {f"{name}.{key}": tuple(p.shape) for name, p in params.items() for key in ("exp_avg", "exp_avg_sq")}
    stepped = manifest["files"][MOMENTS]["size"] > EMPTY_SAFETENSORS_BYTES  # not when every step so far was skipped
    moments = _read_tensors(path / MOMENTS, shapes | {f"{name}.step": () for name in params} if stepped else {})
    fields = {field.name for field in dataclasses.fields(TrainState)}
    saved = read_json(path / STATE)
    if set(saved) != fields:
        raise CheckpointError(
            f"{path / STATE}: the fields are not those of this version: {sorted(set(saved) ^ fields)}"
        )
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(weights[name])
            if stepped:
                keys = ("step", "exp_avg", "exp_avg_sq")
                optimizer.state[param] = {key: moments[f"{name}.{key}"].to(param.device) for key in keys}
    return TrainState(**saved)


def _read_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a file that must hold exactly these names and shapes."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if found != shapes:
                odd = sorted(set(found.items()) ^ set(shapes.items()))[:5]
                raise CheckpointError(f"{path}: tensors do not fit this model: {odd}")
            return {name: file.get_tensor(name) for name in found}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error
