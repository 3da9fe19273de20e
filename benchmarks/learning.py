"""Checks equal learning: minilora and TRL train on the same rows for the same steps, and held-out rows score both.

    python -m benchmarks.learning --model FOLDER --train_file rows.jsonl --rows 256 --held_out 64 --seeds 1,2

Each contender saves its adapter in PEFT's format. `minilora eval` scores both in nats per supervised token, with the
same rendering and mask. Exit code 1: minilora's loss is more than 0.5 % above the loss of its peer.
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.common import FailedError, parser_of, refuse, written_by
from benchmarks.contenders import EXAMPLES_PER_STEP, MAX_LENGTH, SYSTEM, first_rows

MAX_RATIO = 1.005


def train(name: str, seed: int, args: argparse.Namespace, folder: Path) -> Path:
    """Train a contender in a separate process. Returns the folder of its adapter."""
    adapter = folder / f"{name}-{seed}"
    words = ["--model", args.model, "--device", args.device, "--train_file", args.train_file, "--flags", args.flags]
    try:
        written_by("contenders", name, *words, "--rows", str(args.rows), "--seed", str(seed), "--save", str(adapter))
    except FailedError as error:
        raise SystemExit(f"{name} failed: {error}") from error
    return adapter


def held_out_loss(adapter: Path | None, rows: Path, args: argparse.Namespace) -> float:
    """Nats per supervised token of the base with this adapter, or of the base alone."""
    from minilora.inference.evaluate import Request, evaluate

    request = Request(
        eval_file=str(rows),
        model=args.model,
        adapter=str(adapter) if adapter else None,
        system_prompt=SYSTEM,
        max_length=MAX_LENGTH,
        device=args.device,
    )
    return evaluate(request).scores["adapter" if adapter else "base"].loss


def main() -> int:
    """Train and score, and print one row for each seed."""
    parser = parser_of("learning", __doc__)
    parser.add_argument("--rows", type=int, default=256, help=f"a multiple of {EXAMPLES_PER_STEP}")
    parser.add_argument("--held_out", type=int, default=64, help="rows after those, to score on")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--peer", default="trl-grouped")
    args = parser.parse_args()
    odd = args.rows < EXAMPLES_PER_STEP or args.rows % EXAMPLES_PER_STEP != 0
    refuse(parser, args, {f"--rows {args.rows} is not a multiple of the {EXAMPLES_PER_STEP} examples of a step": odd})
    results, worst = [], 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        held_out = folder / "held_out.jsonl"
        every = first_rows(args.train_file, args.rows + args.held_out)
        held_out.write_bytes(b"\n".join(every.splitlines()[args.rows :]) + b"\n")
        before = held_out_loss(None, held_out, args)
        print(f"| seed | before | minilora | {args.peer} | minilora / {args.peer} |\n| --- | --- | --- | --- | --- |")
        for seed in map(int, args.seeds.split(",")):
            losses = [
                held_out_loss(train(each, seed, args, folder), held_out, args) for each in ("minilora", args.peer)
            ]
            ratio = losses[0] / losses[1]
            worst = max(worst, ratio)
            print(f"| {seed} | {before:.4f} | {losses[0]:.4f} | {losses[1]:.4f} | {ratio:.4f} |", flush=True)
            results.append({"seed": seed, "before": before, "minilora": losses[0], args.peer: losses[1]})
    about = {"rows": args.rows, "held_out": args.held_out, "steps": args.rows // EXAMPLES_PER_STEP}
    args.out.write_text(json.dumps({"about": about, "results": results}, indent=2))
    return int(worst > MAX_RATIO)


if __name__ == "__main__":
    raise SystemExit(main())
