"""A run is a folder: its name, its one writer, and the checkpoint it goes on from."""

import fcntl
import os
import re
from pathlib import Path
from typing import Any, Self

from minilora import checkpoint, files
from minilora.config import TrainConfig
from minilora.errors import CheckpointError, ConfigError

CONFIG = "config.json"


def choose(config: TrainConfig) -> tuple[Path, Path | None, list[str]]:
    """(the run's folder, the checkpoint to go on from or None, what to tell the user about the choice).

    Raises ConfigError when a new run would overwrite another, CheckpointError when `resume` names no checkpoint.
    """
    if config.resume not in ("auto", "never"):
        run, found, notes = _named(Path(config.resume))
        if config.output_dir and Path(config.output_dir).resolve() != run.resolve():
            raise ConfigError(
                f"--resume {config.resume} goes on in {run}, and --output_dir {config.output_dir} is another folder: "
                "leave it out, or copy the run there and resume the copy."
            )
        return run, found, notes
    if config.resume == "never":
        run = Path(config.output_dir) if config.output_dir else _free_name(_stem(config))
        if (run / CONFIG).exists() or checkpoint.checkpoints(run):
            raise ConfigError(f"{run} holds a run: --resume auto goes on with it, another --output_dir starts anew.")
        return run, None, []
    run = Path(config.output_dir) if config.output_dir else _latest(_stem(config))
    found, refused = checkpoint.newest_valid(run)
    notes = [f"passed over: {why}" for why in refused]
    return run, found, [*notes, f"resuming from {found}" if found else f"no checkpoint in {run} yet: starting anew"]


def _named(path: Path) -> tuple[Path, Path | None, list[str]]:
    """The run and checkpoint that --resume PATH means: a checkpoint, or the newest valid one of a run."""
    if path.parent.name == "checkpoints":
        checkpoint.validate(path)
        return path.parent.parent, path, [f"resuming from {path}"]
    found, refused = checkpoint.newest_valid(path)
    if found is None and not refused and (path / CONFIG).is_file():
        return path, None, [f"no checkpoint in {path} yet: starting anew"]
    if found is None:
        why = "; ".join(refused) or "it has no checkpoints"
        raise CheckpointError(f"--resume {path}: no valid checkpoint there: {why}.")
    return path, found, [*(f"passed over: {why}" for why in refused), f"resuming from {found}"]


def _stem(config: TrainConfig) -> Path:
    parts = [part for part in Path(config.model).parts if part not in ("model", "/")]
    name = f"{config.method}-{parts[-1] if parts else 'model'}-{Path(config.train_file).stem}"
    return Path("runs") / re.sub(r"[^\w.-]+", "-", name).lower()


def _names(stem: Path) -> list[Path]:
    """stem, stem-2, stem-3, ...: those that are taken, in order, and the first free one."""
    names = [stem]
    while names[-1].exists():
        names.append(stem.with_name(f"{stem.name}-{len(names) + 1}"))
    return names


def _free_name(stem: Path) -> Path:
    return _names(stem)[-1]


def _latest(stem: Path) -> Path:
    """The newest run of this name that has something to go on from; a start that failed leaves an empty folder."""
    return next((run for run in reversed(_names(stem)[:-1]) if checkpoint.checkpoints(run)), _free_name(stem))


class RunLock:
    """One run folder, one writer. The kernel frees the lock of a dead owner, so none is ever left over."""

    def __init__(self, run: Path) -> None:
        self._path = run / ".lock"
        with files.storage_errors(self._path):
            os.makedirs(run, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(self._descriptor, 32).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise ConfigError(f"{run} is being written by process {owner}; wait for it or give --output_dir") from error
        with files.storage_errors(self._path):
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"{os.getpid()}\n".encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def saved_config(path: Path) -> dict[str, Any]:
    """The settings of the run that --resume PATH means, to lie under the command line's."""
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    if not (run / CONFIG).is_file():
        raise CheckpointError(f"--resume {path}: there is no run: {run / CONFIG} is missing.")
    saved = checkpoint.read_json(run / CONFIG).get("config")
    if not isinstance(saved, dict):
        raise CheckpointError(f"{run / CONFIG}: 'config' is missing: this is no run of minilora.")
    return {key: value for key, value in saved.items() if key not in ("resume", "output_dir")}
