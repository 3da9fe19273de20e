"""A run: everything it holds, how it is set up and closed, what it does when something goes wrong."""

import dataclasses
import gc
import os
import reprlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minilora import adapter, checkpoint, files, runlog
from minilora.batching import (
    Batch,
    Schedule,
    collate,
    cut_examples,
    default_tokens,
    make_schedule,
    micro_batches,
    share,
)
from minilora.checkpoint import Identity, TrainState
from minilora.config import TrainConfig
from minilora.data import ChatMarkup, DataReport, Example, Question
from minilora.dataset import Dataset
from minilora.dist import World, join
from minilora.errors import ConfigError, first_line
from minilora.memory import free_bytes, gib, memory_bytes, peak_memory_bytes, trim_heap
from minilora.method import adapter_to_go_on, in_words, make_trainable
from minilora.model import (
    find_model,
    fingerprint,
    hidden_states,
    load_model,
    load_tokenizer,
    packed,
    pick_device,
    pick_dtype,
)
from minilora.optim import make_optimizer
from minilora.predict import Choice, Setup, choose_cut, shares_prefix
from minilora.quant import num_elements
from minilora.rundir import CONFIG, choose, claim, lasting_settings
from minilora.runlog import say
from minilora.shard import shard
from minilora.sources import Sets, make_sets, read_sources
from minilora.stopping import StopRequest


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
    questions: list[Question]  # answered at each evaluation
    schedule: Schedule
    state: TrainState
    identity: Identity
    log: runlog.RunLog | runlog.Silence
    stop: StopRequest
    world: World
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

    @property
    def resume_command(self) -> str:
        """The command that goes on with this run, on this machine; of several, torchrun tells each its own."""
        told, start = os.environ, ["python"]
        started = Path(sys.argv[0])  # a clone's train.py, or the module of an installed package
        program = [str(started.absolute())] if started.name == "train.py" else ["-m", "minilora", "train"]
        if self.world.size > 1:
            start = ["torchrun"]
            if told.get("GROUP_WORLD_SIZE", "1") != "1":
                start += ["--nnodes", told["GROUP_WORLD_SIZE"], "--node-rank", told.get("GROUP_RANK", "0")]
                start += ["--master-addr", told["MASTER_ADDR"], "--master-port", told["MASTER_PORT"]]
            start += ["--nproc-per-node", told.get("LOCAL_WORLD_SIZE", str(self.world.size))]
        return shlex.join([*start, *program, "--resume", str(self.folder.absolute())])

    def batches(self, examples: Sequence[Example]) -> Iterator[Batch]:
        """The micro-batches that this process takes of the examples of a step, on its device."""
        cut = (self.state.max_tokens, self.share_prefix)
        lengths = [len(example.input_ids) - 1 for example in examples]
        shares = [[examples[i] for i in part] for part in share(lengths, self.world.size)]
        for batch in micro_batches(shares[self.world.rank], *cut):
            yield batch.to(self.device)
        if self.world.lockstep:  # who has fewer micro-batches than another goes through as many
            counts = [len(cut_examples(each, *cut)) for each in shares]
            shortest = collate([min(examples, key=lambda example: len(example.input_ids))]).unsupervised()
            for _ in range(counts[self.world.rank], max(counts)):
                yield shortest.to(self.device)

    def check(self) -> None:
        """Raise StoppedError if a signal has come; among shards, if it has come to any process."""
        if self.world.lockstep:
            self.stop.signal_number = max(self.world.exchange(self.stop.signal_number))
        self.stop.check()

    def release(self) -> None:
        """Give the memory of model and optimizer free; the run can only be reported after that."""
        del self.model, self.optimizer
        gc.collect()
        trim_heap(self.device)


def prepare(config: TrainConfig, stop: StopRequest, held: ExitStack, header: bool = True) -> Run:
    """Data, model, adapter, optimizer, and the state they were left in; says what it found, unless told not to.

    Every mistake in the files is found before the model is loaded, every mistake in the settings before the first
    step. `held` gives the folder's lock and the log free when the run is over. A signal stops it where it is.
    """
    with stop.interruptible():  # nothing can be lost yet
        world = join(held)
    with world.together(), stop.interruptible():
        return _prepare(config, world, stop, held, header)


def _prepare(config: TrainConfig, world: World, stop: StopRequest, held: ExitStack, header: bool) -> Run:
    if config.fsdp and world.size == 1:
        raise ConfigError("fsdp = True shares the base out over processes: torchrun --nproc-per-node N train.py ...")
    world.lead(lambda: str(choose(config)))  # a folder that cannot be used is told before anything is read
    if config.report_to == "tensorboard":
        runlog.check_board()
    sources = read_sources(config)
    device = world.connect(pick_device(world.device_name(config.device)))
    dtype = pick_dtype(config.dtype, device)
    base_folder = find_model(config.model)
    folder, resumed_from, notes = _claim(config, world, held)
    begun = None if resumed_from else adapter_to_go_on(config)
    tokenizer = load_tokenizer(base_folder)
    markup = ChatMarkup(tokenizer)
    longest = longest_allowed(config, base_folder, notes)
    sets = make_sets(config, sources, markup, longest)
    schedule = schedule_of(config, sets, world.size)
    shards = world.size if config.fsdp else 1
    setup = Setup(config, base_folder, dtype, device.type, bool(config.gradient_checkpointing), shards)
    choice = _choose_cut(setup, sets.train, schedule, device, resumed_from, world)
    before_loading = memory_bytes(device)
    model, base_fingerprint = _trainable_model(config, base_folder, dtype, device, choice.checkpointing, begun, world)
    optimizer = make_optimizer(model, config.weight_decay, config.loraplus_lr_ratio)
    _compile_kernels(config, model, sets.train, dtype, stop, tell=header and world.main)
    identity = Identity(lasting_settings(config), base_fingerprint, sources.sha256, runlog.versions(), world.size)
    agree(world, identity, dtype, device)
    state = TrainState() if resumed_from is None else checkpoint.load(resumed_from, model, optimizer, identity)
    if state.asked_tokens != choice.max_tokens:  # changed settings go before the saved ones
        state.asked_tokens = state.max_tokens = choice.max_tokens
    world.copy_main([*checkpoint.trainable(model).values(), *checkpoint.starts(model).values()])
    kept_step = state.step if resumed_from else -1
    description = dataclasses.asdict(identity) | {"device": runlog.device_name(device), "dtype": str(dtype)}
    description["data"] = [runlog.data_record(report) for report in sources.reports]
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
        train_set=sets.train,
        eval_set=sets.eval,
        questions=sets.questions,
        schedule=schedule,
        state=state,
        identity=identity,
        log=_begin_log(config, world, folder, description, (state.step, kept_step, schedule.num_steps), held),
        stop=stop,
        world=world,
        checkpointing=choice.checkpointing,
        predicted_peak_bytes=_predicted_peak(choice, device, before_loading),
        saved_step=kept_step,
    )
    world.advice = f" Go on with: {run.resume_command}"
    if header and world.main:
        _header(run, sources.reports, [*notes, *choice.notes])
    return run


def _begin_log(
    config: TrainConfig,
    world: World,
    folder: Path,
    description: dict[str, Any],
    steps: tuple[int, int, int],
    held: ExitStack,
) -> runlog.RunLog | runlog.Silence:
    """config.json and the log of the process that writes; steps: the first one, the kept one, their number."""
    if not world.main:
        return runlog.Silence()
    files.replace_file(folder / CONFIG, files.json_chunks(description))
    log = runlog.RunLog(folder, *steps, config.logging_steps, config.report_to == "tensorboard")
    held.callback(log.close)
    return log


def schedule_of(config: TrainConfig, sets: Sets, processes: int = 1) -> Schedule:
    """Which examples of the training set each step of a run takes."""
    length = (config.num_train_epochs, config.max_steps)
    per_step = config.examples_per_step * processes
    return make_schedule(len(sets.train), per_step, *length, config.seed, sets.parts)


def _claim(config: TrainConfig, world: World, held: ExitStack) -> tuple[Path, Path | None, list[str]]:
    """`claim` by the process that writes."""

    def claimed() -> tuple[str, str | None, list[str]]:
        folder, found, notes = claim(config, held)
        return str(folder), str(found) if found else None, notes

    folder, found, notes = world.lead(claimed)
    return Path(folder), Path(found) if found else None, notes


def agree(world: World, identity: Identity, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ConfigError when the processes of a run were not started alike, or do not read the same files."""
    places = ("model", "train_file", "eval_file", "adapter", "output_dir", "resume")  # may differ between machines
    own = {key: value for key, value in identity.config.items() if key not in places}
    own |= {"the base model": identity.base_fingerprint, "the rows": identity.dataset_sha256}
    own |= {"the type of the matrix products": str(dtype), "the kind of device": device.type}
    said = world.exchange(own)
    for rank, theirs in enumerate(said):
        if odd := [key for key in own if theirs.get(key) != said[0].get(key)]:
            here, there = (reprlib.repr(each.get(odd[0])) for each in (said[0], theirs))
            raise ConfigError(f"process {rank} differs from process 0: {odd[0]} is {there} there and {here} here.")


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


def _trainable_model(
    config: TrainConfig,
    base_folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    checkpointing: bool,
    begun: Path | None,
    world: World,
) -> tuple[Any, str]:
    """(the base with what is trained in it, the base's fingerprint); method full trains fp32 masters.

    begun: the adapter whose values the run begins with
    """
    torch.backends.cuda.matmul.allow_tf32 = True  # fp32 products may use tensor cores
    place = torch.device("cpu") if config.fsdp else device  # it may be larger than one device
    model: Any = load_model(base_folder, torch.float32 if config.method == "full" else dtype, place, config.base_bits)
    base_fingerprint = fingerprint(model)
    updates = adapter.read(model, begun, base_fingerprint, allow_other_base=None)[1] if begun else None
    make_trainable(model, config, checkpointing)
    if updates:
        adapter.fill(model, updates)
    if config.fsdp:
        shard(model, world, device, dtype)
    return model, base_fingerprint


def _compile_kernels(
    config: TrainConfig, model: Any, train_set: Dataset, dtype: torch.dtype, stop: StopRequest, tell: bool
) -> None:
    """Have torch.compile make its kernels before the first step, where it is to. Raises ConfigError where it cannot."""
    if not config.torch_compile:
        return
    if tell:
        say("compiling", "norms, SwiGLU and rotary embedding; later runs find them ready")
    batch = collate([train_set[int(train_set.lengths.argmin())]]).to(next(model.parameters()).device)
    bf16 = dtype == torch.bfloat16
    try:
        with packed(model.train()), torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=bf16):
            hidden_states(model, batch).sum().backward()
    except Exception as error:  # no compiler, a broken one, a cache that cannot be written: each its own class
        stop.check()  # a signal meets the compiler, too
        raise ConfigError(f"torch_compile: torch cannot compile here ({first_line(error)}). Leave it out.") from error
    model.zero_grad(set_to_none=True)


def _choose_cut(
    setup: Setup, train_set: Dataset, schedule: Schedule, device: torch.device, resumed_from: Path | None, world: World
) -> Choice:
    """The cut that the settings ask for, or one that fits the card.

    A resumed run keeps what was chosen when it began: another cut would draw other dropout.
    """
    config = setup.config
    asked = config.max_tokens_per_micro_batch if config.packing else 1  # smaller than any example: each goes alone
    if not asked and resumed_from is not None and (before := checkpoint.asked_tokens(resumed_from)) > 1:
        asked = before if device.type == "cuda" else 0
    first_step = [train_set[i] for i in schedule.examples_of(0)]
    most = default_tokens(device.type, first_step, shares_prefix(config, device.type))
    if config.base_bits:
        note = f"what a base in {config.base_bits} bits takes is not predicted: a step that does not fit is cut smaller"
        return Choice(asked or most, bool(config.gradient_checkpointing), None, (note,))
    if device.type == "cuda":
        free = min(world.exchange(free_bytes(device)))  # what all of them choose must be the same
        return choose_cut(setup, train_set, schedule, asked, most, free)
    return choose_cut(setup, train_set, schedule, asked or most, most)


def _predicted_peak(choice: Choice, device: torch.device, before_loading: int) -> int | None:
    """Most that will be in use at once; loading the base may have taken more than its training will.

    On a CPU, weights read from a file in their own dtype are in memory only once they are used.
    """
    if choice.memory is None:
        return None
    return max(peak_memory_bytes(device), round(choice.memory.peak(device.type, before_loading)))


def _header(run: Run, reports: list[DataReport], notes: list[str]) -> None:
    config, schedule = run.config, run.schedule
    trained, total = parameter_counts(run.model)
    say("run", str(run.folder))
    for note in notes:
        say("", note)
    say("model", f"{config.model} ({run.model.config.model_type}, {total:,} parameters)")
    say("method", f"{config.method}: {in_words(config)}")
    if config.adapter:
        say("", f"going on from {config.adapter}")
    say("trainable", f"params: {trained} || all params: {total} || trainable%: {100 * trained / total:.2f}")
    for report in reports:
        for line in runlog.describe_data(report):
            say("data", line)
    cut = (
        f"in micro-batches of up to {run.state.max_tokens:,} tokens" if config.packing else "one example a micro-batch"
    )
    product, _ = checkpoint.per_step(dataclasses.asdict(config), run.world.size)
    again = ", activations computed again in the backward pass" * run.checkpointing
    say("batch", f"{product} examples a step, {cut}{again}")
    if run.world.size > 1:
        base = " and a part of every layer of the base" * run.world.lockstep
        say("processes", f"{run.world.size}, each takes its share of a step's tokens{base}")
    say("steps", f"{schedule.num_steps:,} ({schedule.steps_per_epoch:,} an epoch), from step {run.state.step:,}")
    say("device", f"{runlog.device_name(run.device)}, matrix products in {str(run.dtype).removeprefix('torch.')}")
    peak = f", {gib(run.predicted_peak_bytes)} predicted at the peak" if run.predicted_peak_bytes else ""
    say("memory", f"{gib(memory_bytes(run.device))} in use before training{peak}")
    say("example", runlog.marked_example(run.train_set[0], run.tokenizer))


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    params = list(model.parameters())
    return sum(p.numel() for p in params if p.requires_grad), sum(num_elements(p) for p in params)
