"""A run: everything it holds, how it is set up and closed, what it does when something goes wrong."""

import dataclasses
import gc
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minilora import adapter, checkpoint, files, output, runlog
from minilora.batching import Schedule, make_schedule
from minilora.checkpoint import Identity, TrainState
from minilora.config import TrainConfig
from minilora.data import ChatMarkup, DataReport, Dataset, Example, Row, read_rows, split, tokenize
from minilora.errors import DivergedError, OutOfMemoryError
from minilora.fast import speed_up
from minilora.generate import Speaker, probe_logits
from minilora.lora import inject
from minilora.memory import gib, memory_bytes, peak_memory_bytes
from minilora.model import find_model, fingerprint, load_model, load_tokenizer, pick_device, pick_dtype
from minilora.optim import make_optimizer
from minilora.rundir import CONFIG, RunLock, choose
from minilora.runlog import say
from minilora.stopping import StopRequest

MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
MAX_SKIPPED_IN_A_ROW = 3


@dataclass
class Run:
    """Everything one training run holds."""

    config: TrainConfig
    folder: Path
    base_folder: Path
    device: torch.device
    dtype: torch.dtype  # of the matrix products
    tokenizer: Any
    markup: ChatMarkup
    model: Any
    optimizer: torch.optim.Optimizer
    train_set: Dataset
    eval_set: Dataset | None
    schedule: Schedule
    state: TrainState
    identity: Identity
    log: runlog.RunLog
    stop: StopRequest
    lock: RunLock

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 matrix products where the run computes in bf16."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @property
    def share_prefix(self) -> bool:
        """Whether a micro-batch computes what all its rows begin with only once."""
        return self.config.share_prefix == "on" or (self.config.share_prefix == "auto" and self.device.type == "cpu")

    def release(self) -> None:
        """Give the memory of model and optimizer free; the run can only be reported after that."""
        del self.model, self.optimizer
        gc.collect()


@dataclass(frozen=True)
class Summary:
    """summary.json: the totals of a run."""

    steps: int
    stop_reason: str
    tokens: int
    supervised_tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    trainable_parameters: int
    parameters: int
    skipped_steps: int
    first_loss: float | None
    last_loss: float | None
    first_eval_loss: float | None
    last_eval_loss: float | None
    best_eval_loss: float | None
    verified_max_logit_difference: float
    result: str
    answers: list[dict[str, str]]


def prepare(config: TrainConfig, stop: StopRequest) -> Run:
    """Data, model, adapter, optimizer, and the state they were left in; says what it found.

    Every mistake in the files is found before the model is loaded, every mistake in the settings before the first step.
    """
    folder, resumed_from, notes = choose(config)
    rows, report = read_rows(config.train_file, config.on_bad_rows)
    eval_rows, eval_report = read_rows(config.eval_file, config.on_bad_rows) if config.eval_file else (None, None)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    torch.backends.cuda.matmul.allow_tf32 = True  # as the seed's scripts: fp32 products may use tensor cores
    base_folder = find_model(config.model)
    lock = RunLock(folder)
    tokenizer = load_tokenizer(base_folder)
    markup = ChatMarkup(tokenizer)
    train_set, eval_set = split(_examples(config, rows, markup, report), config.val_size, config.seed)
    if eval_rows is not None and eval_report is not None:
        eval_set = _examples(config, eval_rows, markup, eval_report)

    model: Any = load_model(base_folder, torch.float32 if config.method == "full" else dtype, device)
    base_fingerprint = fingerprint(model)
    if config.method == "lora":
        inject(
            model,
            config.target_modules,
            config.lora_r,
            config.lora_alpha,
            config.lora_dropout,
            config.use_rslora,
            config.seed,
        )
    else:
        model.requires_grad_(True)
    speed_up(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(model, config.weight_decay)
    schedule = make_schedule(
        len(train_set), config.examples_per_step, config.num_train_epochs, config.max_steps, config.seed
    )
    identity = Identity(
        dataclasses.asdict(config) | {"target_modules": list(config.target_modules)},
        base_fingerprint,
        report.sha256 + (eval_report.sha256 if eval_report else ""),
        runlog.versions(),
    )
    state = TrainState(max_tokens=_token_budget(config, device))
    if resumed_from is not None:
        state = checkpoint.load(resumed_from, model, optimizer, identity)
    description = dataclasses.asdict(identity) | {"device": runlog.device_name(device), "dtype": str(dtype)}
    files.replace_file(folder / CONFIG, files.json_chunks(description))
    log = runlog.RunLog(folder, state.step, schedule.num_steps, config.logging_steps)
    run = Run(
        config=config,
        folder=folder,
        base_folder=base_folder,
        device=device,
        dtype=dtype,
        tokenizer=tokenizer,
        markup=markup,
        model=model,
        optimizer=optimizer,
        train_set=train_set,
        eval_set=eval_set,
        schedule=schedule,
        state=state,
        identity=identity,
        log=log,
        stop=stop,
        lock=lock,
    )
    _header(run, report, eval_report, notes)
    return run


def _examples(config: TrainConfig, rows: list[Row], markup: ChatMarkup, report: DataReport) -> Dataset:
    return tokenize(
        rows,
        markup,
        report,
        system_prompt=config.system_prompt,
        max_length=config.max_length,
        overlong=config.overlong,
        train_on_prompt=config.train_on_prompt,
    )


def _token_budget(config: TrainConfig, device: torch.device) -> int:
    if not config.packing:
        return 1  # smaller than any example: each goes alone
    return config.max_tokens_per_micro_batch or MICRO_BATCH_TOKENS[device.type]


def _header(run: Run, report: DataReport, eval_report: DataReport | None, notes: list[str]) -> None:
    config, schedule = run.config, run.schedule
    trained, total = parameter_counts(run.model)
    say("run", str(run.folder))
    for note in notes:
        say("", note)
    say("model", f"{config.model} ({run.model.config.model_type}, {total:,} parameters)")
    how = f"r {config.lora_r}, alpha {config.lora_alpha}, dropout {config.lora_dropout} on "
    how = how + ", ".join(config.target_modules) if config.method == "lora" else "every weight, fp32 masters"
    say("method", f"{config.method}: {how}")
    say("trainable", f"params: {trained} || all params: {total} || trainable%: {100 * trained / total:.2f}")
    for part in (report, eval_report):
        for line in runlog.describe_data(part) if part else ():
            say("data", line)
    say(
        "batch",
        f"{config.per_device_train_batch_size} x {config.gradient_accumulation_steps} = {config.examples_per_step} "
        f"examples a step, in micro-batches of up to {run.state.max_tokens:,} tokens",
    )
    say("steps", f"{schedule.num_steps:,} ({schedule.steps_per_epoch:,} an epoch), from step {run.state.step:,}")
    say("device", f"{runlog.device_name(run.device)}, matrix products in {str(run.dtype).removeprefix('torch.')}")
    say("memory", f"{gib(memory_bytes(run.device))} in use before training")
    say("example", runlog.marked_example(run.train_set[0], run.tokenizer))


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    params = list(model.parameters())
    return sum(p.numel() for p in params if p.requires_grad), sum(p.numel() for p in params)


def record_evaluation(run: Run, loss: float) -> None:
    """Keep an evaluation's loss, and the adapter in best/ if no earlier one was better."""
    state, best = run.state, run.state.best_eval_loss
    run.log.evaluation({"step": state.step, "eval_loss": loss if math.isfinite(loss) else None}, best)
    if math.isfinite(loss) and (best is None or loss < best):
        state.best_eval_loss, state.evals_since_best = loss, 0
        if state.step:
            save_result(run, run.folder / "best")
    else:
        state.evals_since_best += 1
    state.first_eval_loss = loss if state.step == 0 else state.first_eval_loss
    state.last_eval_loss = loss if math.isfinite(loss) else state.last_eval_loss
    state.evaluated_step = state.step


def save_checkpoint(run: Run) -> Path:
    """The checkpoint of run.state, written now unless it is there."""
    path = checkpoint.checkpoint_path(run.folder, run.state.step)
    if path.exists() and checkpoint.is_valid(path):
        return path
    return checkpoint.save(run.folder, run.model, run.optimizer, run.state, run.identity, run.config.save_total_limit)


def save_result(run: Run, folder: Path) -> None:
    """What is trained, as it is now, in the form its users load: a PEFT adapter or a Hugging Face model."""
    config = run.config
    if config.method == "full":
        output.save_model(folder, run.model, run.tokenizer, run.dtype)
        return
    settings = adapter.AdapterConfig(
        base_model=str(run.base_folder.resolve()) if Path(config.model).expanduser().is_dir() else config.model,
        rank=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.target_modules,
        rslora=config.use_rslora,
    )
    metadata = {"base_fingerprint": run.identity.base_fingerprint, "system_prompt": config.system_prompt}
    output.save_adapter(folder, run.model, run.tokenizer, settings, metadata)


def finish(run: Run, stop_reason: str) -> Summary:
    """Save the result, load it from the disk into a fresh model, compare, let it speak; write summary.json."""
    state, method = run.state, run.config.method
    result = run.folder / ("adapter" if method == "lora" else "model")
    trained, total = parameter_counts(run.model)
    peak = peak_memory_bytes(run.device)
    save_result(run, result)
    ids = output.probe(run.markup, run.config.system_prompt)
    live = run.model.to(run.dtype) if method == "full" else run.model
    reference = probe_logits(live, ids)
    del live
    run.release()  # the card may not hold two bases
    base, apply = output.reload(run.base_folder, result, method, run.dtype, run.device)
    before = output.sample_answers(Speaker(base, run.tokenizer, run.markup, run.config.system_prompt))
    tuned = apply()
    difference = output.compare(reference, tuned, ids, result)
    after = output.sample_answers(Speaker(tuned, run.tokenizer, run.markup, run.config.system_prompt))
    summary = Summary(
        steps=state.step,
        stop_reason=stop_reason,
        tokens=state.tokens,
        supervised_tokens=state.supervised_tokens,
        seconds=state.seconds,
        tokens_per_second=state.tokens / state.seconds if state.seconds else 0.0,
        peak_memory_bytes=peak,
        trainable_parameters=trained,
        parameters=total,
        skipped_steps=state.skipped_steps,
        first_loss=state.first_loss,
        last_loss=state.last_loss,
        first_eval_loss=state.first_eval_loss,
        last_eval_loss=state.last_eval_loss,
        best_eval_loss=state.best_eval_loss,
        verified_max_logit_difference=difference,
        result=result.name,
        answers=[
            {"prompt": prompt, "base": old, "tuned": new}
            for prompt, old, new in zip(output.SAMPLE_PROMPTS, before, after, strict=True)
        ],
    )
    files.replace_file(run.folder / runlog.SUMMARY, files.json_chunks(dataclasses.asdict(summary)))
    _report(run, summary)
    return summary


def _report(run: Run, summary: Summary) -> None:
    for sample in summary.answers:
        say("asked", sample["prompt"].replace("\n", " "))
        say("  base", sample["base"].replace("\n", " "))
        say("  tuned", sample["tuned"].replace("\n", " "))
    result = run.folder / summary.result
    say("done", f"{summary.stop_reason} after {summary.steps:,} steps, {summary.seconds:.1f} s in training steps")
    say("speed", f"{summary.tokens_per_second:,.0f} tokens/s over {summary.tokens:,} real tokens")
    if summary.first_loss is not None and summary.last_loss is not None:
        say("loss", f"{summary.first_loss:.4f} -> {summary.last_loss:.4f} nats per supervised token")
    if summary.first_eval_loss is not None and summary.last_eval_loss is not None:
        say(
            "held-out",
            f"{summary.first_eval_loss:.4f} -> {summary.last_eval_loss:.4f} (best {summary.best_eval_loss:.4f})",
        )
    say("memory", f"{gib(summary.peak_memory_bytes)} at the peak")
    difference = summary.verified_max_logit_difference
    say("verified", f"{result}: loaded from the disk into a fresh base, largest logit difference {difference:.3g}")
    which = f"--adapter {result}" if summary.result == "adapter" else f"--model {result}"
    say("next", f"python -m minilora chat {which}")
    say("", f'python -m minilora generate {which} "{output.SAMPLE_PROMPTS[0]}"')


def skip(run: Run, indices: np.ndarray, loss: float, grad_norm: float) -> None:
    """Leave the weights as they are; after MAX_SKIPPED_IN_A_ROW such steps, save the last good state and stop."""
    state = run.state
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    lines = sorted(run.train_set.lines[indices].tolist())
    run.log.note(f"step {state.step + 1} skipped: loss {loss}, gradient norm {grad_norm}; rows at lines {lines}")
    if state.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
        return
    good = state.step + 1 - MAX_SKIPPED_IN_A_ROW
    run.state = dataclasses.replace(
        state, step=good, skipped_in_a_row=0, skipped_steps=state.skipped_steps - MAX_SKIPPED_IN_A_ROW
    )
    raise DivergedError(
        f"no finite gradient in {MAX_SKIPPED_IN_A_ROW} steps in a row (steps {good + 1} to {state.step + 1}). "
        f"The state before them is saved: {save_checkpoint(run)}. Lower --learning_rate, or look at the rows above."
    )


def shrink_budget(run: Run, examples: list[Example]) -> None:
    """Halve the token budget for the rest of the run. Raises OutOfMemoryError when examples already went one by one."""
    longest = max(len(example.input_ids) - 1 for example in examples)
    if run.state.max_tokens <= longest:
        cheaper = [] if run.config.gradient_checkpointing else ["--gradient_checkpointing"]
        cheaper += [f"--max_length {longest // 2}", "a smaller --lora_r", "a smaller --model"]
        raise OutOfMemoryError(
            f"one example of {longest:,} tokens does not fit: {gib(peak_memory_bytes(run.device))} were in use. "
            f"In order of cost: {', '.join(cheaper)}."
        )
    run.state.max_tokens = max(longest, run.state.max_tokens // 2)
    run.log.note(f"out of memory: the step begins again with {run.state.max_tokens:,} tokens a micro-batch")
