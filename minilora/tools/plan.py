"""`minilora plan`: what a run will need of memory, by part and for other settings, and what fits; nothing is loaded."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from minilora.adapters.format import find_base
from minilora.batching import collate, default_tokens, shares_prefix
from minilora.config import TrainConfig, nearest, with_method
from minilora.data.build import Sets, make_sets, read_sources
from minilora.data.dataset import Dataset, Example, make_columns, of_file
from minilora.data.markup import ChatMarkup
from minilora.data.sampler import Schedule
from minilora.errors import ConfigError
from minilora.models.load import load_tokenizer, num_layers
from minilora.training.memory_estimate import USABLE, Memory, Setup, along, fitting_cut, largest_batch, predict
from minilora.training.setup import longest_allowed, schedule_of
from minilora.utils.device import device_name, free_bytes, gib, memory_bytes, pick_device, pick_dtype
from minilora.utils.terminal import say

CARDS_GIB = {"RTX 3060": 12, "RTX 4080": 16, "RTX 4090": 24, "RTX 5090": 32, "A100": 80, "H100": 80, "H200": 141}
BUDGETS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
COUNTED_TOKENS = {"cpu": (768, 1536), "cuda": (2048, 4096)}  # chunks of logits are full there; on a CPU more takes long
COUNTED_LENGTH = 256  # of a row; shorter ones take the same memory, and on a CPU longer to count
Variant = tuple[Literal["lora", "full"], bool]  # method, checkpointing
VARIANTS: tuple[Variant, ...] = (("lora", False), ("lora", True), ("full", False), ("full", True))


@dataclass(frozen=True)
class Place:
    """Where a run is to go; bytes of its memory that are in use now, and that may be at the peak."""

    name: str
    device_type: str  # cpu | cuda
    dtype: torch.dtype
    in_use: float
    usable: float

    def peak(self, memory: Memory) -> float:
        """The most that will be in use there."""
        return memory.peak(self.device_type, self.in_use)

    def fits(self, memory: Memory) -> bool:
        """Whether that is usable."""
        return self.peak(memory) <= self.usable


def plan(config: TrainConfig, card: str | None) -> None:
    """Print what a run of these settings needs. Raises ConfigError, DataError or ModelError for what it cannot read."""
    if config.base_bits:
        raise ConfigError(
            f"plan cannot predict a base in {config.base_bits} bits: --load_in_{config.base_bits}bit false."
        )
    if config.fsdp:
        raise ConfigError("plan predicts one device, and fsdp has several: leave that key out; see docs/scaling.md.")
    place = on_card(config, card) if card else here(config)
    base_folder = find_base(config.model, config.adapter)
    sets, about_rows = rows_of(config)
    dataset, schedule = sets.train, schedule_of(config, sets)
    setup = Setup(config, base_folder, place.dtype, place.device_type, bool(config.gradient_checkpointing))
    first_step = [dataset[i] for i in schedule.examples_of(0)]
    most = default_tokens(place.device_type, first_step, shares_prefix(config, place.device_type))
    asked = config.max_tokens_per_micro_batch if config.packing else 1
    asked = asked or (most if place.device_type == "cpu" else 0)
    choice = fitting_cut(setup, dataset, schedule, asked, most, place.usable - place.in_use)
    assert choice.memory is not None, "a prediction that fails is an error here"
    setup = dataclasses.replace(setup, checkpointing=choice.checkpointing)
    if place.device_type == "cpu":  # what reading and counting have brought into memory, a run brings too
        place = dataclasses.replace(place, in_use=memory_bytes(torch.device("cpu")))

    batch = largest_batch(setup, dataset, schedule, choice.max_tokens)
    dtype = str(place.dtype).removeprefix("torch.")
    say("model", f"{config.model}: {num_layers(base_folder)} layers, matrix products in {dtype}")
    say("rows", about_rows)
    cut = f"micro-batches of up to {choice.max_tokens:,} tokens" if config.packing else "one example a micro-batch"
    say("setting", f"method {config.method}, {cut}")
    count, num_tokens = len(batch.layout.lengths), batch.input_ids.numel() - batch.layout.padding
    say("", f"the largest has {num_tokens:,} tokens of {count:,} example{'s' * (count != 1)}")
    if choice.checkpointing:
        say("", "activations are computed again in the backward pass")
    say("place", f"{place.name}, {gib(place.usable)} usable")
    print(f"\n{parts_table(choice.memory, config.method, place)}\n", flush=True)
    cells = grid(setup, dataset, schedule)
    print(f"{settings_table(cells, place)}\n")
    say("verdict", verdict(choice.memory, (config.method, choice.checkpointing), choice.max_tokens, cells, place))


def here(config: TrainConfig) -> Place:
    """The device of the settings, as it is now."""
    device = pick_device(config.device)
    in_use = memory_bytes(device)
    name = device_name(device) + (": predicted as for any card, not measured" if device.type == "cuda" else "")
    usable = in_use + free_bytes(device) * USABLE
    return Place(name, device.type, pick_dtype(config.dtype, device), in_use, usable)


def on_card(config: TrainConfig, card: str) -> Place:
    """A card by its name or its GiB. Raises ConfigError."""
    sizes = {name.lower(): size for name, size in CARDS_GIB.items()}
    digits = card.lower().strip().removesuffix("gib").removesuffix("gb").strip()
    size = sizes.get(card.lower().strip()) or (int(digits) if digits.isdecimal() and len(digits) < 5 else 0)
    if not size:
        known = ", ".join(CARDS_GIB)
        raise ConfigError(f"--card {card!r} is none of {known}, and no number of GiB.{nearest(card, CARDS_GIB)}")
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    name = f"a card of {size} GiB" if digits.isdecimal() else f"{card} ({size} GiB)"
    return Place(f"{name}: not measured", "cuda", dtype, 0.0, size * 2**30 * USABLE)


def rows_of(config: TrainConfig) -> tuple[Sets, str]:
    """(the rows that would be trained on, a description); where there is no train_file, as long as they may be."""
    base_folder = find_base(config.model, config.adapter)
    longest = longest_allowed(config, base_folder, [])
    if missing := [path for path in config.train_files if not os.path.lexists(os.path.expanduser(path))]:
        count = config.examples_per_step
        supervised = np.tile(np.arange(longest) >= longest // 2, count)
        ids, lengths = np.zeros(count * longest, np.int32), np.full(count, longest)
        dataset = of_file(missing[0], make_columns(ids, supervised, lengths, np.arange(count)))
        said = f"there is no {missing[0]}: all are taken to have {longest:,} tokens, half supervised"
        return Sets(dataset, None, (), []), said
    read = read_sources(dataclasses.replace(config, eval_file=None, eval_samples=0))
    sets = make_sets(config, read, ChatMarkup(load_tokenizer(base_folder)), longest)
    lengths = sets.train.lengths
    return sets, (
        f"{', '.join(config.train_files)}: {len(sets.train):,}, of "
        f"{int(np.percentile(lengths, 50, method='higher')):,} tokens in the middle and {int(lengths.max()):,} at most"
    )


@dataclass(frozen=True)
class Grid:
    """Memory over token budgets, for each variant."""

    tokens: tuple[int, ...]  # of the largest micro-batch, in the order of BUDGETS; as many as a step has
    memories: dict[Variant, tuple[Memory, ...]]

    def cells(self, variant: Variant) -> Iterator[tuple[int, Memory]]:
        """(budget, memory) of a variant, the smallest budget first."""
        return zip(BUDGETS, self.memories[variant], strict=False)


def grid(setup: Setup, dataset: Dataset, schedule: Schedule) -> Grid:
    """Counted at two sizes and drawn out along the line through both; rows of COUNTED_LENGTH, all supervised."""
    lengths = dataset.lengths
    longest = int(lengths.max()) - 1
    steps = range(min(schedule.num_steps, schedule.steps_per_epoch))
    in_a_step = max(int(lengths[schedule.examples_of(step)].sum()) for step in steps)
    tokens = [min(max(budget, longest), in_a_step) for budget in BUDGETS]
    tokens = tokens[: tokens.index(in_a_step) + 1] if in_a_step in tokens else tokens

    at = COUNTED_TOKENS[setup.device_type]
    ids = np.zeros(COUNTED_LENGTH + 1, np.int32)
    batches = [collate([Example(ids, ids)] * (size // COUNTED_LENGTH)) for size in at]
    memories = {}
    for method, checkpointing in VARIANTS:
        config = with_method(setup.config, method)
        variant = dataclasses.replace(setup, config=config, checkpointing=checkpointing)
        points = (predict(variant, batches[0]), predict(variant, batches[1]))
        memories[method, checkpointing] = tuple(along(points, at, number) for number in tokens)
    return Grid(tuple(tokens), memories)


def parts_table(memory: Memory, method: str, place: Place) -> str:
    """Markdown: each part of the memory of a run."""
    lora = method == "lora"
    parts = {
        "interpreter, libraries, rows (in use now)": place.in_use,
        "base weights" if lora else "weights (fp32 masters)": memory.weights,
        "adapter": memory.adapter,
        "gradients": memory.gradients,
        "AdamW's moments": memory.optimizer,
        "activations kept for the backward pass": memory.saved,
        "peak of a micro-batch beyond them (logits, what is computed on)": memory.beyond,
    }
    parts["kernels' code and the heap's holes (measured share)"] = place.peak(memory) - sum(parts.values())
    rows = [(name, gib(size)) for name, size in parts.items() if size >= 1]
    return markdown([("part", "memory"), *rows, ("**peak**", f"**{gib(place.peak(memory))}**")])


def settings_table(cells: Grid, place: Place) -> str:
    """Markdown: the peak over budgets and variants; what does not fit is in brackets."""
    names = [method + ", checkpointing" * again for method, again in VARIANTS]
    rows = [("micro-batch of up to", *names)]
    for number, tokens in enumerate(cells.tokens):
        peaks = [cells.memories[variant][number] for variant in VARIANTS]
        shown = [gib(place.peak(memory)) if place.fits(memory) else f"({gib(place.peak(memory))})" for memory in peaks]
        more = f" ({tokens:,} are a whole step)" if tokens < BUDGETS[number] else ""
        rows.append((f"{BUDGETS[number]:,} tokens{more}", *shown))
    return f"{markdown(rows)}\n\nIn brackets: does not fit."


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns stand below each other in a terminal, too: text at the left, the numbers at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    padded = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in (rows[0], rule, *rows[1:])
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def verdict(memory: Memory, variant: Variant, max_tokens: int, cells: Grid, place: Place) -> str:
    """Whether the setting fits, and if not, the cheapest change that does."""
    need = f"{gib(place.peak(memory))} of {gib(place.usable)}"
    if place.fits(memory):
        return f"it fits: {need}"
    method, again = variant
    ways = [variant, (method, True), ("lora", False), ("lora", True)]  # in order of cost
    for way in dict.fromkeys(ways):
        fitting = [budget for budget, found in cells.cells(way) if place.fits(found)]
        fitting = [budget for budget in fitting if budget < max_tokens] if way == variant else fitting
        if fitting:
            flags = f"--max_tokens_per_micro_batch {max(fitting)}"
            flags += " --gradient_checkpointing" * (way[1] and not again) + " --method lora" * (way[0] != method)
            return f"it does not fit: {need}. The cheapest change that does: {flags}"
    return f"it does not fit: {need}. Nothing in the table does: a shorter --max_length, or a smaller --model"
