"""Sets a run up: data, model, optimizer, checkpoint, log; prints the header."""

import dataclasses
import reprlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from minilora.adapters import format as adapter_format
from minilora.adapters.format import find_base
from minilora.batching import collate, default_tokens, shares_prefix
from minilora.config import TrainConfig
from minilora.data.build import Sets, make_sets, read_sources
from minilora.data.dataset import Dataset
from minilora.data.markup import ChatMarkup
from minilora.data.report import data_record, describe_data
from minilora.data.sampler import Schedule, make_schedule
from minilora.decoder import Decoder
from minilora.distributed.fsdp import shard
from minilora.distributed.world import World, join
from minilora.errors import ConfigError, OutOfMemoryError, first_line
from minilora.models.families import decoder_of
from minilora.models.fingerprint import fingerprint
from minilora.models.load import ffn_width, load_model, load_tokenizer
from minilora.models.quantize import num_elements
from minilora.models.trainable import in_words, make_trainable
from minilora.objectives import Objective
from minilora.objectives.sft import SFT
from minilora.optim import make_optimizer
from minilora.training import arithmetic as arithmetics
from minilora.training import checkpoint
from minilora.training.arithmetic import Arithmetic
from minilora.training.checkpoint import Identity, TrainState
from minilora.training.log import RunLog, check_board, marked_example, versions
from minilora.training.memory_estimate import USABLE, Choice, Setup, choose_cut
from minilora.training.run import Run
from minilora.training.rundir import CONFIG, lasting_settings, lock_run_dir, resolve_run_dir
from minilora.training.signals import StopRequest
from minilora.utils import files
from minilora.utils.device import (
    autocast,
    device_name,
    free_bytes,
    gib,
    is_out_of_memory,
    memory_bytes,
    peak_memory_bytes,
    pick_device,
    why_cpu,
)
from minilora.utils.terminal import say


def prepare(config: TrainConfig, stop: StopRequest, held: ExitStack, header: bool = True) -> Run:
    """Prepare the data, the model, the optimizer and the state of a run, new or resumed; print the header.

    Mistakes in the files are found before the model is loaded, mistakes in the settings before the first step.
    `held` releases the folder's lock and closes the log at the end of the run. A signal stops the preparation at once.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"the settings are a {type(config).__name__}: train takes a TrainConfig, TrainConfig(**keys)")
    with stop.interruptible():  # nothing can be lost yet
        world = join(held)
    with world.raise_on_all_ranks(), stop.interruptible():
        return _prepare(config, world, stop, held, header)


def _prepare(config: TrainConfig, world: World, stop: StopRequest, held: ExitStack, header: bool) -> Run:
    _check_before_reading(config, world)
    sources = read_sources(config)
    device = world.connect(pick_device(world.device_name(config.device)))
    base_folder = find_base(config.model, config.adapter)
    folder, resumed_from, notes = _claim(config, world, held)
    first_adapter = None if resumed_from else adapter_to_go_on(config)
    tokenizer = load_tokenizer(base_folder)
    markup = ChatMarkup(tokenizer)
    sets = make_sets(config, sources, markup, longest_allowed(config, base_folder, notes))
    schedule = schedule_of(config, sets, world.size)

    shards = world.size if config.fsdp else 1
    cut = (sets.train, schedule, device, resumed_from, world)

    def setup_in(arithmetic: Arithmetic) -> Setup:
        checkpointing, dtypes = bool(config.gradient_checkpointing), (arithmetic.dtype, arithmetic.base_dtype)
        return Setup(config, base_folder, dtypes[0], device.type, checkpointing, shards, dtypes[1])

    def float32_fits() -> bool:
        memory = _choose_cut(setup_in(Arithmetic(torch.float32, torch.float32)), *cut).memory
        return memory is not None and memory.total * world.size <= free_bytes(device) * USABLE

    run_before = folder if resumed_from else None
    arithmetic = arithmetics.from_json(
        world.run_on_main(
            lambda: arithmetics.as_json(arithmetics.choose(config, base_folder, device, float32_fits, run_before))
        )
    )
    setup = setup_in(arithmetic)
    choice = _choose_cut(setup, *cut)
    before_loading = memory_bytes(device)
    model, base_fingerprint = _trainable_model(setup, first_adapter, device, world)
    decoder, objective = decoder_of(model, arithmetic.dtype, device.type, config, choice.checkpointing), SFT()
    optimizer = make_optimizer(model, config.weight_decay, config.loraplus_lr_ratio)
    if config.torch_compile:
        _compile_kernels(decoder, objective, sets.train, device, stop, header and world.main)

    identity = Identity(lasting_settings(config), base_fingerprint, sources.sha256, versions(), world.size)
    agree(world, identity, arithmetic, device)
    state = TrainState() if resumed_from is None else checkpoint.load(resumed_from, model, optimizer, identity)
    if state.asked_tokens != choice.max_tokens:  # changed settings go before the saved ones
        state.asked_tokens = state.max_tokens = choice.max_tokens
    world.broadcast_from_main([*checkpoint.trainable(model).values(), *checkpoint.starts(model).values()])
    run = Run(
        config=config,
        folder=folder,
        base_folder=base_folder,
        device=device,
        arithmetic=arithmetic,
        tokenizer=tokenizer,
        markup=markup,
        model=model,
        decoder=decoder,
        objective=objective,
        optimizer=optimizer,
        data=sets,
        schedule=schedule,
        state=state,
        identity=identity,
        stop=stop,
        world=world,
        checkpointing=choice.checkpointing,
        predicted_peak_bytes=_predicted_peak(choice, device, before_loading),
        saved_step=state.step if resumed_from else -1,
    )
    if world.main:
        run.log = _open_log(run, held)
    world.resume_hint = f" Go on with: {run.resume_command}"
    if header and world.main:
        _header(run, [*notes, *choice.notes])
    return run


def _check_before_reading(config: TrainConfig, world: World) -> None:
    """Raise ConfigError for what cannot work, whatever the files hold."""
    if config.fsdp and world.size == 1:
        raise ConfigError("fsdp = True shares the base out over processes: torchrun --nproc-per-node N train.py ...")
    world.run_on_main(lambda: str(resolve_run_dir(config)))
    if config.report_to == "tensorboard":
        check_board()


def _open_log(run: Run, held: ExitStack) -> RunLog:
    """Write config.json and open the log of the process that writes."""
    description = dataclasses.asdict(run.identity) | {"device": device_name(run.device)}
    description |= {"dtype": str(run.dtype), "base_dtype": str(run.arithmetic.base_dtype)}
    description["data"] = [data_record(report) for report in run.data.reports]
    files.replace_file(run.folder / CONFIG, files.json_chunks(description))
    steps = (run.state.step, run.saved_step, run.schedule.num_steps)
    log = RunLog(run.folder, *steps, run.config.logging_steps, run.config.report_to == "tensorboard")
    held.callback(log.close)
    return log


def schedule_of(config: TrainConfig, sets: Sets, processes: int = 1) -> Schedule:
    """Which examples of the training set each step of a run takes."""
    length = (config.num_train_epochs, config.max_steps)
    per_step = config.examples_per_step * processes
    return make_schedule(len(sets.train), per_step, *length, config.seed, sets.parts)


def _claim(config: TrainConfig, world: World, held: ExitStack) -> tuple[Path, Path | None, list[str]]:
    """`lock_run_dir` by the process that writes."""

    def claimed() -> tuple[str, str | None, list[str]]:
        folder, found, notes = lock_run_dir(config, held)
        return str(folder), str(found) if found else None, notes

    folder, found, notes = world.run_on_main(claimed)
    return Path(folder), Path(found) if found else None, notes


def agree(world: World, identity: Identity, arithmetic: Arithmetic, device: torch.device) -> None:
    """Raise ConfigError when the processes of a run have different settings, or do not read the same files."""
    places = ("model", "train_file", "eval_file", "adapter", "output_dir", "resume")  # may differ between machines
    own = {key: value for key, value in identity.config.items() if key not in places}
    own |= {"the base model": identity.base_fingerprint, "the rows": identity.dataset_sha256}
    own |= {"the type of the matrix products": str(arithmetic.dtype), "the kind of device": device.type}
    everyone = world.exchange(own)
    for rank, theirs in enumerate(everyone):
        if odd := [key for key in own if theirs.get(key) != everyone[0].get(key)]:
            here, there = (reprlib.repr(each.get(odd[0])) for each in (everyone[0], theirs))
            raise ConfigError(f"process {rank} differs from process 0: {odd[0]} is {there} there and {here} here.")


def longest_allowed(config: TrainConfig, base_folder: Path, notes: list[str]) -> int:
    """max_length, or the base's number of positions where that is smaller; `notes` then gets a line about it."""
    try:
        positions = files.read_json(base_folder / "config.json").get("max_position_embeddings")
    except ValueError:
        positions = None  # loading the model says what is wrong with it
    if not isinstance(positions, int) or not 2 <= positions < config.max_length:
        return config.max_length
    notes.append(f"max_length {config.max_length:,}: this model has {positions:,} positions, so {positions:,} holds")
    return positions


def _trainable_model(setup: Setup, first_adapter: Path | None, device: torch.device, world: World) -> tuple[Any, str]:
    """(the base with what is trained in it, the base's fingerprint); method full trains fp32 masters.

    first_adapter: the run begins with the values of this adapter
    """
    config = setup.config
    place = torch.device("cpu") if config.fsdp else device  # it may be larger than one device
    model: Any = load_model(setup.base_folder, setup.base_dtype or setup.dtype, place, config.base_bits)
    base_fingerprint = fingerprint(model)
    if first_adapter is None:
        make_trainable(model, config)
    else:
        _, updates = adapter_format.read(model, first_adapter, base_fingerprint, allow_other_base=None)
        make_trainable(model, config)
        adapter_format.fill(model, updates)
    if config.fsdp:
        shard(model, world, device, setup.dtype)
    return model, base_fingerprint


def _compile_kernels(
    decoder: Decoder,
    objective: Objective,
    train_set: Dataset,
    device: torch.device,
    stop: StopRequest,
    announce: bool,
) -> None:
    """Have torch.compile make its kernels before the first step. Raises ConfigError where it cannot."""
    if announce:
        say("compiling", "norms, SwiGLU and rotary embedding; later runs find them ready")
    batch = collate([train_set[int(train_set.lengths.argmin())]]).to(device)
    try:
        decoder.model.train()
        with autocast(device, decoder.dtype):
            objective.loss(decoder, batch).backward()
    except Exception as error:  # no compiler, a broken one, a cache that cannot be written: each its own class
        stop.check()  # a signal meets the compiler, too
        if is_out_of_memory(error):
            longest = int(train_set.lengths.min())
            raise OutOfMemoryError(f"the first pass, over one example of {longest:,} tokens, does not fit") from error
        raise ConfigError(f"torch_compile: torch cannot compile here ({first_line(error)}). Leave it out.") from error
    decoder.model.zero_grad(set_to_none=True)


def _choose_cut(
    setup: Setup, train_set: Dataset, schedule: Schedule, device: torch.device, resumed_from: Path | None, world: World
) -> Choice:
    """The cut that the settings ask for, or one that fits the card.

    A resumed run keeps what was chosen when it began: another cut would draw other dropout.
    """
    config = setup.config
    asked = config.max_tokens_per_micro_batch if config.packing else 1  # smaller than any example: each goes alone
    if not asked and resumed_from is not None and (before := checkpoint.read_state(resumed_from).asked_tokens) > 1:
        asked = before
    first_step = [train_set[i] for i in schedule.examples_of(0)]
    share, ffn = shares_prefix(config, device.type), ffn_width(setup.base_folder)
    most = default_tokens(device.type, first_step, share, ffn, setup.dtype)
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


def _header(run: Run, notes: Sequence[str]) -> None:
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
    for report in run.data.reports:
        for line in describe_data(report):
            say("data", line)
    cut = (
        f"in micro-batches of up to {run.state.max_tokens:,} tokens" if config.packing else "one example a micro-batch"
    )
    product, _ = checkpoint.per_step(dataclasses.asdict(config), run.world.size)
    recomputed = ", activations are recomputed in the backward pass" * run.checkpointing
    say("batch", f"{product} examples a step, {cut}{recomputed}")
    if run.world.size > 1:
        base = " and a part of every layer of the base" * run.world.sharded
        say("processes", f"{run.world.size}, each takes its share of a step's tokens{base}")
    say("steps", f"{schedule.num_steps:,} ({schedule.steps_per_epoch:,} an epoch), from step {run.state.step:,}")
    if run.stop_reason == "completed":
        more = "a larger --max_steps or --num_train_epochs goes on"
        say("", f"all {schedule.num_steps:,} steps are done: nothing is left to train; {more}")
    elif run.stop_reason:
        say("", f"early stopping has ended this run at step {run.state.step:,}: nothing is left to train")
    say("device", f"{device_name(run.device)}, {run.arithmetic.in_words}")
    if config.device == "auto" and run.device.type == "cpu" and (why := why_cpu()):
        say("", why)
    peak = f", {gib(run.predicted_peak_bytes)} predicted at the peak" if run.predicted_peak_bytes else ""
    say("memory", f"{gib(memory_bytes(run.device))} in use before training{peak}")
    say("example", marked_example(run.data.train[0], run.tokenizer))


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    params = list(model.parameters())
    return sum(p.numel() for p in params if p.requires_grad), sum(num_elements(p) for p in params)


def adapter_to_go_on(config: TrainConfig) -> Path | None:
    """The folder of the adapter that a run begins with, if it does.

    Raises ConfigError when that is not of the shape and variant that the settings say, AdapterError when it is none.
    """
    if config.adapter is None:
        return None
    wrong, folder = [], Path(config.adapter)
    for key, theirs in adapter_format.shape_keys(adapter_format.read_config(folder)).items():
        ours = getattr(config, key)
        if ours != theirs and not (key == "target_modules" and set(ours) == set(theirs)):
            wrong.append(f"{key} is {_plain(theirs)} there and {_plain(ours)} here")
    if wrong:
        raise ConfigError(
            f"adapter {folder}: {'; '.join(wrong)}. An adapter keeps its shape: leave out what it decides."
        )
    return folder


def _plain(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
