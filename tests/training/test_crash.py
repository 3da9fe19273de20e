"""Killed and stopped at random moments of real commands, gone on with, and compared to the bit with the whole run.

The subset that always runs takes a short demo run; the soak takes `train demo --num_train_epochs 2 --save_steps 5`.
Counts: MINILORA_SOAK_KILLS (200), _SIGNALS (50 of each), _REAL (5); two trials at a time: MINILORA_SOAK_WORKERS (2).
"""

import dataclasses
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import faults
import pytest
from conftest import write_jsonl
from faults import minilora
from transformers import AutoConfig

from minilora import loop
from minilora.errors import StoppedError
from minilora.training import checkpoint, finish

SHORT = ("train", "demo", "--max_steps", "6", "--save_steps", "4", "--eval_steps", "3")
DEMO = ("train", "demo", "--num_train_epochs", "2", "--save_steps", "5")
MAX_TO_EXIT_S = 5.0


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run: what it was asked, what it left, how long it took."""

    argv: tuple[str, ...]
    left: dict[str, str]
    seconds: float
    calls: list[str]  # its file operations: the part of its folder that each concerned
    options: dict  # threads, and whether the models generate answers


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left_by(run: Path) -> dict[str, str]:
    """What a finished run leaves, but for clocks: hashes of what was trained, and the numbers that were logged."""
    assert (run / "summary.json").is_file(), f"{run} did not finish"
    newest = checkpoint.checkpoints(run)[0]
    checkpoint.validate(newest)
    kept = {"step": newest.name}
    for path in (run / "adapter", run / "best"):
        if path.exists() or path.name == "adapter":
            kept[path.name] = sha256(path / "adapter_model.safetensors")
            kept[f"{path.name} config"] = sha256(path / "adapter_config.json")
    for name in (checkpoint.WEIGHTS, checkpoint.MOMENTS):
        kept[name] = sha256(newest / name)
    clocks = {"seconds", "time", "tokens_per_second", "peak_memory_bytes", "predicted_peak_memory_bytes"}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept["metrics"] = json.dumps([{k: v for k, v in record.items() if k not in clocks} for record in records])
    summary = json.loads((run / "summary.json").read_text())
    kept["summary"] = json.dumps({key: value for key, value in summary.items() if key not in clocks})
    return kept


def uninterrupted(argv, folder: Path, **options) -> Whole:
    run = folder / "whole"
    log = folder / "whole.log"
    faults.start_servers(1)
    argv = (*argv, "--output_dir", str(run))
    done = minilora(argv, log, at_call=0, inside=str(run), **options)
    assert done["code"] == 0, log.read_text()
    whole = Whole(argv[:-2], left_by(run), done["seconds"], done["calls"], options)
    shutil.rmtree(run)
    return whole


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Whole:
    folder = tmp_path_factory.mktemp("short")
    rows, held_out = write_jsonl(folder / "rows.jsonl", 64), write_jsonl(folder / "held_out.jsonl", 6, seed=1)
    argv = (*SHORT, "--train_file", str(rows), "--eval_file", str(held_out))
    return uninterrupted(argv, folder, silent=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Whole:
    return uninterrupted(DEMO, tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Whole:
    argv = (
        *("train", "--model", os.environ["MINILORA_REAL_MODEL"], "--train_file", str(faults.ROOT / "data/train.jsonl")),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--lora_dropout", "0.1"),
        *("--max_steps", "8", "--save_steps", "2"),
    )
    return uninterrupted(argv, tmp_path_factory.mktemp("real"), threads=faults.count("THREADS", 2))


def moments(whole: Whole, trials: int, seed: int, number: int, timed: bool) -> list[dict]:
    """When to strike, one in each of equal parts of the run.

    At a line of the log (there is one for each step) or up to 50 ms later, at a file operation of a checkpoint, or of
    anything else that is written; if `timed`, every other at a time instead, start-up included. Times depend on how
    busy the machine is, operations do not.
    """
    groups = {"steps": [], "checkpoints": [], "others": []}
    for n, path in enumerate(whole.calls, 1):
        groups["steps" if path == "metrics.jsonl" else path if path == "checkpoints" else "others"].append(n)
    rng, found = random.Random(seed), []
    for i in range(trials):
        share = (i + rng.random()) / trials
        if timed and i % 2:
            found.append({"signal": number, "after_s": share * whole.seconds})
        else:
            group = groups[rng.choice(("steps", "steps", "checkpoints", "others"))]
            moment = {"signal": number, "at_call": group[int(share * len(group))]}
            found.append(moment | ({"delay_s": rng.random() * 0.05} if group is groups["steps"] else {}))
    return found


def struck(whole: Whole, run: Path, moment: dict) -> tuple[dict, str]:
    """(what came of the command, its output) when it is struck at this moment."""
    log = run.with_suffix(".log")
    inside = {"inside": str(run)} if "at_call" in moment else {}
    done = minilora((*whole.argv, "--output_dir", str(run)), log, **whole.options, **moment, **inside)
    return done, log.read_text(errors="replace")


def go_on(whole: Whole, run: Path, **moment) -> dict:
    """The same command with --resume auto."""
    argv = (*whole.argv, "--output_dir", str(run), "--resume", "auto")
    return minilora(argv, run.with_suffix(".resumed.log"), **whole.options, **moment)


# ---------------------------------------------------------------------------------------- kill -9


def killed(whole: Whole, folder: Path, trials: int, workers: int, seed: int, timed: bool = True) -> None:
    rng = random.Random(seed + 1)

    def trial(numbered):
        i, moment = numbered
        run = folder / f"run{i:03d}"
        done, _ = struck(whole, run, moment)
        stage = f"after {len(checkpoint.checkpoints(run))} checkpoints" if done["code"] == -9 else "too late"
        if i % 3 == 2:  # dies again while it goes on
            go_on(whole, run, signal=signal.SIGKILL, after_s=whole.seconds * rng.random())
        resumed = go_on(whole, run)
        if resumed["code"] != 0:
            return stage, [f"code {resumed['code']}: {run.with_suffix('.resumed.log').read_text()[-2000:]}"]
        left = left_by(run)
        wrong = [key for key in whole.left if left.get(key) != whole.left[key]]
        if not wrong:
            shutil.rmtree(run)
        return stage, wrong

    results = faults.in_parallel(trial, list(enumerate(moments(whole, trials, seed, signal.SIGKILL, timed))), workers)
    bad = {i: wrong for i, (_, wrong) in enumerate(results) if wrong}
    print(f"\nkill -9: {trials - len(bad)} of {trials} resumed to the bit; {dict(Counter(s for s, _ in results))}")
    assert not bad
    in_time = sum(stage != "too late" for stage, _ in results)
    assert in_time >= 0.6 * trials or (trials < 10 and in_time), "most moments must hit the run"


def test_kill_9(short, tmp_path):
    killed(short, tmp_path, trials=3, workers=1, seed=1, timed=False)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_kill_9_soak(demo, tmp_path):
    killed(demo, tmp_path, faults.count("KILLS", 200), faults.count("WORKERS", 2), seed=2)


@pytest.mark.real
@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_kill_9_real(real, tmp_path):
    killed(real, tmp_path, faults.count("REAL", 5), workers=1, seed=3)


# ---------------------------------------------------------------------------------------- SIGTERM, SIGINT


def outcome(done: dict, text: str, run: Path, number: int) -> str:
    """In words, what a signalled run did; begins with BAD when that is not what it should."""
    finished = (run / "summary.json").exists()
    shell_code = 128 - done["code"] if done["code"] < 0 else done["code"]
    if done["to_exit_s"] is not None and done["to_exit_s"] > MAX_TO_EXIT_S:
        return f"BAD: {done['to_exit_s']:.1f} s to the exit"
    if done["to_exit_s"] is None:
        return "had finished before" if finished and done["code"] == 0 else f"BAD: code {done['code']} by itself"
    if "Traceback" in text:
        return f"BAD: {text[-500:]}"
    if done["code"] == 0 and finished:
        return "was finishing, and did"
    if shell_code != 128 + number:
        return f"BAD: exit code {done['code']}"
    if "stopped by" in text:
        saved = checkpoint.checkpoints(run)
        if saved and "--resume" not in text:
            return "BAD: a checkpoint and no resume command"
        return "stopped, saved" if saved else "stopped, nothing to save yet"
    # Outside of train(): before the first file is read, or when all is written.
    return "ended outside of the run" if finished or "\nmodel " not in text else "BAD: died without a word"


def last_step(run: Path) -> int:
    """The last step that a run has done and logged."""
    log = run / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return max((record["step"] for record in records if "loss" in record), default=0)


def printed_command(text: str) -> list[str] | None:
    """The words of the resume command in a run's last lines, after `python -m minilora train`."""
    found = re.search(r"python -m minilora train (--resume .*)", text)
    return shlex.split(found.group(1)) if found else None


def stopped(whole: Whole, folder: Path, number: int, trials: int, workers: int, seed: int, timed: bool = True) -> None:
    def trial(numbered):
        i, moment = numbered
        run = folder / f"run{i:03d}"
        done, text = struck(whole, run, moment)
        word = outcome(done, text, run, number)
        if word.startswith("BAD"):
            return word, done["to_exit_s"]
        command, saved = printed_command(text), checkpoint.newest_valid(run)[0]
        if word.startswith("stopped") and last_step(run) != (int(saved.name[5:]) if saved else 0):
            return f"BAD: step {last_step(run)} was done, {saved} was saved", done["to_exit_s"]
        if word == "stopped, saved":
            refused = checkpoint.newest_valid(run)[1]
            if refused or str(run) not in text or command is None:
                return f"BAD: {refused} {text[-500:]}", done["to_exit_s"]
            log = run.with_suffix(".resumed.log")
            resumed = minilora(("train", *command), log, **whole.options)  # the very command that was printed
        else:
            resumed = go_on(whole, run)
        if resumed["code"] != 0:
            return f"BAD: going on: {run.with_suffix('.resumed.log').read_text()[-2000:]}", done["to_exit_s"]
        left = left_by(run)
        wrong = [key for key in whole.left if left.get(key) != whole.left[key]]
        return (f"BAD: differs in {wrong}" if wrong else word), done["to_exit_s"]

    results = faults.in_parallel(trial, list(enumerate(moments(whole, trials, seed, number, timed))), workers)
    words = Counter(word for word, _ in results)
    slowest = max((seconds for _, seconds in results if seconds is not None), default=0.0)
    good = trials - sum(count for word, count in words.items() if word.startswith("BAD"))
    name = signal.Signals(number).name
    print(f"\n{name}: {good} of {trials} right, slowest exit {slowest:.2f} s; {dict(words)}")
    assert good == trials
    assert words["stopped, saved"] + words["stopped, nothing to save yet"] >= trials // 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal(short, tmp_path, number):
    stopped(short, tmp_path, number, trials=2, workers=1, seed=number, timed=False)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_soak(demo, tmp_path, number):
    stopped(demo, tmp_path, number, faults.count("SIGNALS", 50), faults.count("WORKERS", 2), seed=10 + number)


@pytest.mark.real
@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_stopped_by_a_signal_real(real, tmp_path):
    stopped(real, tmp_path, signal.SIGTERM, faults.count("REAL", 5), workers=1, seed=30)


def test_a_second_sigint_exits_at_once(short, tmp_path):
    """At once: not after the micro-batch, and without saving. What was saved before is there."""
    run = tmp_path / "run"
    lines = [n for n, part in enumerate(short.calls, 1) if part == "metrics.jsonl"]
    moment = {"signal": signal.SIGINT, "at_call": lines[len(lines) // 2], "times": 2}
    done, text = struck(short, run, moment)
    assert done["code"] == 130
    assert done["to_exit_s"] < 1.0
    assert "stopped by" not in text  # the first one would have said so, and saved
    assert "Traceback" not in text
    assert checkpoint.newest_valid(run)[1] == []
    assert go_on(short, run)["code"] == 0
    assert left_by(run) == short.left


@pytest.mark.parametrize("stage", ["preparing", "finishing"])
def test_a_signal_where_nothing_can_be_lost_ends_the_run_at_once(make_config, bare_run, monkeypatch, stage):
    """Reading a model and trying out the result take long on a real one, far longer than the 5 s that are promised.
    A run once noticed a signal there only when all was done: a first Ctrl-C while a million rows were tokenised."""
    config = make_config()
    waited = [0]
    place = (AutoConfig, "from_pretrained") if stage == "preparing" else (finish, "sample_answers")
    real = getattr(*place)

    def slow(*args, **keys):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(100):
            time.sleep(0.01)
            waited[0] += 1
        return real(*args, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(*place, slow)
        with pytest.raises(StoppedError) as stopped:
            loop.train(config)
    assert stopped.value.exit_code == 143
    assert waited[0] < 5
    assert ("--resume" in str(stopped.value)) == (stage == "finishing")
    assert loop.train(dataclasses.replace(config, resume="auto")).stop_reason == "completed"
