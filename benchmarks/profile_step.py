"""Measures where the time of a training step goes, and the rate of its matrix products beside the same products alone.

    python -m benchmarks.profile_step --model FOLDER --train_file rows.jsonl --rows 32 --dtype auto --steps 2

A step trains on the first --rows rows, all steps on the same ones. After a step of warm-up, --steps steps run without
the profiler and --steps steps with torch.profiler. The difference of the two times is what the profiler costs. Every
moment of the profiled steps belongs to one part of the table: an operation, and the Python code around it, belongs to
the function of minilora that it runs in. Products are recognised by the shapes of their operands. So the seconds add
up to the time of the step.

Then the products with frozen weights run alone: the same operations with the same shapes in the same order, on the
model's own weights, once as warm-up and once timed. The script writes all figures to --out. It measures a CPU and
method lora. Exit code 2: bad arguments.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.common import Result, parser_of, refuse, row
from benchmarks.contenders import first_rows
from minilora import loop, lora
from minilora.config import resolve
from minilora.lora import lora_layers
from minilora.training.run import Run
from minilora.training.setup import prepare
from minilora.training.signals import StopRequest
from minilora.utils.process import settings_of_a_run

STEP, DROPOUT, OPTIMIZER = "minilora.step", "minilora.dropout", "Optimizer.step"  # names of events
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::bmm": 0, "aten::baddbmm": 1}  # first factor
COPIES = ("aten::_to_copy", "aten::copy_")
LINEAR = ("_LoRALinears", "_FrozenLinears")

LAYERS, HEAD, LORA = "products with frozen weights, layers", "products of the head", "products of LoRA"
ATTENTION, OTHER_PRODUCTS = "products of attention", "other products"
CONVERSION, REST, PYTHON = "conversions of frozen weights", "other operations", "Python and autograd between operations"
FUNCTIONS = {  # the part to which an autograd function's own time belongs, forward and backward
    "_LoRALinears": "linear layers without their products",
    "_FrozenLinears": "linear layers without their products",
    "_PackedAttention": "attention without its products",
    "_RMSNorm": "norms",
    "_SwiGLU": "SwiGLU",
    "_Rotary": "rotary embedding",
    "_ChunkedCrossEntropy": "loss without its products",
    DROPOUT: "dropout",
    OPTIMIZER: "optimizer",
}
PARTS = (LAYERS, HEAD, LORA, ATTENTION, OTHER_PRODUCTS, CONVERSION, *dict.fromkeys(FUNCTIONS.values()), REST, PYTHON)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """A matrix product that the profiler saw: (m, k) times (k, n), or a batch of these."""

    name: str  # of the operation
    left: Shape
    right: Shape
    backward: bool  # in the backward pass of an autograd function

    @property
    def flops(self) -> int:
        """One multiplication and one addition count as two."""
        *batch, m, k = self.left
        count = 2 * m * k * self.right[-1]
        for size in batch:
            count *= size
        return count


@dataclass(frozen=True)
class Profile:
    """The parts of some profiled steps. seconds and products: by part; total_s: the time of the steps."""

    total_s: float
    seconds: dict[str, float]
    products: dict[str, list[Product]]

    def flops(self, part: str) -> int:
        """The FLOPs of a part's products."""
        return sum(product.flops for product in self.products.get(part, []))


@dataclass(frozen=True)
class Shapes:
    """What products are recognised by: the shapes (out, in) of frozen weights, and LoRA's ranks, alone or together."""

    head: Shape
    layers: frozenset[Shape]
    ranks: frozenset[int]

    @classmethod
    def of(cls, model: Any) -> "Shapes":
        """Those of a model."""
        head, ranks = model.get_output_embeddings().weight, {len(layer.lora_A) for layer in lora_layers(model).values()}
        layers = frozenset(tuple(weight.shape) for weight in frozen_weights(model) if weight is not head)
        return cls(tuple(head.shape), layers, frozenset(rank * count for rank in ranks for count in (1, 2, 3)))

    def part_of(self, product: Product, function: str | None) -> str:
        """The part of a product. The right factor has a frozen weight's shape, in the forward pass (in, out)."""
        factors = {product.right, product.right[::-1]}
        if function == "_PackedAttention":
            return ATTENTION
        # with as many tokens as a weight has outputs or inputs, the right factor of dz^T x has the weight's shape; so a
        # product of as few rows as a rank has counts as LoRA's
        if function == "_LoRALinears" and product.backward and product.left[0] in self.ranks:
            return LORA
        if self.head in factors:
            return HEAD
        if factors & self.layers:
            return LAYERS
        return LORA if function == "_LoRALinears" else OTHER_PRODUCTS


def profiled(run: Run, steps: int) -> Profile:
    """Run some steps under the profiler, and divide their time into the parts."""
    with named_dropout(run), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                one_step(run)
    return divide(profiler.events(), run.model)


def divide(events: Sequence[Any], model: Any) -> Profile:
    """Give each event's own time (without its children) to the part of the nearest event around it that has one."""
    shapes = Shapes.of(model)
    seconds, products, total_s = dict.fromkeys(PARTS, 0.0), defaultdict(list), 0.0
    parts: dict[int, str | None] = {}

    def part_of(event: Any) -> str | None:
        if event is None:
            return None  # outside the steps
        if event.id not in parts:
            around = part_of(event.cpu_parent)
            parts[event.id] = PYTHON if event.name == STEP else around and (own_part(event, shapes) or around)
        return parts[event.id]

    for event in sorted(events, key=lambda event: event.time_range.start):
        if part := part_of(event):
            seconds[part] += event.self_cpu_time_total / 1e6
            total_s += event.cpu_time_total / 1e6 * (event.name == STEP)
            if product := product_of(event):
                products[part].append(product)
    return Profile(total_s, seconds, dict(products))


def own_part(event: Any, shapes: Shapes) -> str | None:
    """The part that an event begins; None: it belongs to the part of the event around it."""
    if function := function_named(event.name):
        return FUNCTIONS[function]
    function = function_named(around_function(event))
    if product := product_of(event):
        return shapes.part_of(product, function)
    if function in LINEAR and event.name in COPIES and tuple(event.input_shapes[0]) in shapes.layers:
        return CONVERSION
    return REST if function is None and event.name.startswith("aten::") else None


def product_of(event: Any) -> Product | None:
    """The product that an event is, if it is one."""
    first = PRODUCTS.get(event.name)
    if first is None or (event.cpu_parent is not None and event.cpu_parent.name in PRODUCTS):
        return None
    left, right = event.input_shapes[first : first + 2]
    return Product(event.name, tuple(left), tuple(right), around_function(event).endswith("Backward"))


def around_function(event: Any) -> str:
    """The name of the nearest event, from this one outwards, that `function_named` knows; "" if there is none."""
    while event is not None and not function_named(event.name):
        event = event.cpu_parent
    return event.name if event is not None else ""


def function_named(name: str) -> str | None:
    """The key in FUNCTIONS that the name of an event means: of a function, of its backward pass, of the optimizer."""
    if name.startswith(OPTIMIZER):
        return OPTIMIZER
    name = name.removeprefix("autograd::engine::evaluate_function: ").removesuffix("Backward")
    return name if name in FUNCTIONS else None


def frozen_weights(model: Any) -> list[Tensor]:
    """The weights of the frozen linear layers, in the model's order, and the head's."""
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return [layer.weight for layer in linears if not layer.weight.requires_grad]


@contextmanager
def named_dropout(run: Run) -> Iterator[None]:
    """Inside, the profiler sees dropout by its name, as it sees autograd functions. The numbers are the same."""

    def named(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any) -> Any:
            with record_function(DROPOUT):
                return function(*args)

        return call

    policy = run.decoder.policy
    before = {name: getattr(lora, name) for name in ("zeroed", "zero_")}
    try:
        for name, function in before.items():
            setattr(lora, name, named(function))
        run.decoder.policy = dataclasses.replace(policy, draw=named(policy.draw))
        yield
    finally:
        for name, function in before.items():
            setattr(lora, name, function)
        run.decoder.policy = policy


def one_step(run: Run) -> float:
    """Train the run's first step (again), and return its seconds."""
    run.state.step = 0  # the same rows, dropout and rate in every step
    started = time.perf_counter()
    loop.train_step(run)
    return time.perf_counter() - started


def alone(run: Run, products: Sequence[Product], buffered: bool) -> float:
    """The seconds of products with frozen weights, in their order, on the model's weights, with nothing between them.

    buffered: the results are written into a buffer, as those of the head are
    """
    weights: dict[Shape, list[Tensor]] = defaultdict(list)
    for weight in frozen_weights(run.model):
        weights[tuple(weight.shape)].append(weight.detach().to(run.dtype))
    turns = {shape: itertools.cycle(same) for shape, same in weights.items()}  # so few are in the cache, as in a step

    @cache
    def tensor(use: str, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=run.dtype)

    calls: list[Callable[[], Any]] = []
    for product in products:
        forward = product.right not in turns or (product.right[::-1] in turns and not product.backward)
        weight = next(turns[product.right[::-1]]).T if forward else next(turns[product.right])
        x, shape = tensor("x", *product.left), (product.left[0], product.right[1])
        if product.name == "aten::addmm":
            calls.append(partial(torch.addmm, tensor("bias", shape[1]), x, weight))
        elif product.name == "aten::addmm_":
            calls.append(partial(tensor("sum", *shape).addmm_, x, weight))
        else:
            calls.append(partial(torch.mm, x, weight, **({"out": tensor("out", *shape)} if buffered else {})))
    for _ in range(2):  # the first time is the warm-up
        started = time.perf_counter()
        for call in calls:
            call()
        seconds = time.perf_counter() - started
    return seconds


def parts_table(found: Profile, steps: int) -> str:
    """Where the time of a step goes, as Markdown."""
    lines = [row(["part", "seconds a step", "share", "GFLOP a step", "GFLOP/s"]), row(["---"] * 5)]
    for part in PARTS:
        seconds, flops = found.seconds[part], found.flops(part)
        if not seconds:
            continue
        cells = [part, f"{seconds / steps:.3f}", f"{100 * seconds / found.total_s:.1f} %"]
        products = [f"{flops / steps / 1e9:,.1f}", f"{flops / seconds / 1e9:,.0f}"] if flops else ["", ""]
        lines.append(row(cells + products))
    total, flops = sum(found.seconds.values()), sum(map(found.flops, PARTS))
    cells = ["all", f"{total / steps:.3f}", f"{100 * total / found.total_s:.1f} %"]
    lines.append(row([*cells, f"{flops / steps / 1e9:,.1f}", f"{flops / total / 1e9:,.0f}"]))
    return "\n".join(lines)


def rates_table(found: Profile, alone_s: dict[str, float]) -> str:
    """The rates of the products with frozen weights in the step and alone, as Markdown."""
    lines = [row(["products", "in the step, GFLOP/s", "alone, GFLOP/s", "in the step / alone"]), row(["---"] * 4)]
    for part, seconds in alone_s.items():
        rates = [found.flops(part) / taken / 1e9 for taken in (found.seconds[part], seconds)]
        lines.append(row([part, *(f"{rate:,.0f}" for rate in rates), f"{rates[0] / rates[1]:.2f}"]))
    return "\n".join(lines)


@contextmanager
def prepared(keys: Result, rows: int) -> Iterator[Run]:
    """A run over the first rows of a file, prepared as train prepares it. One step takes all rows."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        rows_file = Path(folder) / "rows.jsonl"
        rows_file.write_bytes(first_rows(keys["train_file"], rows))
        own: Result = {"train_file": str(rows_file), "output_dir": str(Path(folder) / "run"), "eval_file": None}
        own |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1}
        held.enter_context(settings_of_a_run())
        stop = held.enter_context(StopRequest())
        yield prepare(resolve("lora", keys | own), stop, held, header=False)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = parser_of("profile_step", __doc__)
    parser.add_argument("--rows", type=int, default=32, help="of a step")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--steps", type=int, default=2, help="steps without the profiler, and as many with it")
    args = parser.parse_args(argv)
    refusals = {
        "--rows must be at least 1": args.rows < 1,
        "--steps must be at least 1": args.steps < 1,
        f"--device {args.device}: only a CPU is measured": args.device not in ("auto", "cpu"),
    }
    refuse(parser, args, refusals)
    return args


def main(argv: list[str]) -> int:
    """Measure, print the tables, write the figures."""
    args, load = parse(argv), os.getloadavg()[0]
    keys = {"model": args.model, "train_file": args.train_file, "device": "cpu", "dtype": args.dtype}
    with prepared(keys | json.loads(args.flags), args.rows) as run:
        first_s = one_step(run)
        plain = [one_step(run) for _ in range(args.steps)]
        found = profiled(run, args.steps)
        alone_s = {part: alone(run, found.products[part], part == HEAD) for part in (LAYERS, HEAD)}
        tokens = int(run.data.train.lengths.sum())
        arithmetic, limit, versions = run.arithmetic.in_words, run.state.max_tokens, f"torch {torch.__version__}"
    step_s, profiled_s = statistics.median(plain), found.total_s / args.steps
    print(f"{args.rows} rows, {tokens:,} tokens, micro-batches of up to {limit:,} tokens; {arithmetic}; {versions}; ")
    print(f"{os.cpu_count()} cores, load average {load:.1f} before and {os.getloadavg()[0]:.1f} after\n")
    print(
        f"A step: {step_s:.2f} s ({', '.join(f'{each:.2f}' for each in plain)}), {tokens / step_s:.1f} tokens/s. ",
        end="",
    )
    print(f"The first one: {first_s:.2f} s. ", end="")
    print(f"Under the profiler: {profiled_s:.2f} s ({profiled_s / step_s:.2f} x).\n")
    print(f"{parts_table(found, args.steps)}\n\n{rates_table(found, alone_s)}")
    figures = {"rows": args.rows, "tokens": tokens, "arithmetic": arithmetic, "first_step_s": first_s, "steps_s": plain}
    figures |= {"profiled_step_s": profiled_s, "alone_s": {part: taken / args.steps for part, taken in alone_s.items()}}
    figures["parts"] = {
        part: {"seconds": found.seconds[part] / args.steps, "flops": found.flops(part) / args.steps} for part in PARTS
    }
    args.out.write_text(json.dumps(figures, indent=2), "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
