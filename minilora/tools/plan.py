"""`minilora plan` predicts the memory that a run needs: by part, and for other settings. It loads no weights."""

import dataclasses
import os
import re
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
from minilora.models.load import ffn_width, load_tokenizer, num_layers
from minilora.training.arithmetic import Arithmetic, choose
from minilora.training.memory_estimate import USABLE, Choice, Memory, Setup, along, fitting_cut, largest_batch, predict
from minilora.training.setup import longest_allowed, schedule_of
from minilora.utils.device import device_name, free_bytes, gib, memory_bytes, pick_device, pick_dtype
from minilora.utils.terminal import say

CARDS_WITHOUT_BF16 = {  # NVIDIA cards before Ampere; sizes in GiB, the most common one first
    "GTX {}": "1050 Ti 4, 1060 6/3, 1070 8, 1070 Ti 8, 1080 8, 1080 Ti 11, 1650 4, 1650 Super 4, 1660 6, 1660 Super 6, "
    "1660 Ti 6",
    "GTX {} Laptop": "1650 4, 1660 Ti 6",
    "RTX {}": "2060 6/12, 2060 Super 8, 2070 8, 2070 Super 8, 2080 8, 2080 Super 8, 2080 Ti 11",
    "RTX {} Laptop": "2060 6, 2070 8, 2070 Super 8, 2080 8, 2080 Super 8",
    "Quadro RTX {}": "4000 8, 5000 16, 6000 24, 8000 48",
    "{}": "Titan V 12, Titan RTX 24, P4 8, P40 24, P100 16/12, T4 16, V100 16/32",
}
CARDS_WITH_BF16 = {
    "RTX {}": "3050 8/6, 3060 12/8, 3060 Ti 8, 3070 8, 3070 Ti 8, 3080 10/12, 3080 Ti 12, 3090 24, 3090 Ti 24, 4060 8, "
    "4060 Ti 8/16, 4070 12, 4070 Super 12, 4070 Ti 12, 4070 Ti Super 16, 4080 16, 4080 Super 16, 4090 24, "
    "4090 D 24, 5050 8, 5060 8, 5060 Ti 8/16, 5070 12, 5070 Ti 16, 5080 16, 5090 32, 5090 D 32",
    "RTX {} Laptop": "3050 4/6, 3050 Ti 4, 3060 6, 3070 8, 3070 Ti 8, 3080 8/16, 3080 Ti 16, 4050 6, 4060 8, 4070 8, "
    "4080 12, 4090 16, 5050 8, 5060 8, 5070 8, 5070 Ti 12, 5080 16, 5090 24",
    "RTX A{}": "2000 6/12, 4000 16, 4500 20, 5000 24, 5500 24, 6000 48",
    "RTX {} Ada": "2000 16, 4000 20, 4500 24, 5000 32, 6000 48",
    "RTX PRO {}": "2000 16, 4000 24, 4500 32, 5000 48/72, 6000 96",
    "{}": "A2 16, A10 24, A10G 24, A16 16, A30 24, A40 48, A100 80/40, A800 80/40, L4 24, L20 48, L40 48, L40S 48, "
    "H20 96/141, H100 80/94, H800 80, H200 141, B200 180",
}


def _sizes(table: dict[str, str]) -> dict[str, tuple[int, ...]]:
    """The sizes in GiB of each card, by its full name."""
    entries = [(form, *part.rpartition(" ")) for form, text in table.items() for part in text.split(", ")]
    return {form.format(name): tuple(map(int, sizes.split("/"))) for form, name, _, sizes in entries}


WITHOUT_BF16 = _sizes(CARDS_WITHOUT_BF16)
CARDS_GIB = WITHOUT_BF16 | _sizes(CARDS_WITH_BF16)
GIB_RANGE = (1, 300)
WORDS_AROUND_THE_NAME = (  # words that a driver adds to the name of a card
    r"nvidia|geforce|tesla|graphics|card|gpu|generation|edition|workstation|server|with|design|blackwell( max-q)?|pcie"
    r"|nvl|sxm\d?|hbm\d?e?"
)
BUDGETS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
COUNTED_TOKENS = {"cpu": (768, 1536), "cuda": (2048, 4096)}  # enough to fill a chunk of logits
COUNTED_LENGTH = 256  # of a row; shorter rows need the same memory and take longer to count on a CPU
Variant = tuple[Literal["lora", "full"], bool]  # method, checkpointing
VARIANTS: tuple[Variant, ...] = (("lora", False), ("lora", True), ("full", False), ("full", True))


@dataclass(frozen=True)
class Place:
    """The device of a run; the bytes of its memory that are in use now, and that may be in use at the peak."""

    name: str
    device_type: str  # cpu | cuda
    dtype: torch.dtype  # of the products, unless they are measured
    in_use: float
    usable: float

    def peak(self, memory: Memory) -> float:
        """The most bytes that will be in use on this device."""
        return memory.peak(self.device_type, self.in_use)

    def fits(self, memory: Memory) -> bool:
        """Whether the peak is within the usable bytes."""
        return self.peak(memory) <= self.usable


def plan(config: TrainConfig, card: str | None) -> None:
    """Print the memory that a run with these settings needs. Raises ConfigError, DataError or ModelError."""
    if config.base_bits:
        raise ConfigError(
            f"plan cannot predict a base in {config.base_bits} bits; give --load_in_{config.base_bits}bit false."
        )
    if config.fsdp:
        raise ConfigError("plan predicts one device, and --fsdp uses several; leave out --fsdp, see docs/scaling.md.")
    place = here(config) if card is None else on_card(config, card)
    base_folder = find_base(config.model, config.adapter)
    sets, about_rows = rows_of(config)
    dataset, schedule = sets.train, schedule_of(config, sets)
    first_step = [dataset[i] for i in schedule.examples_of(0)]
    share, ffn = shares_prefix(config, place.device_type), ffn_width(base_folder)

    def setup_in(arithmetic: Arithmetic) -> Setup:
        base_dtype = None if config.method == "full" else arithmetic.base_dtype  # the table has LoRA, too
        checkpointing = bool(config.gradient_checkpointing)
        return Setup(config, base_folder, arithmetic.dtype, place.device_type, checkpointing, base_dtype=base_dtype)

    def cut_for(setup: Setup) -> Choice:
        most = default_tokens(place.device_type, first_step, share, ffn, setup.dtype)
        asked = config.max_tokens_per_micro_batch if config.packing else 1
        asked = asked or (most if place.device_type == "cpu" else 0)
        return fitting_cut(setup, dataset, schedule, asked, most, place.usable - place.in_use)

    def float32_fits() -> bool:
        memory = cut_for(setup_in(Arithmetic(torch.float32, torch.float32))).memory
        return memory is not None and memory.total <= place.usable - place.in_use

    arithmetic = Arithmetic(place.dtype, place.dtype)
    if card is None:
        arithmetic = choose(config, base_folder, pick_device(config.device), float32_fits)
    setup = setup_in(arithmetic)
    choice = cut_for(setup)
    assert choice.memory is not None, "a prediction that fails is an error here"
    setup = dataclasses.replace(setup, checkpointing=choice.checkpointing)
    if place.device_type == "cpu":  # a run loads the same as reading and counting
        place = dataclasses.replace(place, in_use=memory_bytes(torch.device("cpu")))

    batch = largest_batch(setup, dataset, schedule, choice.max_tokens)
    say("model", f"{config.model}: {num_layers(base_folder)} layers, {arithmetic.in_words}")
    say("rows", about_rows)
    size = f"micro-batches of up to {choice.max_tokens:,} tokens" if config.packing else "one example a micro-batch"
    say("setting", f"method {config.method}, {size}")
    count, num_tokens = len(batch.layout.lengths), batch.input_ids.numel() - batch.layout.padding
    say("", f"the largest has {num_tokens:,} tokens of {count:,} example{'s' * (count != 1)}")
    if choice.checkpointing:
        say("", "activations are computed again in the backward pass")
    if config.torch_compile:
        say("", "torch_compile is not counted: the figures are those of a run without it")
    say("place", f"{place.name}, {gib(place.usable)} usable")
    print(f"\n{parts_table(choice.memory, config.method, place)}\n", flush=True)
    cells = grid(setup, dataset, schedule)
    print(f"{settings_table(cells, place)}\n")
    say("verdict", verdict(choice.memory, (config.method, choice.checkpointing), choice.max_tokens, cells, place))


def here(config: TrainConfig) -> Place:
    """The device that the settings choose, with its memory use now."""
    device = pick_device(config.device)
    in_use = memory_bytes(device)
    name = device_name(device) + (": a prediction, not a measurement" if device.type == "cuda" else "")
    usable = in_use + free_bytes(device) * USABLE
    return Place(name, device.type, pick_dtype(config.dtype, device), in_use, usable)


def on_card(config: TrainConfig, card: str) -> Place:
    """The card with this name or this memory in GiB. Raises ConfigError."""
    name, size = find_card(card)
    sizes = CARDS_GIB.get(name, ())
    others = "".join(f"; with {other}: --card '{name} {other}GB'" for other in sizes if size == sizes[0] != other)
    title = f"{name} ({size:g} GiB{others})" if name else f"a card of {size:g} GiB"
    without_bf16 = config.dtype == "auto" and name in WITHOUT_BF16
    dtype = torch.float32 if without_bf16 or config.dtype == "float32" else torch.bfloat16
    return Place(f"{title}: not measured", "cuda", dtype, 0.0, size * 2**30 * USABLE)


def find_card(card: str) -> tuple[str, float]:
    """(name in CARDS_GIB or "", GiB) of a card, by the name that a user or a driver gives it. Raises ConfigError."""
    names = {card_key(name): name for name in CARDS_GIB}
    names |= {re.sub("^[gr]tx", "", key): name for key, name in names.items()}
    if name := names.get(card_key(card)):
        return name, CARDS_GIB[name][0]
    unknown, text = f"--card {card!r} is not known.", card.lower().strip()
    size = re.search(r"(?:^|[\s-])(\d+(?:\.\d+)?)\s*(?:g|gb|gib)\b|(?:^|\s)(\d+(?:\.\d+)?)$", text)
    if size:
        number, rest = float(size[1] or size[2]), f"{text[: size.start()]} {text[size.end() :]}"
        name = names.get(card_key(rest))
        if name and number in CARDS_GIB[name]:
            return name, number
        if name:
            possible = " or ".join(map(str, CARDS_GIB[name]))
            advice = f"For another size, give only the number of GiB: --card {number:g}."
            raise ConfigError(f"{unknown} {name} has {possible} GiB. {advice}")
        if not rest.strip() and GIB_RANGE[0] <= number <= GIB_RANGE[1]:
            return "", number
    raise ConfigError(
        f"{unknown} Give the memory of the card in GiB, {GIB_RANGE[0]} to {GIB_RANGE[1]} (--card 24), or a name such "
        f"as RTX 4060 or A100 40GB.{nearest(card, CARDS_GIB)}"
    )


def card_key(name: str) -> str:
    """The letters and digits that distinguish a card from the others."""
    name = re.sub(rf"\b({WORDS_AROUND_THE_NAME})\b", " ", name.lower())
    name = re.sub(r"mobile|notebook|max-q", "laptop", name)
    return "".join(filter(str.isalnum, name))


def rows_of(config: TrainConfig) -> tuple[Sets, str]:
    """(training rows, their description). If a train_file is missing, all rows have the maximum length."""
    base_folder = find_base(config.model, config.adapter)
    longest = longest_allowed(config, base_folder, [])
    if missing := [path for path in config.train_files if not os.path.lexists(os.path.expanduser(path))]:
        count = config.examples_per_step
        supervised = np.tile(np.arange(longest) >= longest // 2, count)
        ids, lengths = np.zeros(count * longest, np.int32), np.full(count, longest)
        dataset = of_file(missing[0], make_columns(ids, supervised, lengths, np.arange(count)))
        text = f"there is no {missing[0]}: every row is assumed to have {longest:,} tokens, half of them supervised"
        return Sets(dataset, None, (), []), text
    read = read_sources(dataclasses.replace(config, eval_file=None, eval_samples=0, early_stopping_patience=0))
    sets = make_sets(config, read, ChatMarkup(load_tokenizer(base_folder)), longest)
    lengths = sets.train.lengths
    return sets, (
        f"{', '.join(config.train_files)}: {len(sets.train):,}; tokens per row: median "
        f"{int(np.percentile(lengths, 50, method='higher')):,}, maximum {int(lengths.max()):,}"
    )


@dataclass(frozen=True)
class Grid:
    """The predicted memory for each token budget and variant."""

    tokens: tuple[int, ...]  # of the largest micro-batch at each of BUDGETS; ends at a whole step
    memories: dict[Variant, tuple[Memory, ...]]

    def cells(self, variant: Variant) -> Iterator[tuple[int, Memory]]:
        """(budget, memory) of a variant, in increasing order of budgets."""
        return zip(BUDGETS, self.memories[variant], strict=False)


def grid(setup: Setup, dataset: Dataset, schedule: Schedule) -> Grid:
    """Predict the grid: count two sizes with supervised rows of COUNTED_LENGTH, then extrapolate linearly."""
    lengths = dataset.lengths
    longest = int(lengths.max()) - 1
    steps = range(min(schedule.num_steps, schedule.steps_per_epoch))
    step_tokens = max(int(lengths[schedule.examples_of(step)].sum()) for step in steps)
    tokens = [min(max(budget, longest), step_tokens) for budget in BUDGETS]
    tokens = tokens[: tokens.index(step_tokens) + 1] if step_tokens in tokens else tokens

    sizes = COUNTED_TOKENS[setup.device_type]
    ids = np.zeros(COUNTED_LENGTH + 1, np.int32)
    batches = [collate([Example(ids, ids)] * (size // COUNTED_LENGTH)) for size in sizes]
    memories = {}
    for method, checkpointing in VARIANTS:
        config = with_method(setup.config, method)
        variant = dataclasses.replace(setup, config=config, checkpointing=checkpointing)
        points = (predict(variant, batches[0]), predict(variant, batches[1]))
        memories[method, checkpointing] = tuple(along(points, sizes, number) for number in tokens)
    return Grid(tuple(tokens), memories)


def parts_table(memory: Memory, method: str, place: Place) -> str:
    """A Markdown table of each part of the memory of a run."""
    lora = method == "lora"
    parts = {
        "interpreter, libraries, rows (in use now)": place.in_use,
        "base weights" if lora else "weights (fp32 masters)": memory.weights,
        "adapter": memory.adapter,
        "gradients": memory.gradients,
        "AdamW's moments": memory.optimizer,
        "activations kept for the backward pass": memory.saved,
        "further memory at the peak of a micro-batch (logits, intermediate tensors)": memory.beyond,
    }
    parts["code of the kernels and heap fragmentation (measured share)"] = place.peak(memory) - sum(parts.values())
    rows = [(name, gib(size)) for name, size in parts.items() if size >= 1]
    return markdown([("part", "memory"), *rows, ("**peak**", f"**{gib(place.peak(memory))}**")])


def settings_table(cells: Grid, place: Place) -> str:
    """A Markdown table of the peak for each budget and variant; a peak that does not fit is in brackets."""
    names = [method + ", checkpointing" * checkpointing for method, checkpointing in VARIANTS]
    rows = [("micro-batch of up to", *names)]
    for number, tokens in enumerate(cells.tokens):
        peaks = [cells.memories[variant][number] for variant in VARIANTS]
        shown = [gib(place.peak(memory)) if place.fits(memory) else f"({gib(place.peak(memory))})" for memory in peaks]
        more = f" ({tokens:,} make a whole step)" if tokens < BUDGETS[number] else ""
        rows.append((f"{BUDGETS[number]:,} tokens{more}", *shown))
    return f"{markdown(rows)}\n\nA value in brackets does not fit."


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with padded cells, so that it is also aligned in a terminal: text left, numbers right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    padded = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in (rows[0], rule, *rows[1:])
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def verdict(memory: Memory, variant: Variant, max_tokens: int, cells: Grid, place: Place) -> str:
    """Say whether the setting fits, and if not, which is the cheapest change that makes it fit."""
    need = f"{gib(place.peak(memory))} of {gib(place.usable)}"
    if place.fits(memory):
        return f"it fits: {need}"
    method, checkpointing = variant
    by_cost = [variant, (method, True), ("lora", False), ("lora", True)]
    for other in dict.fromkeys(by_cost):
        fitting = [budget for budget, found in cells.cells(other) if place.fits(found)]
        fitting = [budget for budget in fitting if budget < max_tokens] if other == variant else fitting
        if fitting:
            flags = f"--max_tokens_per_micro_batch {max(fitting)}"
            flags += " --gradient_checkpointing" * (other[1] and not checkpointing) + " --method lora" * (
                other[0] != method
            )
            return f"it does not fit: {need}. The cheapest change that fits: {flags}"
    return f"it does not fit: {need}. No setting in the table fits: give a shorter --max_length or a smaller --model"
