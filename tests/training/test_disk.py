"""A crash, a power loss or a disk error at every file operation of a save: the old is there or the new, never a part.

As SQLite's tests do it: the n-th operation fails, for n = 1, 2, ... until the save gets through. Each trial is a forked
child, so that all of Python's file operations are seen (those of shutil and pathlib too) and a crash is a real one.
"""

import contextlib
import dataclasses
import errno
import hashlib
import os
import shutil
import signal
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

from minilora.adapters import format as adapter_format
from minilora.config import TrainConfig
from minilora.lora import inject
from minilora.models import load as loading
from minilora.optim import make_optimizer
from minilora.training import checkpoint
from minilora.training.checkpoint import Identity, TrainState, newest_valid
from minilora.utils import files

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


def at_every_operation(strike, prepare, act, stride=1):
    """Yields (what struck, the folder, the child's exit code, its answer) for n = 1, 1 + stride, ...

    prepare(folder) fills a folder in the parent, act(folder) is struck in a child. A child that is not struck must
    succeed, and ends the series.
    """
    for n in range(1, MAX_OPERATIONS, stride):
        folder = prepare(n)

        def work(folder=folder, n=n):
            injector = Injector(n, STRIKES[strike], folder).stand()
            error = None
            try:
                act(folder)
            except Exception as raised:
                error = {"kinds": [kind.__name__ for kind in type(raised).__mro__], "text": str(raised)}
            injector.fall()
            return {"hit": injector.hit, "error": error}

        code, answer = forked(work)
        if code == 0 and not answer["hit"]:
            assert answer["error"] is None, answer
            assert n > 10, "nothing was struck"
            return
        yield f"{strike} at operation {n}" + (f" ({answer['hit']})" if answer else ""), folder, code, answer
        shutil.rmtree(folder)
    raise AssertionError("it never came to an end")


def wrong_in(code: int, answer: dict | None, folder: Path) -> str:
    """What is wrong with the end of a child: a crash must crash, an error be ours with path and reason on one line."""
    if answer is None:
        return "" if code == EXIT_CRASHED else f"exit code {code}"
    if code:
        return f"exit code {code}, {answer}"
    if answer["error"] is None:
        return ""
    kinds, text = answer["error"]["kinds"], answer["error"]["text"]
    if "MiniloraError" not in kinds:
        return f"a {kinds[0]}, not one of ours: {text}"
    if str(folder) not in text:
        return f"no path in {text!r}"
    if not any(os.strerror(code) in text for code in errno.errorcode):
        return f"no reason in {text!r}"
    return "more than one line" if "\n" in text.strip() else ""


def report(name: str, trials: int, olds: int, problems: list[str]) -> None:
    whole = trials - len({problem.partition(":")[0] for problem in problems})
    print(f"\n{name}: {whole} of {trials} right; the old one at {olds}, else the new one")
    assert not problems, "\n".join(problems)
    assert 0 < olds <= trials


# ---------------------------------------------------------------------------------------- checkpoints


def a_checkpoint_at_every_operation(tmp_path, strike, keep, stride=1):
    one, two = Saved(1), Saved(2)
    expected = {}
    (tmp_path / "expected").mkdir()
    for saved in (one, two):
        path = saved.save(tmp_path / "expected", 0)
        expected[path.name] = bytes_of(path)

    def prepare(n):
        (tmp_path / f"run{n}").mkdir()
        one.save(tmp_path / f"run{n}", 0)
        return tmp_path / f"run{n}"

    trials, olds, problems = 0, 0, []
    for where, run, code, answer in at_every_operation(strike, prepare, lambda run: two.save(run, keep), stride):
        trials += 1
        found, refused = newest_valid(run)
        silent = code != EXIT_CRASHED and not answer["error"]
        checks = {
            wrong_in(code, answer, run): False,
            f"nothing valid is left: {refused}": found is not None,
            f"a torn one is left: {refused}": not refused,
            "not what was saved": found is None or bytes_of(found) == expected[found.name],
            "no error, and not saved": not silent or (found is not None and found.name == "step-000002"),
        }
        olds += found is not None and found.name == "step-000001"
        saved_again = two.save(run, keep)
        right = newest_valid(run) == (saved_again, []) and bytes_of(saved_again) == expected["step-000002"]
        checks["the next save does not succeed"] = right
        problems += [f"{where}: {words}" for words, good in checks.items() if words and not good]
    report(f"checkpoint, {strike}, keep {keep}", trials, olds, problems)


@pytest.mark.parametrize(("strike", "stride"), [("crash", 4), ("power loss", 4), ("ENOSPC", 5), ("EIO", 9)])
def test_a_checkpoint_is_the_old_or_the_new(tmp_path, strike, stride):
    a_checkpoint_at_every_operation(tmp_path, strike, keep=1, stride=stride)


@pytest.mark.soak
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("strike", list(STRIKES))
def test_a_checkpoint_is_the_old_or_the_new_soak(tmp_path, strike, keep):
    a_checkpoint_at_every_operation(tmp_path, strike, keep)


def test_what_a_crash_left_behind_is_cleared_away_by_the_next_save(tmp_path):
    """A half-written or half-removed checkpoint of method full is gigabytes, and its step may never be saved again."""
    one, two, three = Saved(1), Saved(2), Saved(3)

    def prepare(n):
        (tmp_path / f"run{n}").mkdir()
        one.save(tmp_path / f"run{n}", 0)
        return tmp_path / f"run{n}"

    left = {}
    for where, run, _, _ in at_every_operation("crash", prepare, lambda run: two.save(run, 1), stride=4):
        three.save(run, 1)
        if names := sorted({p.name for p in (run / "checkpoints").iterdir()} - {"step-000003"}):
            left[where] = names
    assert not left


# ---------------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def adapters(tiny_folder):
    """A function save(folder, version): the adapter of a tiny model, in two versions."""
    tokenizer = loading.load_tokenizer(tiny_folder)
    settings = adapter_format.AdapterConfig(str(tiny_folder), 2, 4, 0.0, ("q_proj",), False)
    models = {}
    for version in (1, 2):
        models[version] = loading.load_model(tiny_folder, torch.float32, torch.device("cpu"))
        inject(models[version], ("q_proj",), rank=2, alpha=4)
        randomize_lora(models[version], seed=version)

    def save(folder: Path, version: int) -> None:
        adapter_format.save_folder(folder, models[version], tokenizer, settings, {"base_fingerprint": "f" * 64})

    return save


def an_adapter_at_every_operation(tmp_path, adapters, strike, existing, stride=1):
    expected = {}
    for version in (1, 2):
        adapters(tmp_path / f"expected{version}", version)
        expected[version] = bytes_of(tmp_path / f"expected{version}")
    assert expected[1][adapter_format.WEIGHTS] != expected[2][adapter_format.WEIGHTS]

    def prepare(n):
        run = tmp_path / f"run{n}"
        run.mkdir()
        if existing:
            adapters(run / "adapter", 1)
        return run

    def holds(run, version):
        """Its files are there, whole; what a crash left under other names does not matter."""
        found = bytes_of(run / "adapter")
        return {name: found.get(name) for name in expected[version]} == expected[version]

    trials, olds, problems = 0, 0, []
    for where, run, code, answer in at_every_operation(
        strike, prepare, lambda run: adapters(run / "adapter", 2), stride
    ):
        trials += 1
        old = holds(run, 1) if existing else not (run / "adapter").exists()
        new = holds(run, 2)
        checks = {
            wrong_in(code, answer, run): False,
            f"neither the old nor the new: {sorted(bytes_of(run / 'adapter'))}": old or new,
            "no error, and not saved": new or code == EXIT_CRASHED or bool(answer["error"]),
        }
        olds += old
        adapters(run / "adapter", 2)
        checks["the next save does not succeed"] = holds(run, 2)
        problems += [f"{where}: {words}" for words, good in checks.items() if words and not good]
    report(f"adapter, {strike}, one is there: {existing}", trials, olds, problems)


@pytest.mark.parametrize(
    ("strike", "existing", "stride"),
    [("crash", True, 2), ("power loss", True, 2), ("power loss", False, 6), ("EIO", True, 3)],
)
def test_an_adapter_is_the_old_or_the_new(tmp_path, adapters, strike, existing, stride):
    an_adapter_at_every_operation(tmp_path, adapters, strike, existing, stride)


@pytest.mark.soak
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("strike", list(STRIKES))
def test_an_adapter_is_the_old_or_the_new_soak(tmp_path, adapters, strike, existing):
    an_adapter_at_every_operation(tmp_path, adapters, strike, existing)


@pytest.mark.parametrize("strike", ["crash", "power loss"])
def test_a_folder_in_the_place_of_another_is_the_old_or_the_new(tmp_path, strike):
    """best/ and model/ of method full are replaced whole; by two renames there is a moment with neither of the two."""

    def prepare(n):
        folder = tmp_path / f"run{n}"
        (folder / "best").mkdir(parents=True)
        (folder / "best" / "file").write_text("old")
        return folder

    def act(folder):
        with files.new_folder(folder / "best") as aside:
            files.write_file(aside / "file", [b"new"])

    found = {}
    for where, folder, _, _ in at_every_operation(strike, prepare, act):
        path = folder / "best" / "file"
        found[where] = path.read_text() if path.exists() else "neither"
    assert [where for where, content in found.items() if content not in ("old", "new")] == []
    assert set(found.values()) == {"old", "new"}


# ---------------------------------------------------------------------------------------- whole runs

ARGV = (
    *("train", "demo", "--max_steps", "40", "--save_steps", "2", "--save_total_limit", "0"),
    *("--eval_steps", "1000", "--per_device_train_batch_size", "2", "--output_dir"),
)


def run_until(tmp_path, run: Path, happened, then, *flags) -> tuple[int, str]:
    """(exit code, output) of a demo run to which `then` is done once `happened` is true."""
    faults.start_servers(1)
    log = tmp_path / "log"
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(minilora, (*ARGV, run, *flags), log, plain_root=True, silent=True)
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
    """A demo checkpoint is 350 kB: the third does not fit. The first two stay, and with room made the run goes on."""
    if small_disk is None:
        pytest.skip("needs the right to mount a tmpfs; the operation-by-operation tests hold the same without")
    faults.start_servers(1)
    run, log = small_disk / "run", tmp_path / "log"
    code = minilora((*ARGV, run), log, silent=True)["code"]
    message = one_line(log.read_text())
    assert code == 2
    assert str(run) in message
    assert os.strerror(errno.ENOSPC) in message
    found, refused = newest_valid(run)
    assert (found.name, refused) == ("step-000004", [])
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    log = tmp_path / "second.log"
    done = minilora((*ARGV, run, "--resume", "auto", "--max_steps", "5"), log, silent=True)
    assert done["code"] == 0, log.read_text()
    assert "step-000004" in log.read_text()
    assert newest_valid(run)[0].name == "step-000005"


def test_a_full_disk_where_only_the_log_is_written(tmp_path):
    """metrics.jsonl is written at every step; an error there is told in the same words."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    faults.start_servers(1)
    run, log = tmp_path / "run", tmp_path / "log"
    code = minilora((*ARGV, run), log, full=str(run / "metrics.jsonl"), silent=True)["code"]
    message = one_line(log.read_text())
    assert code == 2
    assert str(run / "metrics.jsonl") in message
    assert os.strerror(errno.ENOSPC) in message


def test_a_folder_that_becomes_read_only(tmp_path):
    """Root is asked to obey permissions like everyone (it gives up CAP_DAC_OVERRIDE)."""
    run = tmp_path / "run"
    folder = run / "checkpoints"
    try:
        code, text = run_until(tmp_path, run, (folder / "step-000002").exists, lambda: folder.chmod(0o555))
    finally:
        folder.chmod(0o755)
    message = one_line(text)
    assert code == 2
    assert str(folder) in message
    assert os.strerror(errno.EACCES) in message
    found, refused = newest_valid(run)
    assert found is not None
    assert refused == []


def test_a_folder_that_vanishes(tmp_path):
    """It must not come back as a folder that holds a checkpoint and nothing else, while the log goes nowhere."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    first = run / "checkpoints" / "step-000002"
    code, text = run_until(tmp_path, run, first.exists, lambda: os.rename(run, moved))
    message = one_line(text)
    assert code == 2
    assert str(run) in message
    assert os.strerror(errno.ENOENT) in message
    assert not run.exists()
    found, refused = newest_valid(moved)  # whoever moved it has all that was saved
    assert found is not None
    assert refused == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("a file where a folder is needed")
    faults.start_servers(1)
    log = tmp_path / "log"
    code = minilora((*ARGV, tmp_path / "file" / "run"), log, silent=True)["code"]
    message = one_line(log.read_text())
    assert code == 2
    assert str(tmp_path / "file") in message
    assert os.strerror(errno.ENOTDIR) in message


def test_a_signal_on_a_full_disk(small_disk, tmp_path):
    """What a stopped run cannot save is told, with the code of a full disk, not of a run that was saved."""
    if small_disk is None:
        pytest.skip("needs the right to mount a tmpfs")
    run = small_disk / "run"

    def fill_and_stop():
        filler = os.open(small_disk / "filler", os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while True:
                os.write(filler, bytes(4096))
        os.close(filler)
        os.kill(int((run / ".lock").read_text()), signal.SIGTERM)

    def after_step_20():
        log = run / "metrics.jsonl"
        return log.exists() and '"step": 21,' in log.read_text()

    code, text = run_until(tmp_path, run, after_step_20, fill_and_stop, "--save_steps", 20)
    message = one_line(text)
    assert code == 2
    assert os.strerror(errno.ENOSPC) in message
    assert newest_valid(run)[0].name == "step-000020"
