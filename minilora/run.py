"""A run: everything it holds, how it is set up and closed, what it does when something goes wrong."""

import dataclasses
import gc
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minilora import checkpoint, files, runlog
from minilora.batching import Schedule, make_schedule
from minilora.checkpoint import Identity, TrainState
from minilora.config import TrainConfig
from minilora.data import ChatMarkup, DataReport, Dataset, Row, read_rows, split, tokenize
from minilora.fast import speed_up
from minilora.lora import inject
from minilora.memory import gib, memory_bytes
from minilora.model import find_model, fingerprint, load_model, load_tokenizer, pick_device, pick_dtype
from minilora.optim import make_optimizer
from minilora.rundir import CONFIG, RunLock, choose
from minilora.runlog import say
from minilora.stopping import StopRequest

MICRO_BATCH_TOKENS = {"cpu": 512, "cuda": 16384}


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
    before_skipped: TrainState | None = None  # the state before the first of several skipped steps

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


def prepare(config: TrainConfig, stop: StopRequest, held: ExitStack) -> Run:
    """Data, model, adapter, optimizer, and the state they were left in; says what it found.

    Every mistake in the files is found before the model is loaded, every mistake in the settings before the first
    step. `held` gives the folder's lock and the log free when the run is over.
    """
    folder, resumed_from, notes = choose(config)
    rows, report = read_rows(config.train_file, config.on_bad_rows)
    eval_rows, eval_report = read_rows(config.eval_file, config.on_bad_rows) if config.eval_file else ([], None)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    base_folder = find_model(config.model)
    held.enter_context(RunLock(folder))
    tokenizer = load_tokenizer(base_folder)
    markup = ChatMarkup(tokenizer)
    train_set, eval_set = split(_examples(config, rows, markup, report), config.val_size, config.seed)
    if eval_report is not None:
        eval_set = _examples(config, eval_rows, markup, eval_report)
    schedule = make_schedule(
        len(train_set), config.examples_per_step, config.num_train_epochs, config.max_steps, config.seed
    )
    model, base_fingerprint = _trainable_model(config, base_folder, dtype, device)
    optimizer = make_optimizer(model, config.weight_decay)
    hashes = report.sha256 + (eval_report.sha256 if eval_report else "")
    settings = dataclasses.asdict(config) | {"target_modules": list(config.target_modules)}
    identity = Identity(settings, base_fingerprint, hashes, runlog.versions())
    state = _state(config, device, resumed_from, model, optimizer, identity)
    checkpoint.remove_after(folder, state.step)
    description = dataclasses.asdict(identity) | {"device": runlog.device_name(device), "dtype": str(dtype)}
    files.replace_file(folder / CONFIG, files.json_chunks(description))
    kept_step = state.step if resumed_from else -1
    log = runlog.RunLog(folder, state.step, kept_step, schedule.num_steps, config.logging_steps)
    held.callback(log.close)
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


def _trainable_model(
    config: TrainConfig, base_folder: Path, dtype: torch.dtype, device: torch.device
) -> tuple[Any, str]:
    """(the base with what is trained in it, the base's fingerprint); method full trains fp32 masters."""
    torch.backends.cuda.matmul.allow_tf32 = True  # as the seed's scripts: fp32 products may use tensor cores
    model: Any = load_model(base_folder, torch.float32 if config.method == "full" else dtype, device)
    base_fingerprint = fingerprint(model)
    if config.method == "lora":
        shape = (config.lora_r, config.lora_alpha, config.lora_dropout, config.use_rslora)
        inject(model, config.target_modules, *shape, seed=config.seed)
    else:
        model.requires_grad_(True)
    speed_up(model)
    if config.gradient_checkpointing:
        _checkpoint_activations(model)
    return model, base_fingerprint


def _checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward pass; transformers gave its method a new name in 5.2x."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _state(
    config: TrainConfig,
    device: torch.device,
    resumed_from: Path | None,
    model: Any,
    optimizer: torch.optim.Optimizer,
    identity: Identity,
) -> TrainState:
    """A new state, or the saved one; a token budget that the settings have changed goes before the saved one."""
    asked = config.max_tokens_per_micro_batch or MICRO_BATCH_TOKENS[device.type]
    asked = asked if config.packing else 1  # smaller than any example: each goes alone
    state = TrainState() if resumed_from is None else checkpoint.load(resumed_from, model, optimizer, identity)
    if state.asked_tokens != asked:
        state.asked_tokens = state.max_tokens = asked
    return state


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
