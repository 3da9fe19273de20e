"""The folder of a run: its name, the lock of its one writer, and the checkpoint to resume from."""

import dataclasses
import fcntl
import os
import re
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from minilora.config import TrainConfig
from minilora.errors import CheckpointError, ConfigError, ModelError
from minilora.training import checkpoint
from minilora.utils import files

CONFIG = "config.json"
MAX_NAME_CHARS = 80  # of a default folder; at 3 bytes each they stay below the file system's limit of 255 bytes


def lock_run_dir(config: TrainConfig, held: ExitStack) -> tuple[Path, Path | None, list[str]]:
    """(the run's folder, locked; the checkpoint to resume from, or None; notes for the header).

    Another start may take the chosen folder before the lock is held, so the choice is repeated under the lock.
    Raises what `resolve_run_dir` raises, ConfigError for a folder that another process writes, CheckpointError for a
    damaged checkpoint.
    """
    folder = resolve_run_dir(config)
    while True:
        with ExitStack() as stack:
            try:
                stack.enter_context(RunLock(folder))
                chosen = resolve_run_dir(config, locked=folder)
            except ConfigError:
                chosen = resolve_run_dir(config)  # a new name, unless the user gave the name
                if chosen == folder:
                    raise
            if chosen == folder:
                found, notes = _starting_point(config, folder)
                held.push(stack.pop_all())
                return folder, found, notes
            folder = chosen


def resolve_run_dir(config: TrainConfig, locked: Path | None = None) -> Path:
    """The run's folder. A folder that this process has `locked` counts as free while it holds no run.

    Raises ConfigError if a new run would overwrite another, CheckpointError if `resume` names no run.
    """
    if config.resume not in ("auto", "never"):
        run = _run_of(Path(config.resume))
        if config.output_dir and Path(config.output_dir).resolve() != run.resolve():
            raise ConfigError(
                f"--resume {config.resume} continues in {run}, but --output_dir {config.output_dir} is another folder: "
                "leave out --output_dir, or copy the run there and resume the copy."
            )
        if not _holds_a_run(run):
            raise CheckpointError(f"--resume {config.resume}: no valid checkpoint there: it has no checkpoints.")
        return run
    if config.output_dir:
        run = Path(config.output_dir)
    else:
        names = _names(_stem(config), locked)
        resumable = [name for name in reversed(names[:-1]) if checkpoint.checkpoints(name)]  # the rest failed to start
        run = resumable[0] if resumable and config.resume == "auto" else names[-1]
    if config.resume == "never" and _holds_a_run(run):
        raise ConfigError(f"{run} holds a run: --resume auto continues it, another --output_dir starts a new one.")
    return run


def _starting_point(config: TrainConfig, run: Path) -> tuple[Path | None, list[str]]:
    """(the checkpoint to resume from, or None; notes for the header)."""
    if config.resume == "never":
        return None, []
    path = Path(config.resume)
    if config.resume != "auto" and path != run:
        checkpoint.validate(path)
        step = checkpoint.step_of(path)
        later = [each.name for each in checkpoint.checkpoints(run) if checkpoint.step_of(each) > step]
        later += [checkpoint.BEST] * checkpoint.best_is_abandoned(run, checkpoint.read_state(path))
        note = f"{', '.join(later)}: saved after this checkpoint; deleted when the next checkpoint is saved"
        return path, [f"resuming from {path}", *([note] if later else [])]
    found, refused = checkpoint.newest_valid(run)
    if config.resume != "auto" and found is None and refused:
        raise CheckpointError(f"--resume {path}: no valid checkpoint there: {'; '.join(refused)}.")
    notes = [f"skipped: {why}" for why in refused]
    return found, [*notes, f"resuming from {found}" if found else f"no checkpoint in {run} yet: starting a new run"]


def _run_of(path: Path) -> Path:
    """The run of --resume PATH, which names its folder or one of its checkpoints."""
    return path.parent.parent if path.parent.name == "checkpoints" else path


def _holds_a_run(run: Path) -> bool:
    with files.storage_errors(run):  # a name may be too long for the file system
        return (run / CONFIG).exists() or bool(checkpoint.checkpoints(run))


def _stem(config: TrainConfig) -> Path:
    parts = [part for part in Path(config.model).parts if part not in ("model", "/")]
    rows = "-".join(Path(path).stem for path in config.train_files)
    name = f"{config.method}-{parts[-1] if parts else 'model'}-{rows}"
    return Path("runs") / re.sub(r"[^\w.-]+", "-", name).lower()[:MAX_NAME_CHARS]


def _names(stem: Path, locked: Path | None) -> list[Path]:
    """stem, stem-2, stem-3, ...: the taken names in order, then the first free one."""
    names = [stem]
    while names[-1].exists() and (names[-1] != locked or _holds_a_run(names[-1])):
        names.append(stem.with_name(f"{stem.name}-{len(names) + 1}"))
    return names


class RunLock:
    """The lock of a run folder: only one process writes it. The kernel releases the lock of a dead process.

    A folder that was created for the lock and holds nothing else is deleted when the lock is released.
    """

    def __init__(self, run: Path) -> None:
        self._run, self._path = run, run / ".lock"
        self._created = not os.path.lexists(run)
        self._take()
        while not self._is_in_place():  # a failed start deleted the folder after this process had opened the file
            os.close(self._descriptor)
            self._take()
        with files.storage_errors(self._path):
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"{os.getpid()}\n".encode())

    def _take(self) -> None:
        with files.storage_errors(self._path):
            os.makedirs(self._run, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(self._descriptor, 32).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise ConfigError(
                f"{self._run} is being written by process {owner}; wait for it or give another --output_dir"
            ) from error

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # the folder may be gone: the first process to get here deletes it
            if os.listdir(self._run) == [self._path.name] and self._is_in_place():
                os.unlink(self._path)
                if self._created:
                    os.rmdir(self._run)
        os.close(self._descriptor)


def lasting_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings as saved in a run: paths are absolute, so that the run can be resumed from any folder."""
    settings = dataclasses.asdict(config)
    settings |= {key: list(value) for key, value in settings.items() if isinstance(value, tuple)}
    local = os.path.expanduser(config.model)
    paths = {"eval_file": config.eval_file, "adapter": config.adapter} | (
        {"model": local} if os.path.isdir(local) else {}
    )
    settings |= {key: os.path.abspath(path) for key, path in paths.items() if path}
    train_files = [os.path.abspath(path) for path in config.train_files]
    return settings | {"train_file": train_files if len(train_files) > 1 else train_files[0]}


def saved_config(path: Path, with_base: bool = False) -> dict[str, Any]:
    """The settings of the run of --resume PATH; keys of the command line override them.

    with_base: raise ModelError if the run's base was a folder that is no longer there
    """
    run = _run_of(path)
    if not os.path.isfile(run / CONFIG):  # raises no error, even if the name is too long
        raise CheckpointError(f"--resume {path}: there is no run: {run / CONFIG} is missing.")
    saved = checkpoint.read_json(run / CONFIG).get("config")
    if not isinstance(saved, dict):
        raise CheckpointError(f"{run / CONFIG}: 'config' is missing: this is not a run of minilora.")
    base = str(saved.get("model"))
    if with_base and os.path.isabs(base) and not os.path.isdir(base):
        raise ModelError(
            f"{run / CONFIG} names the base {base}: there is no such folder. Give its new place as --model."
        )
    return {key: value for key, value in saved.items() if key not in ("resume", "output_dir")}
