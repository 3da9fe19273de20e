"""Several processes (gloo, on the CPU): they train what one would, and what one of them meets they all decide on."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from conftest import flat, gradients_of, lines, randomize_lora, relative_error, write_jsonl
from safetensors.torch import load_file, save_file
from worlds import LIMIT_S, spoilt, told_to_stop

from minilora import cli, loop
from minilora.batching import split_across_ranks
from minilora.distributed import world as dist_world
from minilora.distributed.world import World
from minilora.errors import CheckpointError, MiniloraError
from minilora.objectives import sft
from minilora.training import checkpoint
from minilora.training.checkpoint import Identity
from minilora.training.setup import prepare
from minilora.training.signals import StopRequest

pytestmark = [
    pytest.mark.usefixtures("bare_run"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a forked child cannot train after its parent has seen CUDA"),
]


def adapter_of(folder):
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


# ---------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize(("count", "parts"), [(32, 2), (32, 4), (64, 8), (7, 2)])
def test_shares_are_even_by_tokens_and_leave_nobody_out(count, parts):
    """Rows of very unequal lengths, as instruction data has them."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = np.minimum(1024, np.exp(rng.normal(4.7, 0.7, count)).astype(int) + 20)
        shares = split_across_ranks(lengths, parts)
        assert sorted(i for part in shares for i in part) == list(range(count))
        loads = [int(lengths[part].sum()) for part in shares]
        assert max(loads) - min(loads) <= max(lengths)
        if count > 10 * parts:
            assert max(loads) < 1.1 * min(loads)
        assert shares == split_across_ranks(lengths, parts)


def test_with_fewer_rows_than_processes_some_have_none():
    assert split_across_ranks([5, 9], 4) == [[1], [0], [], []]


def test_one_process_is_a_world_of_its_own(monkeypatch):
    """And where a launcher starts only one, no connection is made."""
    for environment in ({}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"}):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with ExitStack() as held:
            alone = dist_world.join(held)
        loss = torch.ones(())
        assert (alone.size, alone.main, alone.exchange("word"), alone.any(False)) == (1, True, ["word"], False)
        assert alone.all_reduce_gradients([], loss) is loss
        assert not torch.distributed.is_initialized()
    assert loop.step_seed(42, 7) == loop.step_seed(42, 7, 0) != loop.step_seed(42, 7, 1)


# ---------------------------------------------------------------------------------------- the same training


@pytest.mark.parametrize(("size", "method"), [(2, "lora"), (4, "lora"), (2, "full")])
def test_gradients_are_those_of_one_process(make_config, world, tmp_path, size, method):
    """Every process has the same sum, to the bit; it is that of one process up to rounding."""
    keys = {"method": method, "per_device_train_batch_size": 2, "max_tokens_per_micro_batch": 60}
    config = make_config(gradient_accumulation_steps=8 // size, output_dir=str(tmp_path / "several"), **keys)
    alone = make_config(gradient_accumulation_steps=8, output_dir=str(tmp_path / "alone"), **keys)

    def work(rank):
        with ExitStack() as held:
            own = prepare(config, StopRequest(), held)
            randomize_lora(own.model, std=0.05)
            save_file(gradients_of(own), tmp_path / f"{rank}.safetensors")
            return len(list(own.batches([own.data.train[i] for i in own.schedule.examples_of(0)])))

    ended = world(size, work)
    assert [code for code, _ in ended] == [0] * size
    assert all(number >= 2 for _, number in ended) or size == 4  # several micro-batches in a process
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(size)]
    with ExitStack() as held:
        own = prepare(alone, StopRequest(), held)
        randomize_lora(own.model, std=0.05)
        expected = gradients_of(own)
    assert all(torch.equal(flat(each), flat(found[0])) for each in found)
    assert relative_error(flat(found[0]), flat(expected)) < 1e-6


def test_ten_steps_of_two_processes_give_the_adapter_of_one(make_config, world, tmp_path):
    """Losses, evaluations (split over the processes) and best/ too; the first process alone writes and speaks."""
    keys = {
        "train_file": str(write_jsonl(tmp_path / "rows.jsonl", 37)),  # the last step of an epoch has 5 of 8 rows
        "eval_file": str(write_jsonl(tmp_path / "held-out.jsonl", 7, seed=2)),
        "max_steps": 10,
        "learning_rate": 1e-3,
        "eval_steps": 5,
    }
    alone = make_config(output_dir=str(tmp_path / "alone"), **keys)
    config = make_config(output_dir=str(tmp_path / "two"), gradient_accumulation_steps=1, **keys)
    expected = loop.train(alone)
    ended = world(2, lambda rank: dataclasses.asdict(loop.train(config)))
    assert [code for code, _ in ended] == [0, 0]
    assert ended[0] == ended[1]  # both get the summary
    summary = ended[0][1]
    assert (summary["steps"], summary["tokens"]) == (10, expected.tokens)
    assert summary["supervised_tokens"] == expected.supervised_tokens
    for ours, theirs in zip(lines(config.output_dir), lines(alone.output_dir), strict=True):
        assert len(ours) == len(theirs)
        for line, other in zip(ours, theirs, strict=True):
            for key in ("loss", "eval_loss", "grad_norm"):
                assert line.get(key, 0.0) == pytest.approx(other.get(key, 0.0), rel=1e-5)
    ours, theirs = adapter_of(config.output_dir), adapter_of(alone.output_dir)
    assert float((flat(ours) - flat(theirs)).abs().max()) < 1e-5
    assert (tmp_path / "two" / "best" / "adapter_model.safetensors").exists()
    first, second = ((tmp_path / f"world1-rank{rank}.log").read_text() for rank in (0, 1))
    assert "verified" in first
    assert "2, each takes its share" in first
    assert second == ""


def test_dropout_differs_between_processes_and_is_the_same_again(make_config, world, tmp_path):
    """Two processes with the same draws would see less of the noise; a run done again is the same to the bit."""

    def drawn(name):
        config = make_config(output_dir=str(tmp_path / name), gradient_accumulation_steps=1, lora_dropout=0.3)

        def work(rank):
            with ExitStack() as held:
                own = prepare(config, StopRequest(), held)
                randomize_lora(own.model)
                return float(flat(gradients_of(own)).double().norm()), torch.initial_seed()

        (code, first), (other_code, second) = world(2, work)
        assert (code, other_code) == (0, 0)
        return first, second

    first, second = drawn("one")
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert drawn("again") == (first, second)


def test_elastic_resume(make_config, world, tmp_path):
    """Saved at one process, gone on with at two, then at one again: the order and the losses of the run of one."""
    keys = {"train_file": str(write_jsonl(tmp_path / "rows.jsonl", 30)), "num_train_epochs": 2, "learning_rate": 1e-3}
    keys |= {"save_steps": 1, "save_total_limit": 0, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    whole = make_config(output_dir=str(tmp_path / "whole"), max_steps=6, **keys)
    loop.train(whole)
    one = make_config(output_dir=str(tmp_path / "elastic"), max_steps=2, **keys)
    loop.train(one)
    two = dataclasses.replace(one, gradient_accumulation_steps=1, max_steps=4, resume="auto")
    assert [code for code, _ in world(2, lambda rank: loop.train(two).steps)] == [0, 0]
    loop.train(dataclasses.replace(one, max_steps=6, resume="auto"))
    ours, theirs = lines(tmp_path / "elastic")[0], lines(tmp_path / "whole")[0]
    assert [line["tokens"] for line in ours] == [line["tokens"] for line in theirs]
    assert len(ours) == 6
    for line, other in zip(ours, theirs, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)
    manifests = [checkpoint.validate(checkpoint.checkpoint_path(tmp_path / "elastic", step)) for step in (2, 4, 6)]
    assert [manifest["world_size"] for manifest in manifests] == [1, 2, 1]


@pytest.mark.parametrize(
    ("batch", "size", "expected"),
    [
        (4, 2, "set --gradient_accumulation_steps 4"),
        (6, 2, "set --per_device_train_batch_size 16 --gradient_accumulation_steps 1"),
        (4, 3, "3 processes cannot share 32 equally"),
    ],
)
def test_another_number_of_examples_a_step_is_refused_in_one_line(batch, size, expected):
    config = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}
    saved = dataclasses.asdict(Identity(config, "base", "rows", {}))
    now = Identity(config | {"per_device_train_batch_size": batch}, "base", "rows", {}, size)
    (line,) = now.differences(saved)
    assert line.startswith("examples per step: were 4 x 8 = 32, are ")
    assert expected in line
    assert Identity(config | {"gradient_accumulation_steps": 4}, "base", "rows", {}, 2).differences(saved) == []
    assert Identity(config | {"gradient_accumulation_steps": 4}, "base", "rows", {}).differences(saved) != []


def test_a_run_that_would_take_other_steps_is_refused(make_config, world):
    config = make_config(max_steps=1, save_steps=1)
    loop.train(config)
    resumed = dataclasses.replace(config, resume="auto", max_steps=2)
    ended = world(2, lambda rank: loop.train(resumed).steps)
    assert [code for code, _ in ended] == [CheckpointError.exit_code] * 2
    assert "set --gradient_accumulation_steps 1" in ended[0][1]


# ---------------------------------------------------------------------------------------- what one of them meets


@pytest.mark.parametrize("bad_rank", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_bad_number_of_one_process_is_everyones(make_config, world, tmp_path, bad_rank):
    """A step is skipped by both; the third in a row ends both with code 3, the state before them saved."""
    config = make_config(
        gradient_accumulation_steps=1, max_tokens_per_micro_batch=500, num_train_epochs=3, save_steps=0
    )

    def work(rank):
        if rank == bad_rank:
            sft.token_nats = spoilt({2, 4, 5, 6}, "nan")
        return loop.train(config).steps

    ended = world(2, work)
    assert [code for code, _ in ended] == [3, 3]
    assert "steps 4 to 6" in ended[0][1]
    found, _ = checkpoint.newest_valid(Path(config.output_dir))
    assert found == checkpoint.checkpoint_path(Path(config.output_dir), 3)
    state = json.loads((found / checkpoint.STATE).read_text())
    assert (state["step"], state["skipped_steps"]) == (3, 1)
    assert [line["loss"] is None for line in lines(config.output_dir)[0]] == [False, True, False, True, True]


def test_when_memory_runs_out_in_one_process_all_begin_the_step_again(make_config, world, tmp_path):
    """In a step of one process, in an evaluation of the other."""
    keys = {"gradient_accumulation_steps": 1, "max_tokens_per_micro_batch": 100, "learning_rate": 1e-4}
    keys |= {"eval_file": str(write_jsonl(tmp_path / "held-out.jsonl", 8, seed=2)), "eval_steps": 2}
    found = {}
    for name, bad in (("calm", None), ("step", (1, True)), ("evaluation", (0, False))):
        config = make_config(output_dir=str(tmp_path / name), **keys)

        def work(rank, config=config, bad=bad):
            if bad and rank == bad[0]:
                sft.token_nats = short_once(in_training=bad[1])
            return loop.train(config).steps

        assert world(2, work) == [(0, 4), (0, 4)]
        path = checkpoint.checkpoint_path(Path(config.output_dir), 4)
        found[name] = json.loads((path / checkpoint.STATE).read_text()), flat(adapter_of(config.output_dir))
    for name in ("step", "evaluation"):
        assert found["calm"][0]["max_tokens"] == 100 > found[name][0]["max_tokens"]
        assert found["calm"][0]["tokens"] == found[name][0]["tokens"]
        assert float((found["calm"][1] - found[name][1]).abs().max()) < 1e-6


def short_once(in_training, real=sft.token_nats):
    """token_nats for which memory runs out in this process at its second call of the kind."""
    calls = [0]

    def token_nats(*args):
        calls[0] += torch.is_grad_enabled() == in_training
        if torch.is_grad_enabled() == in_training and calls[0] == 2:
            raise torch.OutOfMemoryError("planted")
        return real(*args)

    return token_nats


def test_when_not_even_one_example_fits_a_process_all_end_with_code_4(make_config, world):
    config = make_config(gradient_accumulation_steps=1)

    def work(rank):
        if rank == 1:
            sft.token_nats = spoilt(range(1000), MemoryError())
        return loop.train(config).steps

    ended = world(2, work)
    assert [code for code, _ in ended] == [4, 4]
    assert "does not fit" in ended[0][1]


def test_a_process_without_rows_waits_for_nobody(make_config, world, tmp_path):
    """The last step of each epoch has one row for two processes, the evaluation one row: the same as alone."""
    rows, held_out = write_jsonl(tmp_path / "rows.jsonl", 9), write_jsonl(tmp_path / "held-out.jsonl", 1, seed=2)
    keys = {"train_file": str(rows), "eval_file": str(held_out), "num_train_epochs": 2, "learning_rate": 1e-3}
    alone = make_config(output_dir=str(tmp_path / "alone"), **keys)
    config = make_config(output_dir=str(tmp_path / "two"), gradient_accumulation_steps=1, **keys)
    loop.train(alone)
    assert world(2, lambda rank: loop.train(config).steps) == [(0, 4), (0, 4)]
    difference = flat(adapter_of(config.output_dir)) - flat(adapter_of(alone.output_dir))
    assert float(difference.abs().max()) < 1e-5


@pytest.mark.parametrize("signalled", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_signal_to_one_process_stops_all_at_the_same_step(make_config, world, tmp_path, signalled):
    keys = {"gradient_accumulation_steps": 1, "max_tokens_per_micro_batch": 40, "save_steps": 0, "lora_dropout": 0.1}
    config = make_config(output_dir=str(tmp_path / "stopped"), **keys)

    def work(rank):
        if rank == signalled:
            sft.token_nats = told_to_stop(config)
        return loop.train(config).steps

    ended = world(2, work)
    assert [code for code, _ in ended] == [143, 143]
    assert "step-000002. Go on with: torchrun --nproc-per-node 2 -m minilora train --resume" in ended[0][1]
    assert checkpoint.newest_valid(Path(config.output_dir))[0].name == "step-000002"
    if signalled:
        return
    whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    assert world(2, lambda rank: loop.train(whole).steps) == [(0, 4), (0, 4)]
    resumed = dataclasses.replace(config, resume="auto")
    assert world(2, lambda rank: loop.train(resumed).steps) == [(0, 4), (0, 4)]
    assert torch.equal(flat(adapter_of(config.output_dir)), flat(adapter_of(whole.output_dir)))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LOCAL_WORLD_SIZE": "16"}, "torchrun --nproc-per-node 16"),
        ({"GROUP_WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "16"}, "torchrun --nproc-per-node 16"),
        (
            {"GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1", "LOCAL_WORLD_SIZE": "8"},
            "torchrun --nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 29500 --nproc-per-node 8",
        ),
        ({}, "torchrun --nproc-per-node 16"),  # started without torchrun
    ],
)
def test_the_resume_command_is_that_of_this_machine(make_config, monkeypatch, variables, expected):
    """It once started all processes on each of several machines."""
    with ExitStack() as held:
        own = prepare(make_config(), StopRequest(), held)
    assert own.resume_command == f"python -m minilora train --resume {own.folder}"
    own.world = World(8, 16, 0)
    for name, value in ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"} | variables).items():
        monkeypatch.setenv(name, value)
    assert own.resume_command == f"{expected} -m minilora train --resume {own.folder}"


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(make_config, start_world, world, tmp_path, killed):
    config = make_config(gradient_accumulation_steps=1, num_train_epochs=50, save_steps=1, learning_rate=1e-4)
    children = start_world(2, lambda rank: loop.train(config).steps)
    until = time.monotonic() + LIMIT_S
    while len(checkpoint.checkpoints(Path(config.output_dir))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(children[killed].pid, signal.SIGKILL)
    sent = time.monotonic()
    ended = [child.end(sent + LIMIT_S) for child in children]
    assert ended[killed][0] == -signal.SIGKILL
    code, printed = ended[1 - killed]
    assert code == 1
    assert "another process of this run is gone" in printed
    assert f"torchrun --nproc-per-node 2 -m minilora train --resume {config.output_dir}" in printed
    assert time.monotonic() - sent < 10
    found, _ = checkpoint.newest_valid(Path(config.output_dir))
    step = int(found.name[5:])
    resumed = dataclasses.replace(config, resume="auto", max_steps=step + 2)
    assert world(2, lambda rank: loop.train(resumed).steps) == [(0, step + 2)] * 2


def test_a_mistake_that_one_process_meets_is_told_once_and_ends_all(make_config, world, tmp_path):
    """A file that is not there on one of the machines."""
    config = make_config(gradient_accumulation_steps=1)
    argv = ["train", "--device", "cpu", "--model", config.model, "--output_dir", config.output_dir, "--train_file"]

    def work(rank):
        raise SystemExit(cli.main([*argv, config.train_file if rank == 0 else str(tmp_path / "missing.jsonl")]))

    def exit_codes(rank):
        try:
            work(rank)
        except SystemExit as end:
            return end.code

    assert world(2, exit_codes) == [(0, 2), (0, 2)]
    first, second = ((tmp_path / f"world1-rank{rank}.log").read_text() for rank in (0, 1))
    assert first.startswith("minilora: process 1: ")
    assert "missing.jsonl" in first
    assert first.count("\n") == 1
    assert second == ""


def test_processes_that_were_started_with_different_settings_are_refused(make_config, world):
    config = make_config(gradient_accumulation_steps=1)
    other = dataclasses.replace(config, learning_rate=0.5)
    ended = world(2, lambda rank: loop.train(other if rank else config).steps)
    assert [code for code, _ in ended] == [2, 2]
    assert "process 1 differs from process 0: learning_rate is 0.5 there and 0.01 here" in ended[1][1]


def test_an_error_of_ours_in_one_process_ends_all(make_config, world):
    config = make_config(gradient_accumulation_steps=1)

    def work(rank):
        if rank == 1:
            sft.token_nats = spoilt({3}, ZeroDivisionError("planted"))
        return loop.train(config).steps

    ended = world(2, work)
    assert ended[0][0] == 1
    assert "process 1: a mistake of ours: ZeroDivisionError: planted" in ended[0][1]
    assert ended[1][0] == 99  # its own, with the traceback that --debug shows


def test_each_process_gets_a_card_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert World(3, 4, 1).device_name("auto") == World(3, 4, 1).device_name("cuda") == "cuda:1"
    assert World(3, 4, 1).device_name("cpu") == "cpu"
    assert World().device_name("cuda:1") == "cuda:1"
    with pytest.raises(MiniloraError, match="one GPU for 4 processes"):
        World(3, 4, 1).device_name("cuda:0")
    with pytest.raises(MiniloraError, match="3 processes on a machine that shows 2 CUDA"):
        World(2, 4, 2).device_name("auto")


# ---------------------------------------------------------------------------------------- long forms


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_process_killed_at_any_moment_soak(make_config, start_world, world, tmp_path):
    """From the start to the end of a run; then it is gone on with, to the adapter of the run that nobody disturbed.

    The other one gets SIGTERM half a second later: torchrun does so at once, and kills 30 s after that.
    """
    trials, rng = faults.count("RANK_KILLS", 20), random.Random(1)
    keys = {"gradient_accumulation_steps": 1, "num_train_epochs": 4, "save_steps": 3, "lora_dropout": 0.1}
    keys |= {"eval_file": str(write_jsonl(tmp_path / "held-out.jsonl", 6, seed=2)), "resume": "auto"}
    calm = make_config(output_dir=str(tmp_path / "calm"), **keys)
    started = time.monotonic()
    assert world(2, lambda rank: loop.train(calm).steps) == [(0, 16), (0, 16)]
    took, slowest, before = time.monotonic() - started, 0.0, 0
    for trial in range(trials):
        config = dataclasses.replace(calm, output_dir=str(tmp_path / f"run{trial}"))
        children = start_world(2, lambda rank, config=config: loop.train(config).steps)
        killed = trial % 2
        time.sleep(rng.uniform(0, took))
        os.kill(children[killed].pid, signal.SIGKILL)
        sent = time.monotonic()
        children[killed].end(sent + LIMIT_S)
        time.sleep(0.5)
        with contextlib.suppress(ProcessLookupError):
            os.kill(children[1 - killed].pid, signal.SIGTERM)
        code, _ = children[1 - killed].end(sent + LIMIT_S)
        assert code in (0, 1, 143)
        slowest = max(slowest, time.monotonic() - sent)
        before += not checkpoint.checkpoints(Path(config.output_dir))
        assert world(2, lambda rank, config=config: loop.train(config).steps) == [(0, 16), (0, 16)]
        assert torch.equal(flat(adapter_of(config.output_dir)), flat(adapter_of(calm.output_dir)))
    print(
        f"\nkill -9 of one of two: {trials} of {trials}, {before} before the first checkpoint, gone in {slowest:.2f} s"
    )


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", ["nan", "memory", "rows"])
def test_what_one_process_meets_at_any_moment_soak(make_config, world, tmp_path, what):
    """A bad number, too little memory, no row: nobody hangs, and both do the same."""
    trials, rng = faults.count("RANK_FAULTS", 10), random.Random(2)
    for trial in range(trials):
        rows = write_jsonl(tmp_path / f"{trial}.jsonl", 9 + 8 * rng.randrange(3) if what == "rows" else 32, seed=trial)
        keys = {"train_file": str(rows), "gradient_accumulation_steps": 1, "max_tokens_per_micro_batch": 100}
        config = make_config(output_dir=str(tmp_path / f"run{trial}"), learning_rate=1e-4, **keys)
        bad, call = rng.randrange(2), rng.randrange(1, 9)

        def work(rank, config=config, bad=bad, call=call):
            if rank == bad and what != "rows":
                sft.token_nats = spoilt({call}, "nan" if what == "nan" else torch.OutOfMemoryError("planted"))
            return dataclasses.asdict(loop.train(config))

        (code, one), (other_code, other) = world(2, work)
        assert (code, other_code) == (0, 0)
        assert one == other
        assert one["skipped_steps"] == (what == "nan")
    print(f"\n{what}: {trials} of {trials}, no hang")


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_torchrun_itself(make_config, tmp_path):
    """Started, killed by one process, started again: the launcher ends the job at once, and the run goes on."""
    config = make_config(gradient_accumulation_steps=1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(faults.ROOT / "train.py")]
    keys = ["--train_file", config.train_file, "--model", config.model, "--output_dir", config.output_dir]
    keys += ["--device", "cpu", "--gradient_accumulation_steps", "1", "--save_steps", "1", "--num_train_epochs", "20"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([*launcher, *keys], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until = time.monotonic() + 120
    while not checkpoint.checkpoints(Path(config.output_dir)) and time.monotonic() < until:
        time.sleep(0.05)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    sent = time.monotonic()
    printed = first.communicate(timeout=60)[0].decode()
    assert first.returncode == 1
    assert time.monotonic() - sent < 60
    assert "another process of this run is gone" in printed
    step = int(checkpoint.newest_valid(Path(config.output_dir))[0].name[5:])
    command = [*launcher, "--resume", config.output_dir, "--max_steps", str(step + 2), "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
