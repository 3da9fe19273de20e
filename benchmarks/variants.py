"""Every variant of training side by side: the same steps on the same rows, each in a process of its own.

    python -m benchmarks.variants --model FOLDER --train_file rows.jsonl --steps 20

lora, rslora, dora, lora+ (ratio 16), pissa, qlora (4 bit; where bitsandbytes is installed) and full (every weight, at a
tenth of the rate), r 8, alpha 32, dropout 0.05 on q/k/v/o. The first rows are trained on, the --held_out rows after
them are what "held-out" is computed on, before and after. Then, in another process, the adapter is loaded on the base
in fp32 by peft and by minilora, and their logits on a held-out row are compared. Peak memory is that of training: on a
CPU the process's resident memory, the interpreter's included. Prints one table and writes all figures to --out. Exit
code 1: a variant failed, or peft computes other logits; 2: bad arguments.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Result, parser_of, refuse, row

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora+": {"loraplus_lr_ratio": 16.0},
    "pissa": {"init_lora_weights": "pissa"},
    "qlora": {"load_in_4bit": True},
    "full": {"method": "full"},
}
FULL_RATE = 0.1  # of the others' learning rate
MAX_DIFFERENCE = 1e-4  # of logits in fp32, between peft and minilora
COMPARED_TOKENS = 128
HEAD = (
    *("variant", "loss, first step", "loss, last step", "held-out before", "held-out after", "peak memory GiB"),
    *("tokens/s", "trained parameters", "result MB", "largest logit difference in peft"),
)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; what cannot be obeyed is refused here."""
    parser = parser_of("variants", __doc__)
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--examples", type=int, default=8, help="of an optimizer step")
    parser.add_argument("--held_out", type=int, default=32, help="rows after those that are trained on")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--job", help=argparse.SUPPRESS)  # the process that trains or compares one variant
    args = parser.parse_args(argv)
    args.variants = list(dict.fromkeys(args.variants.split(",")))
    unknown = [name for name in args.variants if name not in VARIANTS]
    refusals = {
        f"--variants: {', '.join(unknown)}: there are {', '.join(VARIANTS)}": bool(unknown),
        "--steps, --examples and --held_out must be at least 1": min(args.steps, args.examples, args.held_out) < 1,
    }
    refuse(parser, args, refusals)
    return args


def split_rows(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """(the rows that are trained on, those held out), files in `folder`."""
    lines = [line for line in Path(args.train_file).read_bytes().split(b"\n") if line.strip()]
    wanted = args.steps * args.examples
    if len(lines) <= args.held_out:
        print(f"variants: --train_file has {len(lines)} rows, --held_out takes {args.held_out}", file=sys.stderr)
        raise SystemExit(2)
    wanted = min(wanted, len(lines) - args.held_out)  # fewer: several passes over them
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    train.write_bytes(b"\n".join(lines[:wanted]) + b"\n")
    held_out.write_bytes(b"\n".join(lines[wanted : wanted + args.held_out]) + b"\n")
    return train, held_out


def keys_of(variant: str, args: argparse.Namespace, rows: tuple[Path, Path], folder: Path) -> Result:
    """The keys of a variant's run."""
    rate = args.learning_rate * (FULL_RATE if variant == "full" else 1)
    keys = {"model": args.model, "device": args.device, "max_steps": args.steps, "eval_steps": args.steps}
    keys |= {"train_file": str(rows[0]), "eval_file": str(rows[1]), "output_dir": str(folder / variant)}
    keys |= {"per_device_train_batch_size": args.examples, "gradient_accumulation_steps": 1, "learning_rate": rate}
    return keys | VARIANTS[variant] | json.loads(args.flags)


def train_one(keys: Result) -> Result:
    """Train one variant in this process, and say how it went."""
    from minilora import loop
    from minilora.config import resolve
    from minilora.inference import generate
    from minilora.models import probe

    generate.sample_answers = lambda _: [""] * len(probe.SAMPLE_PROMPTS)  # answers are not measured here
    summary = loop.train(resolve("lora", keys))
    result = Path(keys["output_dir"]) / summary.result
    names = ("first_loss", "last_loss", "first_eval_loss", "last_eval_loss", "peak_memory_bytes", "tokens_per_second")
    names += ("trainable_parameters", "seconds", "steps", "tokens")
    found = {name: getattr(summary, name) for name in names}
    found["result_bytes"] = sum(path.stat().st_size for path in result.glob("*.safetensors"))
    return found | ({"adapter": str(result)} if summary.result == "adapter" else {})


def compare_one(keys: Result) -> Result:
    """The largest difference of logits between peft and minilora, each with the adapter on the base in fp32."""
    import gc

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from minilora.data.rows import read_rows
    from minilora.inference.generate import load_chat_model
    from minilora.models.probe import probe_logits

    chat_model = load_chat_model(keys["model"], keys["adapter"], "float32", "cpu")
    turns = read_rows(keys["eval_file"])[0][0].turns
    ids = chat_model.markup.prompt_ids(turns, chat_model.system_prompt)[:COMPARED_TOKENS]
    ours = probe_logits(chat_model.model, ids)
    del chat_model
    gc.collect()
    base = AutoModelForCausalLM.from_pretrained(
        keys["model"], dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    theirs = probe_logits(PeftModel.from_pretrained(base, keys["adapter"]), ids)
    return {"max_logit_difference": float((theirs - ours).abs().max()), "compared_tokens": len(ids)}


JOBS = {"train": train_one, "compare": compare_one}


def in_a_process(job: str, keys: Result) -> Result:
    """A job in a process of its own."""
    return common.in_a_process("variants", "--job", [job, keys])


def measure(keys: Result) -> Result:
    """Train a variant; where an adapter comes out, see what peft makes of it."""
    found = in_a_process("train", keys)
    if "adapter" not in found:
        return found
    checked = in_a_process("compare", keys | {"adapter": found["adapter"]})
    return found | ({"failed_in_peft": checked["failed"]} if "failed" in checked else checked)


def difference_of(result: Result) -> str:
    """The last cell of a row."""
    if "failed_in_peft" in result:
        return f"failed: {result['failed_in_peft']}"
    return f"{result['max_logit_difference']:.1e}" if "max_logit_difference" in result else "no adapter"


def table(found: dict[str, Result]) -> str:
    """All variants as Markdown."""
    lines = [row(HEAD), row(("---",) * len(HEAD))]
    for variant, result in found.items():
        if "failed" in result:
            lines.append(row((variant, f"failed: {result['failed']}", *("",) * (len(HEAD) - 2))))
            continue
        losses = (result[key] for key in ("first_loss", "last_loss", "first_eval_loss", "last_eval_loss"))
        cells = [variant, *(f"{loss:.4f}" for loss in losses), f"{result['peak_memory_bytes'] / 2**30:.2f}"]
        cells += [f"{result['tokens_per_second']:,.1f}", f"{result['trainable_parameters']:,}"]
        lines.append(row((*cells, f"{result['result_bytes'] / 1e6:,.1f}", difference_of(result))))
    return "\n".join(lines)


def is_good(result: Result) -> bool:
    """Whether a variant was trained and peft computes the same."""
    return not {"failed", "failed_in_peft"} & set(result) and result.get("max_logit_difference", 0) <= MAX_DIFFERENCE


def main(argv: list[str]) -> int:
    """Measure every variant in turn; or, for --job, do this one."""
    args = parse(argv)
    if args.job:
        job, keys = json.loads(args.job)
        args.out.write_text(json.dumps(JOBS[job](keys)), "utf-8")
        return 0
    if "qlora" in args.variants and importlib.util.find_spec("bitsandbytes") is None:
        args.variants.remove("qlora")
        print("qlora: left out, bitsandbytes is not installed", flush=True)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        rows = split_rows(args, Path(name))
        for variant in args.variants:
            found[variant] = measure(keys_of(variant, args, rows, Path(name)))
            print(f"{variant}: {found[variant].get('failed', 'done')}", flush=True)
    about = {name: metadata.version(name) for name in ("torch", "transformers", "peft")} | {"cores": os.cpu_count()}
    about |= {"date": datetime.now(UTC).isoformat(timespec="minutes"), "arguments": argv}
    results = {"about": about, "results": found}
    args.out.write_text(json.dumps(results, indent=2, ensure_ascii=False), "utf-8")
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"\n{table(found)}")
    return int(not all(map(is_good, found.values())))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
