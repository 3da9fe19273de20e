"""The arithmetic of a run's matrix products: `dtype auto` measures on a CPU which one this machine is fastest in."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.config import TrainConfig
from minilora.errors import CheckpointError
from minilora.models.load import weight_shapes
from minilora.training import checkpoint
from minilora.training.rundir import CONFIG
from minilora.utils.device import keep_few_products, pick_dtype

Shape = tuple[int, int]  # (out, in) of a weight

ROWS = 512  # of a product: as in a micro-batch; more rows are no faster
SIDE = (128, 2048)  # of a weight: smaller ones measure the calls, the slices of larger ones are as fast within 10 %
REPEATS = 3  # of each product after its warm-up; the best one counts, because other programs only make it slower
BUDGET_S = 0.5  # for all repeats after the first ones
TOO_SLOW = 8  # times the fastest one: a candidate is not measured further (bf16 without hardware takes seconds)
CONVERSION_SHARE = 0.1  # of the product's time: a conversion that costs less is worth half of the base's memory
EXAMPLE_SHAPES = {(896, 896): 48, (128, 896): 48, (4864, 896): 48, (896, 4864): 24, (151936, 896): 1}  # a 0.5B Qwen


def float_products(rows: Tensor, weight: Tensor, backward: bool) -> Tensor:
    """The product of a layer, x W^T or dy W, in the dtype of the rows; a weight of another dtype is converted first.

    rows: (tokens, in), in the backward pass (tokens, out)
    weight: (out, in)
    """
    weight = weight.to(rows.dtype)
    return rows @ weight if backward else F.linear(rows, weight)


@dataclass(frozen=True)
class Candidate:
    """An arithmetic that can be measured. dtype: of the products; base_dtype: of the base's weights in memory."""

    dtype: torch.dtype
    base_dtype: torch.dtype
    product: Callable[[Tensor, Tensor, bool], Tensor] = float_products


CANDIDATES = {  # by the name of their rate; the first one is taken where rates are equal
    "bfloat16": Candidate(torch.bfloat16, torch.bfloat16),
    "float32": Candidate(torch.float32, torch.float32),
    "float32 from bfloat16": Candidate(torch.float32, torch.bfloat16),
}
DTYPES = {str(dtype): dtype for each in CANDIDATES.values() for dtype in (each.dtype, each.base_dtype)}


@dataclass(frozen=True)
class Arithmetic:
    """What the matrix products of a run are computed in.

    dtype: of the products
    base_dtype: of the base in memory; method full: of the masters
    rates: GFLOP/s of each measured candidate; empty if nothing was measured
    why: the reason in words; empty where the settings or the device decide
    """

    dtype: torch.dtype
    base_dtype: torch.dtype
    rates: dict[str, float] = field(default_factory=dict)
    why: str = ""

    @property
    def in_words(self) -> str:
        """The choice and its reason, for a line of the header."""
        narrow = self.base_dtype.itemsize < self.dtype.itemsize
        held = f", the base in {_name(self.base_dtype)}" if narrow else ""
        return f"matrix products in {_name(self.dtype)}{held}{self.why and f': {self.why}'}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def choose(
    config: TrainConfig,
    base_folder: Path,
    device: torch.device,
    float32_fits: Callable[[], bool],
    resumed_run: Path | None = None,
) -> Arithmetic:
    """The arithmetic of a run. Only `dtype auto` on a CPU is measured, and only when the run begins.

    float32_fits: whether a base in float32 is predicted to fit the free memory; called only if that decides
    resumed_run: the folder of a run that goes on; it keeps its arithmetic, so that it goes on bit for bit
    """
    full = config.method == "full"
    if not is_measured(config, device):
        dtype = pick_dtype(config.dtype, device)
        return Arithmetic(dtype, torch.float32 if full else dtype)
    if resumed_run is not None and (kept := _kept(resumed_run, full)):
        return kept
    candidates = {name: each for name, each in CANDIDATES.items() if not full or name != "float32 from bfloat16"}
    rates = measure(weight_shapes(base_folder), candidates)
    return chosen(rates, (lambda: True) if full else float32_fits, full)


def is_measured(config: TrainConfig, device: torch.device) -> bool:
    """Whether measurements choose the arithmetic. A quantised or sharded base has products of its own."""
    return config.dtype == "auto" and device.type == "cpu" and not config.base_bits and not config.fsdp


def chosen(rates: Mapping[str, float], float32_fits: Callable[[], bool], full: bool = False) -> Arithmetic:
    """The arithmetic that these rates decide for (see `decide`), with the reason in words."""
    name = decide(rates, float32_fits)
    taken = CANDIDATES[name]
    others = [f"{other} {rate:,.0f}" for other, rate in rates.items() if other != name]
    why = f"{rates[name]:,.0f} GFLOP/s measured{''.join(f', {other}' for other in others)}"
    return Arithmetic(taken.dtype, torch.float32 if full else taken.base_dtype, dict(rates), why)


def decide(rates: Mapping[str, float], float32_fits: Callable[[], bool]) -> str:
    """The candidate to take: the fastest one, with the smaller base where that costs little or memory is short."""
    fastest = max(rates, key=lambda name: rates[name])
    if CANDIDATES[fastest].base_dtype != torch.float32:
        return fastest
    narrow = [name for name in rates if CANDIDATES[name].base_dtype != torch.float32]
    for name in narrow:
        if CANDIDATES[name].dtype == torch.float32 and rates[fastest] < (1 + CONVERSION_SHARE) * rates[name]:
            return name
    return fastest if not narrow or float32_fits() else max(narrow, key=lambda name: rates[name])


def measure(shapes: Mapping[Shape, int], candidates: Mapping[str, Candidate] = CANDIDATES) -> dict[str, float]:
    """GFLOP/s of each candidate over the products of a model, forward and backward, in well under a second.

    shapes: how many weights of each shape (out, in) the model has
    """
    keep_few_products()  # this may be the first product of the process
    flops: Counter[Shape] = Counter()
    for (out, width), count in shapes.items():
        flops[_cut(out), _cut(width)] += 2 * ROWS * out * width * count
    products = [(shape, backward) for shape in sorted(flops, key=math.prod) for backward in (False, True)]
    work, seconds = dict.fromkeys(candidates, 0.0), dict.fromkeys(candidates, 0.0)
    running = dict(candidates)
    for shape, backward in products:
        best = _best_seconds(running, shape, backward, BUDGET_S / len(products))
        for name, taken in best.items():
            work[name] += flops[shape]
            seconds[name] += taken * flops[shape] / (2 * ROWS * math.prod(shape))
        running = {name: each for name, each in running.items() if best[name] < TOO_SLOW * min(best.values())}
    return {name: work[name] / seconds[name] / 1e9 for name in candidates}


def _cut(side: int) -> int:
    return min(max(side, SIDE[0]), SIDE[1])


def _best_seconds(
    candidates: Mapping[str, Candidate], shape: Shape, backward: bool, budget_s: float
) -> dict[str, float]:
    """The least seconds of one product in each candidate. They take turns, so that noise meets all of them."""
    sides = (ROWS, shape[0] if backward else shape[1])
    operands = {  # no random numbers are drawn, because a run draws its own
        name: (torch.full(sides, 0.01, dtype=each.dtype), torch.full(shape, 0.01, dtype=each.base_dtype))
        for name, each in candidates.items()
    }
    best = dict.fromkeys(candidates, math.inf)
    for name, each in candidates.items():
        each.product(*operands[name], backward)  # the first call of a shape also makes its kernel
    end = time.perf_counter() + budget_s
    for _ in range(REPEATS):
        for name, each in candidates.items():
            start = time.perf_counter()
            each.product(*operands[name], backward)
            best[name] = min(best[name], time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return best


def _kept(run: Path, full: bool) -> Arithmetic | None:
    """The arithmetic that config.json of a run says, or None. In 0.1 the base has the dtype of the products."""
    try:
        about = checkpoint.read_json(run / CONFIG)
    except CheckpointError:
        return None  # a run can be resumed from its checkpoints alone
    dtype = DTYPES.get(str(about.get("dtype")))
    base_dtype = DTYPES.get(str(about.get("base_dtype", about.get("dtype"))))
    if dtype is None or base_dtype is None:
        return None
    return Arithmetic(dtype, torch.float32 if full else base_dtype, why="as when the run began")


def as_json(arithmetic: Arithmetic) -> dict[str, Any]:
    """The JSON form, for the other processes of a run."""
    return vars(arithmetic) | {"dtype": str(arithmetic.dtype), "base_dtype": str(arithmetic.base_dtype)}


def from_json(value: Mapping[str, Any]) -> Arithmetic:
    """The inverse of `as_json`."""
    return Arithmetic(DTYPES[value["dtype"]], DTYPES[value["base_dtype"]], value["rates"], value["why"])
