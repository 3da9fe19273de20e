"""Checkpoints: whole or not there, whatever fails in between; refused when they are another run's."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from minilora.config import FIELDS, TrainConfig
from minilora.errors import CheckpointError, ConfigError, MiniloraError, StorageError
from minilora.optim import make_optimizer
from minilora.training import checkpoint
from minilora.training.checkpoint import FREE_KEYS, PER_STEP, Identity, TrainState, newest_valid, validate
from minilora.training.rundir import RunLock
from minilora.utils import files

IDENTITY = Identity(
    dataclasses.asdict(TrainConfig()) | {"target_modules": ["q_proj"], "train_weights": [1.0]},
    "b" * 64,
    "d" * 64,
    {"torch": "2"},
)


class Trained:
    """A small model and its AdamW after some steps."""

    def __init__(self, steps=3, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).requires_grad_(True)
        self.model[0].bias.requires_grad_(False)
        self.optimizer = make_optimizer(self.model, weight_decay=0.01)
        self.state = TrainState(step=0, max_tokens=99)
        self.go(steps)

    def go(self, steps):
        for _ in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = 0.01
            torch.manual_seed(self.state.step)
            self.model(torch.randn(5, 4)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.step += 1
            self.state.last_loss = 1 / self.state.step
        return self

    def save(self, run, keep=0, identity=IDENTITY):
        return checkpoint.save(run, self.model, self.optimizer, self.state, identity, keep)

    def load(self, path, identity=IDENTITY):
        self.state = checkpoint.load(path, self.model, self.optimizer, identity)
        return self

    def bits(self):
        """All that training depends on, as text."""
        named = {name: param.tolist() for name, param in self.model.named_parameters()}
        moments = [{k: v.tolist() for k, v in self.optimizer.state[p].items()} for p in self.model.parameters()]
        return json.dumps([named, moments, dataclasses.asdict(self.state)])


# ---------------------------------------------------------------------------------------- there and back


def test_round_trip_and_going_on(tmp_path):
    path = Trained(3).save(tmp_path)
    assert path == tmp_path / "checkpoints" / "step-000003"
    resumed = Trained(1, seed=7)
    resumed.model[0].bias = Trained(0).model[0].bias  # frozen: the base's, not the checkpoint's
    assert resumed.load(path).bits() == Trained(3).bits()
    assert resumed.go(4).bits() == Trained(7).bits()


def test_every_field_of_the_state_survives(tmp_path):
    trained = Trained(2)
    fields = dataclasses.fields(TrainState)
    values = {f.name: n + (0.5 if "loss" in f.name or f.name == "seconds" else 0) for n, f in enumerate(fields, 2)}
    trained.state = TrainState(**(values | {"step": 2}))
    trained.save(tmp_path)
    assert checkpoint.load(
        checkpoint.checkpoint_path(tmp_path, 2), trained.model, trained.optimizer, IDENTITY
    ) == TrainState(**(values | {"step": 2}))


def test_a_run_all_of_whose_steps_were_skipped_can_be_saved_and_loaded(tmp_path):
    """AdamW has no moments then; loading once asked for them."""
    fresh = Trained(0)
    path = fresh.save(tmp_path)
    assert Trained(0).load(path).go(2).bits() == Trained(2).bits()


def test_there_is_no_pickle(tmp_path):
    """Only safetensors and JSON, so that reading a checkpoint can run nothing."""
    path = Trained().save(tmp_path)
    assert {p.name for p in path.iterdir()} == {
        *("manifest.json", "state.json", "trainable.safetensors", "optimizer.safetensors")
    }
    json.loads((path / "manifest.json").read_text())
    json.loads((path / "state.json").read_text())
    source = "".join(p.read_text() for p in Path(checkpoint.__file__).parent.parent.rglob("*.py"))
    assert "torch.load(" not in source
    assert "torch.save(" not in source
    assert "import pickle" not in source


def test_the_manifest_is_written_last_and_on_the_disk_before_the_name(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(files, "os", Calls(lambda name, args: events.append((name, args))))
    path = Trained().save(tmp_path)
    opened = [Path(args[0]).name for name, args in events if name == "open" and args[1] & os.O_CREAT]
    assert opened[-1] == "manifest.json"
    assert sorted(opened) == sorted(["manifest.json", "state.json", "trainable.safetensors", "optimizer.safetensors"])
    renamed = next(i for i, (name, args) in enumerate(events) if name == "rename" and args[1] == path)
    synced = [i for i, (name, _) in enumerate(events) if name == "fsync"]
    assert sum(i < renamed for i in synced) == 5  # four files and the folder that holds them
    assert sum(i > renamed for i in synced) == 1  # the folder that holds the name


def test_the_limit_keeps_the_newest(tmp_path):
    trained = Trained(0)
    for _ in range(5):
        trained.go(1).save(tmp_path, keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000005", "step-000004"]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-000005", "step-000004"}
    for _ in range(3):
        trained.go(1).save(tmp_path, keep=0)
    assert len(checkpoint.checkpoints(tmp_path)) == 5


def test_steps_are_ordered_as_numbers(tmp_path):
    trained = Trained(0)
    for step in (999_999, 1_000_000):
        trained.state.step = step
        trained.save(tmp_path)
    assert newest_valid(tmp_path)[0].name == "step-1000000"


def test_file_modes_follow_the_umask(tmp_path):
    """safetensors' own save_file makes files that only their owner can read, whatever the umask says."""
    for umask, file_mode, folder_mode in ((0o022, 0o644, 0o755), (0o027, 0o640, 0o750)):
        before = os.umask(umask)
        try:
            path = Trained().save(tmp_path / oct(umask))
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == folder_mode
        assert {p.stat().st_mode & 0o777 for p in path.iterdir()} == {file_mode}


# ---------------------------------------------------------------------------------------- damage


def flip(file, place, bit=0):
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_flipped_bit_anywhere_is_found(tmp_path, name):
    """safetensors notices a truncated file and not a flipped bit. In the manifest it is in no file's sha256."""
    path = Trained(1).save(tmp_path)
    file = path / name
    whole = file.read_bytes()
    unnoticed = []
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        flip(file, place, bit=place % 8)
        try:
            validate(path)
            unnoticed.append((place, whole[max(0, place - 12) : place + 12]))
        except CheckpointError:
            pass
        file.write_bytes(whole)
    validate(path)
    assert not unnoticed


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_truncated_missing_and_foreign_files_are_found(tmp_path, name):
    path = Trained(1).save(tmp_path)
    file = path / name
    whole = file.read_bytes()
    for content in (b"", whole[:-2], whole + b"\n{}", b"null", b"[" * 10**5, b"\xff"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            validate(path)
    file.unlink()
    with pytest.raises(CheckpointError, match=name):
        validate(path)
    file.mkdir()
    with pytest.raises(CheckpointError, match=name):
        validate(path)


@pytest.mark.parametrize("change", [{"schema": 2}, {"files": {}}, {"files": None}, {"files": {"../x": {"size": 0}}}])
def test_a_manifest_of_another_make_is_refused(tmp_path, change):
    path = Trained(1).save(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(CheckpointError, match="manifest"):
        validate(path)


def test_the_damaged_one_is_passed_over_and_said(tmp_path):
    trained = Trained(0)
    for _ in range(3):
        trained.go(1).save(tmp_path)
    assert newest_valid(tmp_path) == (checkpoint.checkpoint_path(tmp_path, 3), [])
    flip(checkpoint.checkpoint_path(tmp_path, 3) / "trainable.safetensors", -1)
    (checkpoint.checkpoint_path(tmp_path, 2) / "manifest.json").unlink()
    (tmp_path / "checkpoints" / "step-000009.old").mkdir()
    (tmp_path / "checkpoints" / ".step-000010.partial").mkdir()
    found, refused = newest_valid(tmp_path)
    assert found == checkpoint.checkpoint_path(tmp_path, 1)
    assert len(refused) == 2
    assert "step-000003" in refused[0]
    assert "trainable.safetensors" in refused[0]
    assert "step-000002" in refused[1]
    assert "manifest.json" in refused[1]
    shutil.rmtree(found)
    assert newest_valid(tmp_path)[0] is None
    assert newest_valid(tmp_path / "nowhere") == (None, [])


# ---------------------------------------------------------------------------------------- another run's


def other_value(key):
    value = IDENTITY.config[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return [*value, "x"] if isinstance(value, list) else f"{value}x"


@pytest.mark.parametrize("key", sorted(FIELDS))
def test_a_changed_key_is_named_and_refused_unless_it_is_free(tmp_path, key):
    path = Trained(1).save(tmp_path)
    changed = dataclasses.replace(IDENTITY, config=IDENTITY.config | {key: other_value(key)})
    fresh = Trained(2, seed=3)
    before = fresh.bits()
    if key in FREE_KEYS:
        fresh.load(path, changed)
        assert fresh.state.step == 1
        return
    with pytest.raises(CheckpointError) as error:
        fresh.load(path, changed)
    text = str(error.value)
    part = (
        "examples per step: were 4 x 8 = 32, are " if key in PER_STEP else f"{key}: was {IDENTITY.config[key]!r}, is "
    )
    assert part in text
    assert key in PER_STEP or f", is {other_value(key)!r}" in text
    assert text.count("\n") == 2  # this key and no other, and what to do
    assert fresh.bits() == before


def test_free_keys_are_keys_and_what_a_step_computes_is_not_free():
    assert set(FIELDS) >= FREE_KEYS
    for key in ("lora_r", "lora_alpha", "lora_dropout", "seed", "learning_rate", "max_length", "dtype", "method"):
        assert key not in FREE_KEYS


def test_another_base_and_other_data_are_named_all_at_once(tmp_path):
    path = Trained(1).save(tmp_path)
    changed = Identity(IDENTITY.config | {"seed": 7}, "c" * 64, "e" * 64, {})
    with pytest.raises(CheckpointError) as error:
        Trained(1).load(path, changed)
    for words in ("seed: was 42, is 7", "the base model", "b" * 12, "c" * 12, "the training data", "d" * 12, "e" * 12):
        assert words in str(error.value)
    Trained(1).load(path, dataclasses.replace(IDENTITY, versions={"torch": "3"}))  # another version is no other run


def test_a_checkpoint_of_another_model_changes_nothing(tmp_path):
    path = Trained(1).save(tmp_path)
    other = Trained(2)
    other.model[1] = nn.Linear(3, 5)
    other.optimizer = make_optimizer(other.model, 0.0)
    before = {name: param.tolist() for name, param in other.model.named_parameters()}
    with pytest.raises(CheckpointError, match="not fit"):
        other.load(path)
    assert {name: param.tolist() for name, param in other.model.named_parameters()} == before


# ---------------------------------------------------------------------------------------- failing at every call


class Calls:
    """Stands for the module `os`: tells `watch` of each call that changes or forces something, then makes it."""

    WATCHED = ("open", "write", "fsync", "close", "replace", "rename", "mkdir", "makedirs", "unlink", "rmdir")

    def __init__(self, watch):
        self._watch = watch

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.WATCHED:
            return real

        def call(*args, **kwargs):
            try:
                self._watch(name, args)
            except OSError:
                if name == "close":
                    real(*args)  # a close that reports an error has closed
                raise
            return real(*args, **kwargs)

        return call


class FailAt:
    """Raises ENOSPC at the n-th watched call (from 1) and remembers whether it came to that."""

    def __init__(self, n):
        self.n, self.seen, self.what = n, 0, ""

    def __call__(self, name, args):
        self.seen += 1
        if self.seen == self.n:
            self.what = f"{name} {args[0]}"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing_at_every_call(monkeypatch, prepare, act):
    """For n = 1, 2, ...: act() on prepare(n) with the n-th call failing; yields (thing, call, error)."""
    for n in range(1, 500):
        thing = prepare(n)
        fault = FailAt(n)
        error = None
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", Calls(fault))
            try:
                act(thing)
            except (OSError, MiniloraError) as raised:
                error = raised
        if not fault.what:
            assert n > 5
            return
        yield thing, fault.what, error
    raise AssertionError("it never came to an end")


@pytest.mark.parametrize("keep", [0, 1])
def test_after_a_failure_at_any_call_the_newest_valid_is_the_old_or_the_new(tmp_path, monkeypatch, keep):
    """... no half of one is left, the error is the one users are told of, and saving again succeeds."""
    states = {step: Trained(step).bits() for step in (1, 2)}

    def prepare(n):
        run = tmp_path / f"{keep}-{n}"
        Trained(1).save(run)
        return run

    def check(run):
        found, refused = newest_valid(run)
        assert refused == []
        loaded = Trained(0).load(found)
        assert loaded.bits() == states[loaded.state.step]

    count = 0
    for run, what, error in failing_at_every_call(monkeypatch, prepare, lambda run: Trained(2).save(run, keep)):
        count += 1
        assert error is None or isinstance(error, StorageError), f"{what}: {error!r} is not reported as a StorageError"
        check(run)
        assert not list(run.rglob("*.partial")), what
        path = Trained(2).save(run, keep)
        assert newest_valid(run) == (path, [])
        assert {p.name for p in path.parent.iterdir() if not p.name.endswith(".removed")} <= {"step-000001", path.name}
    assert count > 20


def test_after_a_failure_at_any_call_a_replaced_file_is_the_old_or_the_new(tmp_path, monkeypatch):
    def prepare(n):
        path = tmp_path / str(n) / "file.json"
        path.parent.mkdir()
        path.write_text("old")
        return path

    seen = set()
    for path, what, error in failing_at_every_call(
        monkeypatch, prepare, lambda p: files.replace_file(p, [b"ne", b"w"])
    ):
        assert isinstance(error, StorageError), what
        assert path.read_text() in ("old", "new"), what
        assert not list(path.parent.glob(".*.partial")), f"left over after {what}"
        seen.add(path.read_text())
    assert seen == {"old", "new"}


def test_after_a_failure_at_any_call_a_replaced_folder_is_the_old_or_the_new(tmp_path, monkeypatch):
    """best/ of method full is such a folder. The old one was once removed before the new one had its name."""

    def prepare(n):
        path = tmp_path / str(n) / "best"
        path.mkdir(parents=True)
        (path / "file").write_text("old")
        return path

    def act(path):
        with files.new_folder(path) as aside:
            files.write_file(aside / "file", [b"new"])

    for path, what, error in failing_at_every_call(monkeypatch, prepare, act):
        assert error is None or isinstance(error, StorageError), what
        assert (path / "file").is_file(), f"neither is there after {what}"
        assert (path / "file").read_text() in ("old", "new"), what
        assert not list(path.parent.glob(".*.partial")), f"left over after {what}"


def test_what_an_error_inside_the_block_leaves_is_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.new_folder(tmp_path / "new"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_storage_error_names_the_place_and_the_reason(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where a folder is needed")
    with pytest.raises(StorageError) as error:
        Trained(1).save(tmp_path)
    assert str(tmp_path / "checkpoints") in str(error.value)
    assert os.strerror(errno.EEXIST) in str(error.value) or os.strerror(errno.ENOTDIR) in str(error.value)


# ---------------------------------------------------------------------------------------- one writer

HOLDER = """
import os, sys, time
from pathlib import Path
from minilora.training.rundir import RunLock
lock = RunLock(Path(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path):
    root = Path(checkpoint.__file__).parent.parent.parent
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    try:
        owner = holder.stdout.readline().strip()
        with pytest.raises(ConfigError) as error:
            RunLock(tmp_path / "run")
        assert f"process {owner}" in str(error.value)
        assert str(tmp_path / "run") in str(error.value)
        with RunLock(tmp_path / "another"):
            pass
    finally:
        holder.kill()  # kill -9: it has no chance to clean up
        holder.wait()
        holder.stdout.close()
    assert (tmp_path / "run" / ".lock").exists()
    with RunLock(tmp_path / "run"), pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        RunLock(tmp_path / "run")
    with RunLock(tmp_path / "run"):
        pass
