"""NaN, infinity and lack of memory at random places of a run: nothing spoilt is learned, nothing learned is lost."""

import dataclasses
import hashlib
import json
import math
import random
from pathlib import Path

import faults
import pytest
import torch
from conftest import write_jsonl
from safetensors.torch import load_file

from minilora import batching, cli, loop
from minilora.config import FIELDS, TrainConfig
from minilora.decoder import Decoder
from minilora.objectives import sft
from minilora.training import checkpoint

pytestmark = pytest.mark.usefixtures("bare_run")
BAD_STEPS, OUT_OF_MEMORY = 50, 50
SUBSET = 6
KINDS = ("loss", "gradient", "activation")


def trained(run) -> dict[str, torch.Tensor]:
    return {name: param for name, param in run.model.named_parameters() if param.requires_grad}


def bits(run) -> str:
    """A hash of parameters and AdamW's moments."""
    found = hashlib.sha256()
    for name, param in sorted(trained(run).items()):
        found.update(name.encode() + param.detach().numpy().tobytes())
        for key, value in sorted(run.optimizer.state[param].items()):
            found.update(key.encode() + value.numpy().tobytes())
    return found.hexdigest()


def micro_batches(run) -> int:
    """How many micro-batches the run's next step has."""
    examples = [run.data.train[i] for i in run.schedule.examples_of(run.state.step)]
    return len(list(batching.micro_batches(examples, run.state.max_tokens, run.share_prefix)))


def argv_of(config: TrainConfig) -> list[str]:
    """The command line that says what a TrainConfig says."""
    argv = ["train"]
    for name, field in FIELDS.items():
        value = getattr(config, name)
        if value != field.default:
            argv += [f"--{name}", *(value if isinstance(value, tuple) else [str(value)])]
    return argv


# ---------------------------------------------------------------------------------------- NaN


class Plant:
    """One bad number in the k-th micro-batch (from 0) of the next step: `kind` says where."""

    def __init__(self, run, patch, kind: str, k: int, value: float, rng: random.Random):
        self.kind, self.k, self.value, self.rng = kind, k, value, rng
        self.calls, self.planted = 0, False
        self._hooks = []
        real = sft.token_nats

        def token_nats(hidden, *args):
            here, self.calls = self.calls == self.k, self.calls + 1
            nats = real(hidden, *args)
            if here and kind == "loss":
                self.planted = True
                nats = nats * value
            return nats

        patch.setattr(sft, "token_nats", token_nats)
        if kind == "gradient":
            self._hooks.append(rng.choice(list(trained(run).values())).register_hook(self._spoil_gradient))
        if kind == "activation":
            self._spoil_activations(patch, rng.choice(list(run.model.get_decoder().layers)))

    def _spoil_gradient(self, grad):
        if self.calls != self.k + 1 or self.planted:  # backward of the k-th comes after its loss
            return grad
        self.planted = True
        grad = grad.clone()
        grad.view(-1)[self.rng.randrange(grad.numel())] = self.value  # one number of one tensor
        return grad

    def _spoil_activations(self, patch, chosen):
        real = Decoder.layer

        def layer(decoder, module, *inputs):
            output = real(decoder, module, *inputs)
            if module is chosen and self.calls == self.k and not self.planted:
                self.planted = True
                output = output.clone()
                output.view(-1)[self.rng.randrange(output.numel())] = self.value
            return output

        patch.setattr(Decoder, "layer", layer)

    def clear(self):
        for hook in self._hooks:
            hook.remove()


def bad_at_random_steps(start, monkeypatch, capsys, count: int, seed: int) -> None:
    rng = random.Random(seed)
    steps = 3 * count
    run = start(max_steps=steps, weight_decay=0.1, lora_dropout=0.1, learning_rate=1e-3)
    bad = set()
    while len(bad) < count:
        step = rng.randrange(steps)
        if not any({step, near, near + 1} - {step} <= bad for near in (step - 2, step - 1, step + 1)):
            bad.add(step)  # never three in a row: that is another test
    wrong, seen = [], dict.fromkeys(KINDS, 0)
    for step in range(steps):
        before, skipped, out = bits(run), run.state.skipped_steps, capsys.readouterr().out
        if step not in bad:
            record = loop.train_step(run)
            good = bits(run) != before and record["loss"] is not None and run.state.skipped_in_a_row == 0
            if not good:
                wrong.append(f"step {step}: a good step after bad ones: {record}")
            continue
        kind = KINDS[sum(seen.values()) % 3]
        with monkeypatch.context() as patch:
            value = rng.choice((math.nan, math.inf, -math.inf))
            plant = Plant(run, patch, kind, rng.randrange(micro_batches(run)), value, rng)
            record = loop.train_step(run)
            plant.clear()
        seen[kind] += 1
        lines = sorted(run.data.train.lines[run.schedule.examples_of(step)].tolist())
        out = capsys.readouterr().out
        checks = {
            "not planted": plant.planted,
            "parameters or moments have changed": bits(run) == before,
            "not counted": run.state.skipped_steps == skipped + 1,
            "recorded as good": record["loss"] is None or record["grad_norm"] is None,
            "the rows are not named": f"step {step + 1} " in out and str(lines) in out,
            "gradients are left": all(param.grad is None for param in run.model.parameters()),
            "the step was not counted": run.state.step == step + 1,
        }
        json.dumps(record, allow_nan=False)
        wrong += [f"step {step}, {kind} {value}: {words}" for words, fine in checks.items() if not fine]
    for param in trained(run).values():
        assert torch.isfinite(param).all()
    print(f"\nbad numbers: {count} steps {seen}, {len(wrong)} of them wrong; {steps - count} others trained on")
    assert not wrong
    assert run.state.skipped_steps == count


def test_a_bad_number_changes_nothing(start, monkeypatch, capsys):
    bad_at_random_steps(start, monkeypatch, capsys, SUBSET, seed=1)


@pytest.mark.soak
def test_a_bad_number_changes_nothing_soak(start, monkeypatch, capsys):
    bad_at_random_steps(start, monkeypatch, capsys, faults.count("BAD_STEPS", BAD_STEPS), seed=2)


def test_three_in_a_row_end_the_run_with_code_3(make_config, monkeypatch, capsys):
    """What is saved is the state before the three, to the last counter."""
    config = make_config(num_train_epochs=3, lora_dropout=0.1, save_steps=100)
    real_step, real_loss, states = loop.train_step, sft.token_nats, []

    def step(run):
        states.append((dataclasses.replace(run.state), {n: p.detach().clone() for n, p in trained(run).items()}))
        return real_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        patch.setattr(sft, "token_nats", lambda *args: real_loss(*args) * (math.nan if len(states) > 5 else 1.0))
        assert cli.main(argv_of(config)) == 3
    captured = capsys.readouterr()
    found, refused = checkpoint.newest_valid(Path(config.output_dir))
    assert (found.name, refused) == ("step-000005", [])
    assert str(found) in captured.err
    assert "Traceback" not in captured.err
    assert "learning_rate" in captured.err
    state, params = states[5]
    for name, tensor in load_file(found / checkpoint.WEIGHTS).items():
        assert torch.equal(tensor, params[name])
    saved = json.loads((found / checkpoint.STATE).read_text())
    expected = dataclasses.asdict(state)
    differing = {key: (saved[key], value) for key, value in expected.items() if saved[key] != value}
    assert not differing, "counters of the three skipped steps are in the saved state (saved, before them)"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_evaluation_that_is_not_finite_is_no_best_and_can_be_saved(make_config, monkeypatch, tmp_path, value):
    """JSON knows no NaN: the state of a run whose first evaluation was NaN once could not be saved."""
    real, calls = loop.evaluate, [0]

    def evaluate(*args):
        calls[0] += 1
        return value if calls[0] in (1, 3) else real(*args)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    valid = write_jsonl(tmp_path / "valid.jsonl", 6, seed=3)
    config = make_config(eval_file=str(valid), eval_steps=1, save_steps=1, save_total_limit=0)
    summary = loop.train(config)
    assert summary.steps == 4
    assert math.isfinite(summary.best_eval_loss)
    for path in checkpoint.checkpoints(Path(config.output_dir)):
        state = json.loads((path / checkpoint.STATE).read_text())
        assert all(value is None or math.isfinite(value) for value in state.values())
    for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line
        assert "Infinity" not in line


# ---------------------------------------------------------------------------------------- out of memory

ERRORS = (
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:125] DefaultCPUAllocator: can't allocate memory: 1 bytes"),
    lambda: MemoryError(),
)
CALM = {"learning_rate": 1e-4, "max_tokens_per_micro_batch": 200, "num_train_epochs": 1}


def out_of_memory(patch, bad_call: int, error, backward: bool) -> list[int]:
    """In the bad_call-th micro-batch (from 0) of all, forward or backward, memory runs out; returns [calls so far]."""
    real, calls = sft.token_nats, [0]

    def raise_error(grad):
        raise error

    def token_nats(hidden, *args):
        calls[0] += 1
        if calls[0] - 1 == bad_call:
            if not backward:
                raise error
            hidden.register_hook(raise_error)
        return real(hidden, *args)

    patch.setattr(sft, "token_nats", token_nats)
    return calls


def out_of_memory_at_random(start, monkeypatch, tmp_path, count: int, seed: int) -> None:
    rng, wrong = random.Random(seed), []
    calm = start(output_dir=str(tmp_path / "calm"), **CALM)
    with monkeypatch.context() as patch:
        calls = out_of_memory(patch, -1, None, False)
        for _ in range(4):
            loop.train_step(calm)
    total = calls[0]
    for i in range(count):
        call, backward, error = rng.randrange(total), bool(i % 2), ERRORS[i % 3]()
        run = start(output_dir=str(tmp_path / f"run{i}"), **CALM)
        with monkeypatch.context() as patch:
            calls = out_of_memory(patch, call, error, backward)
            for _ in range(4):
                loop.train_step(run)
        furthest = max(
            float((param - trained(calm)[name]).detach().abs().max()) for name, param in trained(run).items()
        )
        saved = json.loads(
            (
                checkpoint.save(run.folder, run.model, run.optimizer, run.state, run.identity, 0) / "state.json"
            ).read_text()
        )
        checks = {
            f"differs by {furthest:.2g}": furthest <= 1e-6,
            f"the budget is {saved['max_tokens']}": saved["max_tokens"] == run.state.max_tokens == 100,
            "not planted": calls[0] > total,
            "tokens are counted twice": saved["tokens"] == calm.state.tokens,
            "steps are counted twice": saved["step"] == 4,
        }
        wrong += [
            f"{type(error).__name__} in micro-batch {call}: {words}" for words, fine in checks.items() if not fine
        ]
    print(f"\nout of memory: {count - len(wrong)} of {count} gave the same adapter, dropout 0, fp32, within 1e-6")
    assert not wrong


def test_out_of_memory_gives_the_same_adapter(start, monkeypatch, tmp_path):
    out_of_memory_at_random(start, monkeypatch, tmp_path, SUBSET // 2, seed=1)


@pytest.mark.soak
def test_out_of_memory_gives_the_same_adapter_soak(start, monkeypatch, tmp_path):
    out_of_memory_at_random(start, monkeypatch, tmp_path, faults.count("OUT_OF_MEMORY", OUT_OF_MEMORY), seed=2)


def test_the_smaller_budget_is_used_from_then_on_and_after_a_resume(make_config, monkeypatch, capsys):
    config = make_config(save_steps=1, save_total_limit=0, **(CALM | {"max_steps": 4}))
    with monkeypatch.context() as patch:
        out_of_memory(patch, 0, ERRORS[0](), False)
        loop.train(config)
    run = Path(config.output_dir)
    for path in checkpoint.checkpoints(run)[:2]:
        state = json.loads((path / checkpoint.STATE).read_text())
        assert state["max_tokens"] == 100
    adapter = run / "adapter" / "adapter_model.safetensors"
    expected = adapter.read_bytes()
    for path in checkpoint.checkpoints(run)[:2]:
        for file in path.iterdir():
            file.unlink()
    capsys.readouterr()
    loop.train(dataclasses.replace(config, resume="auto"))
    assert "up to 100 tokens" in capsys.readouterr().out
    assert adapter.read_bytes() == expected


@pytest.mark.parametrize("error", ERRORS, ids=["torch", "allocator", "python"])
def test_one_example_that_does_not_fit_ends_the_run_with_code_4(make_config, monkeypatch, capsys, error):
    config = make_config(save_steps=1)
    real_step, steps = loop.train_step, [0]

    def step(run):
        steps[0] += 1
        if steps[0] == 3:
            patch.setattr(sft, "token_nats", no_memory)
        return real_step(run)

    def no_memory(*args):
        raise error()

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        assert cli.main(argv_of(config)) == 4
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert "mistake" not in message
    knobs = ("--gradient_checkpointing", "--max_length", "--lora_r")
    assert all(knob in message for knob in knobs)
    assert sorted(knobs, key=message.index) == list(knobs)  # the cheapest first
    assert "tokens" in message
    assert checkpoint.newest_valid(Path(config.output_dir))[0].name == "step-000002"


@pytest.mark.parametrize("error", ERRORS[:2], ids=["torch", "allocator"])
def test_an_evaluation_that_runs_out_of_memory_is_made_again(make_config, monkeypatch, tmp_path, error):
    """... with a smaller budget, as a step is; it once ended the run as a mistake of ours."""
    valid = write_jsonl(tmp_path / "valid.jsonl", 12, seed=3)
    keys = {**CALM, "eval_file": str(valid)}
    calm = loop.train(make_config(output_dir=str(tmp_path / "calm"), **keys))
    with monkeypatch.context() as patch:
        out_of_memory(patch, 1, error(), False)  # the second micro-batch of the evaluation before the first step
        assert cli.main(argv_of(make_config(output_dir=str(tmp_path / "short"), **keys))) == 0
    short = json.loads((tmp_path / "short" / "summary.json").read_text())
    assert short["first_eval_loss"] == pytest.approx(calm.first_eval_loss, rel=1e-6)
    assert short["last_eval_loss"] == pytest.approx(calm.last_eval_loss, rel=1e-5)
