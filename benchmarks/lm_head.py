"""The output head with its loss, forward and backward: all logits, the supervised rows' logits, chunks of them.

    python -m benchmarks.lm_head --tokens 1024 --supervised 512 --threads 2

Hidden states and head are bf16, Qwen2-0.5B's size; the head is frozen, the hidden states want a gradient. The extra
memory is the most that is in use at once beyond what there was before: on CUDA by its allocator; on the CPU by the
kernel's high-water mark of resident memory, for which malloc gives back all that is free before, and maps every block
of 64 KB or more by itself (the times are taken earlier, with malloc as it is).
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
from minilora.loss import token_loss

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
MMAP_BYTES = 65536
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (T, hidden), weight (vocabulary, hidden), labels (T,)


def full_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As Hugging Face does it: logits of all positions, in fp32 for the loss; labels that do not count are ignored."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=IGNORE, reduction="sum")


def supervised(loss: Loss) -> Loss:
    """The same loss over the supervised rows only."""

    def of_rows(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        rows = (labels != IGNORE).nonzero()[:, 0]
        return loss(hidden.index_select(0, rows), weight, labels.index_select(0, rows))

    return of_rows


def chunked(rows: int) -> Loss:
    """minilora's loss, so many rows at a time."""
    return lambda hidden, weight, labels: token_loss(hidden, weight, labels, rows)


def contenders(chunk_rows: list[int]) -> dict[str, Loss]:
    """Every method by name; torch's own fused one where this torch has it."""
    methods = {"all logits": full_logits, "logits of supervised rows": supervised(full_logits)}
    methods |= {f"minilora, chunks of {rows:,}": supervised(chunked(rows)) for rows in chunk_rows}
    if hasattr(F, "linear_cross_entropy"):
        methods["F.linear_cross_entropy"] = supervised(torchs_own(chunks=False))
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            methods["F.linear_cross_entropy, chunked"] = supervised(torchs_own(chunks=True))
    return methods


def torchs_own(chunks: bool) -> Loss:
    """torch.nn.functional.linear_cross_entropy, with its default options for chunks or without."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        options = {"options": torch.nn.LinearCrossEntropyOptions()} if chunks else {}
        return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", **options)

    return loss


def step(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> float:
    """Forward and backward; returns the nats, so that a wrong method is seen."""
    hidden.grad = None
    nats = loss(hidden, weight, labels)
    (nats / len(labels)).backward()
    return nats.item()  # on CUDA this waits


def milliseconds(repeat: int, *given: object) -> list[float]:
    """Times of `step`, after one that does not count."""
    times = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        step(*given)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return times[1:]


def extra_bytes(*given: object) -> int | None:
    """Most memory in use at once during a `step`, beyond that before it; None where it cannot be measured."""
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
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before = resident("VmRSS")
        step(*given)
        return resident("VmHWM") - before
    except OSError:
        return None


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key))) * 1024


def give_back_free_memory() -> None:
    """Make free memory count as free (glibc; elsewhere nothing happens): else a step could use it and not be seen."""
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
        nats = step(loss, hidden, weight, labels) / args.supervised  # and fills what is filled only once
        extra = extra_bytes(loss, hidden, weight, labels)
        spread = f"{statistics.median(times[method]):.0f} ({min(times[method]):.0f} - {max(times[method]):.0f})"
        memory = "not measured" if extra is None else f"{extra / 1e6:.0f}"
        print(f"| {method} | {spread} | {memory} | {nats:.4f} |", flush=True)


if __name__ == "__main__":
    main()
