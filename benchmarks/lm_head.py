"""Measures the output head and its loss, forward and backward: with all logits, supervised rows only, or in chunks.

    python -m benchmarks.lm_head --tokens 1024 --supervised 512 --threads 2

Hidden states and head are in bf16 and have the size of Qwen2-0.5B. The head is frozen, and the hidden states need a
gradient. Extra memory is the peak of a step minus the memory before it. On CUDA the allocator reports it. On a CPU it
is the kernel's high-water mark of resident memory. For this measurement, malloc first returns all free memory, and
maps every block of 64 KB or more separately. The times are measured before that, with malloc unchanged.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.data.dataset import IGNORE
from minilora.loss import token_nats

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
MMAP_BYTES = 65536
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (T, hidden), weight (vocabulary, hidden), labels (T,)


def full_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss as in Hugging Face: logits of all positions, in fp32 for the loss; IGNORE labels do not count."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=IGNORE, reduction="sum")


def supervised(loss: Loss) -> Loss:
    """The same loss on the supervised rows only."""

    def of_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        rows = (labels != IGNORE).nonzero()[:, 0]
        return loss(hidden.index_select(0, rows), weight, labels.index_select(0, rows))

    return of_rows


def chunked(rows: int) -> Loss:
    """minilora's loss, with `rows` rows at a time."""
    return lambda hidden, weight, labels: token_nats(hidden, weight, labels, chunk_rows=rows).sum()


def contenders(chunk_rows: list[int]) -> dict[str, Loss]:
    """Every method by name, with torch's own fused loss if this torch has it."""
    methods = {"all logits": full_logits, "logits of supervised rows": supervised(full_logits)}
    methods |= {f"minilora, chunks of {rows:,}": supervised(chunked(rows)) for rows in chunk_rows}
    if hasattr(F, "linear_cross_entropy"):
        methods["F.linear_cross_entropy"] = supervised(torchs_own(chunks=False))
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            methods["F.linear_cross_entropy, chunked"] = supervised(torchs_own(chunks=True))
    return methods


def torchs_own(chunks: bool) -> Loss:
    """torch.nn.functional.linear_cross_entropy, with its default options for chunks or without them."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        options = {"options": torch.nn.LinearCrossEntropyOptions()} if chunks else {}
        return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", **options)

    return loss


def step(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> float:
    """Forward and backward. Returns the nats, which show a wrong method."""
    hidden.grad = None
    nats = loss(hidden, weight, labels)
    (nats / len(labels)).backward()
    return nats.item()  # on CUDA this waits for the device


def milliseconds(repeat: int, *given: object) -> list[float]:
    """The times of `step`, without the first call."""
    times = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        step(*given)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return times[1:]


def extra_bytes(*given: object) -> int | None:
    """The peak memory during a `step` minus the memory before it. None if it cannot be measured."""
    hidden = given[1]
    assert isinstance(hidden, Tensor)
    hidden.grad = None
    if hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(*given)
        return torch.cuda.max_memory_allocated() - before
    give_back_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = resident("VmRSS")
        step(*given)
        return resident("VmHWM") - before
    except OSError:
        return None


def resident(key: str) -> int:
    """VmRSS (the present value) or VmHWM (the peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key))) * 1024


def give_back_free_memory() -> None:
    """Return free memory to the system (glibc only). Otherwise a step could use it, and no growth would be visible."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        libc.malloc_trim(0)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--supervised", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--chunks", default="64,128,256,512", help="rows of minilora's chunks")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    hidden = torch.randn(args.tokens, args.hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = 0.02 * torch.randn(args.vocabulary, args.hidden, device=device, dtype=torch.bfloat16)
    labels = torch.randint(args.vocabulary, (args.tokens,), device=device)
    labels[torch.randperm(args.tokens, device=device)[args.supervised :]] = IGNORE
    methods = contenders([int(rows) for rows in args.chunks.split(",")])
    times = {name: milliseconds(args.repeat, method, hidden, weight, labels) for name, method in methods.items()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.supervised:,} of {args.tokens:,} tokens supervised, {name}, torch {torch.__version__}\n")
    print("| method | ms, median (min - max) | extra memory, MB | nats a token |\n| --- | --- | --- | --- |")
    for method, loss in methods.items():
        nats = step(loss, hidden, weight, labels) / args.supervised  # also warms up caches
        extra = extra_bytes(loss, hidden, weight, labels)
        spread = f"{statistics.median(times[method]):.0f} ({min(times[method]):.0f} - {max(times[method]):.0f})"
        memory = "not measured" if extra is None else f"{extra / 1e6:.0f}"
        print(f"| {method} | {spread} | {memory} | {nats:.4f} |", flush=True)


if __name__ == "__main__":
    main()
