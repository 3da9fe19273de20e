"""Measures peak memory and speed by micro-batch tokens, checkpointing and method, and compares them with predictions.

    python -m benchmarks.vram --model FOLDER --train_file rows.jsonl --tokens 512,2048 --steps 3

Each setting trains --steps optimizer steps in a separate process. The speed is the median of the steps after the first.
"the largest" is the largest micro-batch of the run: a step of few rows cannot reach a large token limit. On a CPU the
peak is the resident memory of the process, with the interpreter. On CUDA it is the allocated memory. The script prints
two tables, one of all settings and one of full training against LoRA. It writes all figures to --out. Exit code 1: a
setting failed; 2: bad arguments.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.common import Result, in_a_process, parser_of, refuse, row

METHODS = ("lora", "full")
SWITCHES = {"off": False, "on": True}


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = parser_of("vram", __doc__)
    parser.add_argument("--tokens", default="512,2048,8192", help="token limits of a micro-batch")
    parser.add_argument("--checkpointing", default="off,on")
    parser.add_argument("--methods", default="lora,full")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="of the products")
    parser.add_argument("--examples", type=int, default=32, help="of an optimizer step")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps, the first of them not timed")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the keys of one setting: the process that measures it
    args = parser.parse_args(argv)
    args.tokens = [int(text) if text.isdecimal() else 0 for text in args.tokens.split(",")]
    args.checkpointing, args.methods = args.checkpointing.split(","), args.methods.split(",")
    refusals = {
        "--tokens: whole numbers of at least 1, separated by commas": min(args.tokens) < 1,
        "--checkpointing: off, on or off,on": not set(args.checkpointing) <= set(SWITCHES),
        "--methods: lora, full or lora,full": not set(args.methods) <= set(METHODS),
        "--examples must be at least 1": args.examples < 1,
        "--steps must be at least 2: the first is not timed": args.steps < 2,
    }
    refuse(parser, args, refusals)
    return args


def settings(args: argparse.Namespace) -> list[Result]:
    """The keys of every setting."""
    common = {"model": args.model, "train_file": args.train_file, "device": args.device, "max_steps": args.steps}
    common |= {"per_device_train_batch_size": args.examples, "gradient_accumulation_steps": 1, "eval_file": None}
    common |= {"dtype": args.dtype}
    return [
        common
        | {"method": method, "gradient_checkpointing": SWITCHES[switch], "max_tokens_per_micro_batch": tokens}
        | json.loads(args.flags)
        for method in args.methods
        for switch in args.checkpointing
        for tokens in args.tokens
    ]


def train_one(keys: Result) -> Result:
    """Train one setting in this process, and return its figures."""
    from minilora import loop
    from minilora.config import resolve
    from minilora.inference import generate
    from minilora.models import probe
    from minilora.training import memory_estimate

    largest = []

    def remembered(*args: Any) -> Any:
        largest.append(batch := original(*args))
        return batch

    original, memory_estimate.largest_batch = memory_estimate.largest_batch, remembered
    generate.sample_answers = lambda _: [""] * len(probe.SAMPLE_PROMPTS)  # sample answers are not measured here
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        summary = loop.train(resolve("lora", keys | {"output_dir": str(run)}))
        about = json.loads((run / "config.json").read_text("utf-8"))
        lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
        speeds = [record["tokens_per_second"] for record in map(json.loads, lines) if "tokens_per_second" in record]
        result_bytes = sum(path.stat().st_size for path in (run / summary.result).glob("*.safetensors"))
    return {
        "largest_tokens": largest[-1].input_ids.numel() if largest else None,
        "dtype": about["dtype"].removeprefix("torch."),
        "base_dtype": about["base_dtype"].removeprefix("torch."),
        "predicted_peak_bytes": summary.predicted_peak_memory_bytes,
        "peak_bytes": summary.peak_memory_bytes,
        "tokens_per_second": statistics.median(speeds[1:]),
        "trainable_parameters": summary.trainable_parameters,
        "parameters": summary.parameters,
        "result_bytes": result_bytes,
    } | reserved()


def reserved() -> Result:
    """The peak of the memory that the CUDA allocator reserved."""
    import torch

    return {"reserved_bytes": torch.cuda.max_memory_reserved()} if torch.cuda.is_initialized() else {}


def measure(keys: Result) -> Result:
    """Run `train_one` in a separate process."""
    return in_a_process("vram", "--one", keys)


def table(found: list[tuple[Result, Result]]) -> str:
    """The figures of all settings as a Markdown table."""
    head = [
        "method",
        "dtype (base)",
        "checkpointing",
        "micro-batch of up to",
        "the largest",
        "predicted GiB",
        "measured GiB",
    ]
    head += ["measured / predicted", "tokens/s"]
    lines = [row(head), row(["---"] * len(head))]
    for keys, result in found:
        dtypes = f"{result['dtype']} ({result['base_dtype']})" if "dtype" in result else keys["dtype"]
        cells = [keys["method"], dtypes, "on" if keys["gradient_checkpointing"] else "off"]
        cells += [f"{keys['max_tokens_per_micro_batch']:,}"]
        if "failed" in result:
            lines.append(row([*cells, f"failed: {result['failed']}", "", "", "", ""]))
            continue
        predicted, peak = result["predicted_peak_bytes"], result["peak_bytes"]
        cells += [f"{result['largest_tokens']:,}" if result["largest_tokens"] else "not known"]
        cells += [f"{predicted / 2**30:.2f}" if predicted else "not predicted", f"{peak / 2**30:.2f}"]
        cells += [f"{peak / predicted:.2f}" if predicted else "", f"{result['tokens_per_second']:,.0f}"]
        lines.append(row(cells))
    return "\n".join(lines)


def methods_table(found: list[tuple[Result, Result]]) -> str:
    """Full training against LoRA, each at its first setting that did not fail."""
    good = [(keys, result) for keys, result in found if "failed" not in result]
    firsts = {keys["method"]: (keys, result) for keys, result in reversed(good)}
    head = ["method", "trainable parameters", "share", "peak memory GiB", "tokens/s", "size of the result MB"]
    lines = [row(head), row(["---"] * len(head))]
    for method, (_, result) in sorted(firsts.items(), key=lambda item: METHODS.index(item[0])):
        trained, total = result["trainable_parameters"], result["parameters"]
        cells = [method, f"{trained:,}", f"{100 * trained / total:.2f} %", f"{result['peak_bytes'] / 2**30:.2f}"]
        lines.append(row([*cells, f"{result['tokens_per_second']:,.0f}", f"{result['result_bytes'] / 1e6:,.1f}"]))
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measure every setting in turn. With --one, measure only this setting."""
    args = parse(argv)
    if args.one:
        args.out.write_text(json.dumps(train_one(json.loads(args.one))), "utf-8")
        return 0
    found = []
    for keys in settings(args):
        found.append((keys, result := measure(keys)))
        suffix = ", checkpointing" * keys["gradient_checkpointing"]
        outcome = f"failed: {result['failed']}" if "failed" in result else f"{result['peak_bytes'] / 2**30:.2f} GiB"
        print(f"{keys['method']}{suffix}, {keys['max_tokens_per_micro_batch']:,} tokens: {outcome}", flush=True)
    about = {name: metadata.version(name) for name in ("torch", "transformers")} | {"cores": os.cpu_count()}
    about |= {"date": datetime.now(UTC).isoformat(timespec="minutes"), "arguments": argv}
    results = [{"keys": keys, "result": result} for keys, result in found]
    args.out.write_text(json.dumps({"about": about, "results": results}, indent=2, ensure_ascii=False), "utf-8")
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"\n{table(found)}\n\nFull against LoRA, at the first setting of each:\n\n{methods_table(found)}")
    return int(any("failed" in result for _, result in found))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
