"""A run: everything it holds, how it is set up and closed, what it does when something goes wrong."""

import dataclasses
import gc
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minilora import checkpoint, files, runlog
from minilora.batching import Schedule, common_prefix, make_schedule
from minilora.checkpoint import Identity, TrainState
from minilora.config import TrainConfig
from minilora.data import ChatMarkup, DataReport, Dataset, Row, read_rows, split, tokenize
from minilora.memory import free_bytes, gib, memory_bytes, peak_memory_bytes, trim_heap
from minilora.method import make_trainable
from minilora.model import find_model, fingerprint, load_model, load_tokenizer, pick_device, pick_dtype
from minilora.optim import make_optimizer
from minilora.predict import Choice, Setup, choose_cut, shares_prefix
from minilora.rundir import CONFIG, choose, claim, lasting_settings
from minilora.runlog import say
from minilora.stopping import StopRequest

MICRO_BATCH_TOKENS = {"cpu": 768, "cuda": 16384}  # of a CUDA device: less where that is predicted not to fit
SHARED_PREFIXES = 4  # a micro-batch has room for so many times the tokens that its rows share


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
    checkpointing: bool  # activations are computed again in the backward pass
    predicted_peak_bytes: int | None = None
    saved_step: int = -1  # of the checkpoint that this run has written last or was resumed from; -1: none
    before_skipped: TrainState | None = None  # the state before the first of several skipped steps

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 matrix products where the run computes in bf16."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @property
    def share_prefix(self) -> bool:
        """Whether a micro-batch computes what all its rows begin with only once."""
        return shares_prefix(self.config, self.device.type)

    def release(self) -> None:
        """Give the memory of model and optimizer free; the run can only be reported after that."""
        del self.model, self.optimizer
        gc.collect()
        trim_heap(self.device)


def prepare(config: TrainConfig, stop: StopRequest, held: ExitStack) -> Run:
    """Data, model, adapter, optimizer, and the state they were left in; says what it found.

    Every mistake in the files is found before the model is loaded, every mistake in the settings before the first
    step. `held` gives the folder's lock and the log free when the run is over.
    """
    choose(config)  # a folder that cannot be used is told before anything is read
    rows, report = read_rows(config.train_file, config.on_bad_rows)
    eval_rows, eval_report = read_rows(config.eval_file, config.on_bad_rows) if config.eval_file else ([], None)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    base_folder = find_model(config.model)
    folder, resumed_from, notes = claim(config, held)
    tokenizer = load_tokenizer(base_folder)
    markup = ChatMarkup(tokenizer)
    longest = longest_allowed(config, base_folder, notes)
    train_set, eval_set = split(to_examples(config, rows, markup, report, longest), config.val_size, config.seed)
    if eval_report is not None:
        eval_set = to_examples(config, eval_rows, markup, eval_report, longest)
    schedule = make_schedule(
        len(train_set), config.examples_per_step, config.num_train_epochs, config.max_steps, config.seed
    )
    setup = Setup(config, base_folder, dtype, device.type, bool(config.gradient_checkpointing))
    choice = _choose_cut(setup, train_set, schedule, device, resumed_from)
    before_loading = memory_bytes(device)
    model, base_fingerprint = _trainable_model(config, base_folder, dtype, device, choice.checkpointing)
    optimizer = make_optimizer(model, config.weight_decay)
    hashes = report.sha256 + (eval_report.sha256 if eval_report else "")
    identity = Identity(lasting_settings(config), base_fingerprint, hashes, runlog.versions())
    state = TrainState() if resumed_from is None else checkpoint.load(resumed_from, model, optimizer, identity)
    if state.asked_tokens != choice.max_tokens:  # changed settings go before the saved ones
        state.asked_tokens = state.max_tokens = choice.max_tokens
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
        checkpointing=choice.checkpointing,
        predicted_peak_bytes=_predicted_peak(choice, device, before_loading),
        saved_step=kept_step,
    )
    _header(run, report, eval_report, [*notes, *choice.notes])
    return run


def longest_allowed(config: TrainConfig, base_folder: Path, notes: list[str]) -> int:
    """max_length, or the positions that the base was made for where they are fewer, which `notes` then tells."""
    try:
        positions = files.read_json(base_folder / "config.json").get("max_position_embeddings")
    except ValueError:
        positions = None  # loading the model says what is wrong with it
    if not isinstance(positions, int) or not 2 <= positions < config.max_length:
        return config.max_length
    notes.append(f"max_length {config.max_length:,}: this model has {positions:,} positions, so {positions:,} holds")
    return positions


def to_examples(
    config: TrainConfig, rows: list[Row], markup: ChatMarkup, report: DataReport, max_length: int
) -> Dataset:
    """Rows as the settings want them rendered, cut and masked."""
    return tokenize(
        rows,
        markup,
        report,
        system_prompt=config.system_prompt,
        max_length=max_length,
        overlong=config.overlong,
        train_on_prompt=config.train_on_prompt,
    )


def _trainable_model(
    config: TrainConfig, base_folder: Path, dtype: torch.dtype, device: torch.device, checkpointing: bool
) -> tuple[Any, str]:
    """(the base with what is trained in it, the base's fingerprint); method full trains fp32 masters."""
    torch.backends.cuda.matmul.allow_tf32 = True  # fp32 products may use tensor cores
    model: Any = load_model(base_folder, torch.float32 if config.method == "full" else dtype, device)
    base_fingerprint = fingerprint(model)
    make_trainable(model, config, checkpointing)
    return model, base_fingerprint


def _choose_cut(
    setup: Setup, train_set: Dataset, schedule: Schedule, device: torch.device, resumed_from: Path | None
) -> Choice:
    """The cut that the settings ask for, or one that fits the card.

    A resumed run keeps what was chosen when it began: another cut would draw other dropout.
    """
    config = setup.config
    asked = config.max_tokens_per_micro_batch if config.packing else 1  # smaller than any example: each goes alone
    if not asked and resumed_from is not None and (before := checkpoint.asked_tokens(resumed_from)) > 1:
        asked = before if device.type == "cuda" else 0
    most = MICRO_BATCH_TOKENS[device.type]
    if shares_prefix(config, device.type):  # a long one pays only where several rows meet
        most = max(most, SHARED_PREFIXES * common_prefix([train_set[i] for i in schedule.examples_of(0)]))
    if device.type == "cuda":
        return choose_cut(setup, train_set, schedule, asked, most, free_bytes(device))
    return choose_cut(setup, train_set, schedule, asked or most, most)


def _predicted_peak(choice: Choice, device: torch.device, before_loading: int) -> int | None:
    """Most that will be in use at once; loading the base may have taken more than its training will.

    On a CPU, weights read from a file in their own dtype are in memory only once they are used.
    """
    if choice.memory is None:
        return None
    return max(peak_memory_bytes(device), round(choice.memory.peak(device.type, before_loading)))


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
    cut = (
        f"in micro-batches of up to {run.state.max_tokens:,} tokens" if config.packing else "one example a micro-batch"
    )
    say(
        "batch",
        f"{config.per_device_train_batch_size} x {config.gradient_accumulation_steps} = {config.examples_per_step} "
        f"examples a step, {cut}" + ", activations computed again in the backward pass" * run.checkpointing,
    )
    say("steps", f"{schedule.num_steps:,} ({schedule.steps_per_epoch:,} an epoch), from step {run.state.step:,}")
    say("device", f"{runlog.device_name(run.device)}, matrix products in {str(run.dtype).removeprefix('torch.')}")
    peak = f", {gib(run.predicted_peak_bytes)} predicted at the peak" if run.predicted_peak_bytes else ""
    say("memory", f"{gib(memory_bytes(run.device))} in use before training{peak}")
    say("example", runlog.marked_example(run.train_set[0], run.tokenizer))


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    params = list(model.parameters())
    return sum(p.numel() for p in params if p.requires_grad), sum(p.numel() for p in params)
