"""A crash, a power loss or a disk error at every file operation of a save: the old is there or the new, never a part.

As SQLite's tests do it: the n-th operation fails, for n = 1, 2, ... until the save gets through. Each trial is a forked
child, so that all of Python's file operations are seen (those of shutil and pathlib too) and a crash is a real one.
"""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faults
import pytest
import torch
from conftest import randomize_lora
from faults import EXIT_CRASHED, STRIKES, Injector, forked, minilora
from torch import nn

from minilora import adapter, checkpoint, files, model, output
from minilora.checkpoint import Identity, TrainState, newest_valid
from minilora.config import TrainConfig
from minilora.lora import inject
from minilora.optim import make_optimizer

IDENTITY = Identity(dataclasses.asdict(TrainConfig()) | {"target_modules": []}, "b" * 64, "d" * 64, {"torch": "2"})
MAX_OPERATIONS = 500


class Saved:
    """A small model after some steps of AdamW, and its checkpoint."""

    def __init__(self, steps: int):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).requires_grad_(True)
        self.optimizer = make_optimizer(self.model, 0.0)
        self.state = TrainState(step=steps)
        for _ in range(steps):
            self.model(torch.ones(1, 4)).sum().backward()
            self.optimizer.param_groups[0]["lr"] = 0.1
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, run: Path, keep: int) -> Path:
        return checkpoint.save(run, self.model, self.optimizer, self.state, IDENTITY, keep)


def bytes_of(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()} if folder.is_dir() else {}


def at_every_operation(strikes, prepare, act, inside, stride=1):
    """Yields (what struck, the thing, the child's exit code, its answer) for n = 1, 1 + stride, ... of each strike.

    prepare() makes a thing in the parent, act(thing) is struck in a child. A child that is not struck must succeed, and
    ends the series of its strike.
    """
    for kind in strikes:
        for n in range(1, MAX_OPERATIONS, stride):
            thing = prepare()

            def work(thing=thing, n=n, kind=kind):
                injector = Injector(n, STRIKES[kind], inside(thing)).stand()
                error = None
                try:
                    act(thing)
                except Exception as raised:
                    error = {"mro": [c.__name__ for c in type(raised).__mro__], "text": str(raised)}
                injector.fall()
                return {"hit": injector.hit, "error": error}

            code, answer = forked(work)
            if code == 0 and not answer["hit"]:
                assert answer["error"] is None, answer
                assert n > 10, "nothing was struck"
                break
            yield f"{kind} at operation {n}" + (f" ({answer['hit']})" if answer else ""), thing, code, answer
        else:
            raise AssertionError("it never came to an end")


def check_error(where: str, code: int, answer: dict, folder: Path) -> None:
    """A crash crashed; an error was one of ours with path and reason, or did not matter."""
    if answer is None:
        assert code == EXIT_CRASHED, where
        return
    assert code == 0, f"{where}: {answer}"
    error = answer["error"]
    if error is not None:
        assert "MiniloraError" in error["mro"], f"{where}: {error}"
        assert str(folder) in error["text"], f"{where}: no path in {error['text']!r}"
        reasons = [os.strerror(code) for code in faults.CODES.values()]
        assert any(reason in error["text"] for reason in reasons), f"{where}: no reason in {error['text']!r}"
        assert "\n" not in error["text"].strip()


# ---------------------------------------------------------------------------------------- checkpoints


def checkpoint_at_every_operation(tmp_path, strikes, keep, stride=1):
    one, two = Saved(1), Saved(2)
    expected = {}
    for saved in (one, two):
        path = saved.save(tmp_path / "expected", 0)
        expected[path.name] = bytes_of(path)
    runs = iter(range(10**6))

    def prepare():
        run = tmp_path / f"run{next(runs)}"
        one.save(run, 0)
        return run

    trials, olds = 0, 0
    for where, run, code, answer in at_every_operation(
        strikes, prepare, lambda run: two.save(run, keep), lambda run: run, stride
    ):
        trials += 1
        check_error(where, code, answer, run)
        found, refused = newest_valid(run)
        assert found is not None, f"{where}: nothing valid is left: {refused}"
        assert bytes_of(found) == expected[found.name], where
        # a power loss may bring back the name of the old one while it is being removed: refused, the new one is used
        assert refused == [], where
        assert code == EXIT_CRASHED or answer["error"] or found.name == "step-000002", where
        olds += found.name == "step-000001"
        again = two.save(run, keep)
        assert newest_valid(run) == (again, []), where
        assert bytes_of(again) == expected["step-000002"], where
        shutil.rmtree(run)
    print(f"\ncheckpoint, keep {keep}: {trials} of {trials} whole ({olds} the old one, {trials - olds} the new one)")
    assert 0 < olds < trials


@pytest.mark.parametrize(("strike", "stride"), [("crash", 2), ("power loss", 2), ("ENOSPC", 3), ("EIO", 7)])
def test_a_checkpoint_is_the_old_or_the_new(tmp_path, strike, stride):
    checkpoint_at_every_operation(tmp_path, [strike], keep=1, stride=stride)


@pytest.mark.soak
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("strike", list(STRIKES))
def test_a_checkpoint_is_the_old_or_the_new_soak(tmp_path, strike, keep):
    checkpoint_at_every_operation(tmp_path, [strike], keep)


def test_what_a_crash_left_behind_is_cleared_away_by_the_next_save(tmp_path):
    """A half-written or half-removed checkpoint of method full is gigabytes, and a run that is resumed never saves the
    same step again when its numbers have changed."""
    one, two, three = Saved(1), Saved(2), Saved(3)
    runs = iter(range(10**6))

    def prepare():
        run = tmp_path / f"run{next(runs)}"
        one.save(run, 0)
        return run

    left = {}
    for where, run, *_ in at_every_operation(["crash"], prepare, lambda run: two.save(run, 1), lambda run: run, 4):
        three.save(run, 1)
        if names := {p.name for p in (run / "checkpoints").iterdir()} - {"step-000003"}:
            left[where] = sorted(names)
        shutil.rmtree(run)
    assert not left


# ---------------------------------------------------------------------------------------- adapters


@pytest.fixture
def adapters(load_tiny, tiny_folder):
    """A function save(folder, version): the adapter of a tiny model, in two versions."""
    tokenizer = model.load_tokenizer(tiny_folder)
    settings = adapter.AdapterConfig(str(tiny_folder), 2, 4, 0.0, ("q_proj",), False)
    models = {}
    for version in (1, 2):
        models[version] = load_tiny()
        inject(models[version], ("q_proj",), rank=2, alpha=4)
        randomize_lora(models[version], seed=version)

    def save(folder: Path, version: int) -> None:
        output.save_adapter(folder, models[version], tokenizer, settings, {"base_fingerprint": "f" * 64})

    return save


def adapter_at_every_operation(tmp_path, adapters, strikes, existing, stride=1):
    expected = {}
    for version in (1, 2):
        adapters(tmp_path / f"expected{version}", version)
        expected[version] = bytes_of(tmp_path / f"expected{version}")
    assert expected[1][adapter.WEIGHTS] != expected[2][adapter.WEIGHTS]
    runs = iter(range(10**6))

    def prepare():
        run = tmp_path / f"run{next(runs)}"
        run.mkdir()
        if existing:
            adapters(run / "adapter", 1)
        return run

    trials, olds = 0, 0
    for where, run, code, answer in at_every_operation(
        strikes, prepare, lambda run: adapters(run / "adapter", 2), lambda run: run, stride
    ):
        trials += 1
        check_error(where, code, answer, run)
        found = bytes_of(run / "adapter")
        old = {name: found.get(name) for name in expected[1]} == expected[1] if existing else not found
        new = {name: found.get(name) for name in expected[2]} == expected[2]
        assert old or new, f"{where}: neither the old nor the new: {sorted(found)}"
        olds += old
        adapters(run / "adapter", 2)
        found = bytes_of(run / "adapter")
        assert {name: found.get(name) for name in expected[2]} == expected[2], where
        shutil.rmtree(run)
    print(f"\nadapter: {trials} of {trials} whole ({olds} the old one, {trials - olds} the new one)")
    assert 0 < olds <= trials


@pytest.mark.parametrize(
    ("strike", "existing", "stride"), [("crash", True, 2), ("power loss", False, 6), ("EIO", True, 3)]
)
def test_an_adapter_is_the_old_or_the_new(tmp_path, adapters, strike, existing, stride):
    adapter_at_every_operation(tmp_path, adapters, [strike], existing, stride)


@pytest.mark.soak
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("strike", list(STRIKES))
def test_an_adapter_is_the_old_or_the_new_soak(tmp_path, adapters, strike, existing):
    adapter_at_every_operation(tmp_path, adapters, [strike], existing)


# ---------------------------------------------------------------------------------------- whole runs

ARGV = ("train", "demo", "--max_steps", "40", "--save_steps", "2", "--eval_steps", "1000", "--save_total_limit", "0")


def run_until(tmp_path, run: Path, happened, then, argv=ARGV) -> tuple[int, str]:
    """(exit code, output) of a demo run to which `then` is done once `happened` is true."""
    faults.start_servers(1)
    log = tmp_path / "log"
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(minilora, (*argv, "--output_dir", str(run)), log, plain_root=True)
        while not happened() and not future.done():
            time.sleep(0.002)
        assert not future.done(), log.read_text()
        then()
        return future.result()["code"], log.read_text(errors="replace")


def one_line(text: str) -> str:
    """What the run said at its end: one line of ours, and no traceback."""
    assert "Traceback" not in text
    errors = text[text.index("minilora: ") :].strip().splitlines()
    assert len(errors) == 1, errors
    return errors[0]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 1 MB, or None where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(small_disk, tmp_path):
    """A demo checkpoint is 350 kB: the third does not fit. The first two stay as they are."""
    if small_disk is None:
        pytest.skip("needs the right to mount a tmpfs; the operation-by-operation tests hold the same without")
    faults.start_servers(1)
    run, log = small_disk / "run", tmp_path / "log"
    code = minilora((*ARGV, "--output_dir", str(run)), log)["code"]
    said = one_line(log.read_text())
    assert code == 2
    assert str(run) in said
    assert os.strerror(faults.CODES["ENOSPC"]) in said
    found, refused = newest_valid(run)
    assert (found.name, refused) == ("step-000004", [])
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    # room is made, the run goes on
    shutil.rmtree(run / "checkpoints" / "step-000002")
    argv = (*ARGV[:2], "--max_steps", "40", "--save_steps", "6", "--eval_steps", "1000", "--output_dir", str(run))
    code = minilora((*argv, "--resume", "auto"), log, signal=15, after_s=1.0)["code"]
    assert "resuming from" in log.read_text()
    assert code in (2, 143)
    assert newest_valid(run)[0] is not None


def test_a_full_disk_while_the_log_is_written(tmp_path):
    """metrics.jsonl is written every step: a full disk there is told the same way (it once was told without a path)."""
    faults.start_servers(1)
    run, log = tmp_path / "run", tmp_path / "log"
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    run.mkdir()
    # metrics.jsonl is there, and every write to it says ENOSPC
    code = minilora((*ARGV, "--output_dir", str(run)), log, full_metrics=True)["code"]
    said = one_line(log.read_text())
    assert code == 2
    assert str(run / "metrics.jsonl") in said
    assert os.strerror(faults.CODES["ENOSPC"]) in said


def test_a_folder_that_becomes_read_only(tmp_path):
    """Root is asked to obey permissions like everyone (it gives up CAP_DAC_OVERRIDE)."""
    run = tmp_path / "run"
    first = run / "checkpoints" / "step-000002"

    def protect():
        (run / "checkpoints").chmod(0o555)

    try:
        code, text = run_until(tmp_path, run, first.exists, protect)
    finally:
        (run / "checkpoints").chmod(0o755)
    said = one_line(text)
    assert code == 2
    assert str(run / "checkpoints") in said
    assert os.strerror(faults.CODES["EACCES"]) in said
    found, refused = newest_valid(run)
    assert found is not None
    assert refused == []


def test_a_folder_that_vanishes(tmp_path):
    """The run once made a new folder with a checkpoint in it and nothing else, and logged into a file without a name."""
    run = tmp_path / "run"
    first = run / "checkpoints" / "step-000002"
    code, text = run_until(tmp_path, run, first.exists, lambda: os.rename(run, tmp_path / "moved"))
    said = one_line(text)
    assert code == 2
    assert str(run) in said
    assert os.strerror(2) in said
    found, refused = newest_valid(tmp_path / "moved")  # whoever moved it has all that was saved
    assert found is not None
    assert refused == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("a file where a folder is needed")
    faults.start_servers(1)
    log = tmp_path / "log"
    code = minilora((*ARGV, "--output_dir", str(tmp_path / "file" / "run")), log)["code"]
    said = one_line(log.read_text())
    assert code == 2
    assert str(tmp_path / "file") in said
    assert files.storage_errors  # the one place that words it
