"""minilora beside what a user would pick instead: the same rows, one process each, in turn, repeated.

    python benchmarks/compare.py --model FOLDER --train_file rows.jsonl --rows 64 --repeat 3

First every contender says its loss on the answers of the first 32 rows before any training; when these differ by more
than 1 % they do not compute the same function, and nothing is measured. Then they train in turn. Prints one table
(medians over the repeats) and writes all figures to --out. "Loss of step 1" is each contender's own report: over other
rows, as each shuffles by itself, and for the seed over all tokens. Exit code 1: refused, or a contender failed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NAMES = ("minilora", "seed", "trl", "trl-grouped", "trl-1")
EXAMPLES_PER_STEP = 32
MAX_LOSS_RATIO = 1.01
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")
HEAD = (
    "contender",
    "real tokens/s (min - max)",
    "supervised tokens/s",
    "against minilora",
    "peak memory, GiB",
    "first step done after, s",
    "loss before",
    "loss of step 1",
)
Result = dict[str, Any]


class FailedError(Exception):
    """A contender's process ended badly; the text is its last line."""


def run(name: str, args: argparse.Namespace, check: bool = False) -> Result:
    """What one contender reports, in a process of its own. Raises FailedError."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "contenders.py"), name, "--json", str(out)]
        command += ["--model", args.model, "--train_file", args.train_file, "--rows", str(args.rows)]
        command += ["--device", args.device, "--flags", args.flags] + ["--check"] * check
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
        if done.returncode < 0:
            raise FailedError(f"killed by signal {-done.returncode}")
        if done.returncode or not out.exists():
            lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
            raise FailedError(lines[-1])
        return json.loads(out.read_text())


def attempt(name: str, args: argparse.Namespace, failed: dict[str, str], check: bool = False) -> Result | None:
    """`run` for a contender that has not failed yet; its failure is said and kept, and the others go on."""
    if name in failed:
        return None
    try:
        return run(name, args, check)
    except FailedError as error:
        failed[name] = str(error)
        print(f"{name} failed: {error}", flush=True)
        return None


def start_losses(args: argparse.Namespace, failed: dict[str, str]) -> dict[str, float]:
    """Each contender's mean nats over the answers of the first rows, before training."""
    losses = {}
    for name in args.contenders:
        if result := attempt(name, args, failed, check=True):
            losses[name] = result["start_completion_loss"]
            print(f"before training: {name} {losses[name]:.4f} nats a token", flush=True)
    return losses


def measure(args: argparse.Namespace, losses: dict[str, float], failed: dict[str, str]) -> dict[str, list[Result]]:
    """Every contender `repeat` times, in turn, so that a slow hour of the machine meets them all."""
    results: dict[str, list[Result]] = {}
    for turn in range(args.repeat):
        for name in args.contenders:
            if result := attempt(name, args, failed):
                if not result["first_grad_norm"] > 0:
                    failed[name] = f"the gradient norm of its first step is {result['first_grad_norm']}"
                    print(f"{name} failed: {failed[name]}", flush=True)
                    continue
                results.setdefault(name, []).append(result | {"start_completion_loss": losses[name]})
                print(f"{turn + 1}/{args.repeat} {name}: {result['tokens_per_second']:.1f} tokens/s", flush=True)
    return results


def middle(runs: list[Result], key: str) -> float:
    """The median of a figure over the repeats."""
    return statistics.median(run[key] for run in runs)


def table(results: dict[str, list[Result]], failed: dict[str, str]) -> str:
    """The results as Markdown."""
    lines = [HEAD, ("---",) * len(HEAD)]
    own = middle(results["minilora"], "tokens_per_second") if "minilora" in results else None
    for name, runs in results.items():
        speed, speeds = middle(runs, "tokens_per_second"), [run["tokens_per_second"] for run in runs]
        memory = f"{middle(runs, 'peak_bytes') / 2**30:.2f}"
        if "peak_reserved_bytes" in runs[0]:
            memory += f" allocated, {middle(runs, 'peak_reserved_bytes') / 2**30:.2f} reserved"
        cells = [name, f"{speed:.1f} ({min(speeds):.1f} - {max(speeds):.1f})"]
        cells += [f"{middle(runs, 'supervised_tokens_per_second'):.1f}", f"{speed / own:.2f} x" if own else ""]
        cells += [memory, f"{middle(runs, 'seconds_to_first_step'):.1f}"]
        cells += [f"{middle(runs, 'start_completion_loss'):.4f}", f"{middle(runs, 'first_step_loss'):.4f}"]
        lines.append(tuple(cells))
    lines += [(name, f"failed: {why}") + ("",) * (len(HEAD) - 2) for name, why in failed.items()]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def describe(args: argparse.Namespace, results: dict[str, list[Result]]) -> Result:
    """What the figures depend on: versions, machine, date, rows."""
    info: Result = {name: metadata.version(name) for name in PACKAGES} | {"python": sys.version.split()[0]}
    some = next(iter(results.values()), [{}])[0]
    info |= {key: some[key] for key in ("device", "threads", "tokens", "supervised_tokens") if key in some}
    info |= {"date": datetime.now(UTC).isoformat(timespec="minutes"), "model": args.model}
    return info | {"train_file": args.train_file, "rows": args.rows, "repeat": args.repeat, "flags": args.flags}


def parse() -> argparse.Namespace:
    """The command line; what cannot be obeyed is refused here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--rows", type=int, default=64, help=f"a multiple of {EXAMPLES_PER_STEP}")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--contenders", default=",".join(NAMES), help=f"of {', '.join(NAMES)}")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda")
    parser.add_argument("--flags", default="{}", help="JSON of further minilora keys")
    parser.add_argument("--out", type=Path, default=Path("compare.json"))
    args = parser.parse_args()
    args.contenders = list(dict.fromkeys(args.contenders.split(",")))
    if unknown := [name for name in args.contenders if name not in NAMES]:
        parser.error(f"unknown contenders {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if args.rows < EXAMPLES_PER_STEP or args.rows % EXAMPLES_PER_STEP:
        parser.error(f"--rows {args.rows} is no multiple of the {EXAMPLES_PER_STEP} examples of a step")
    if args.repeat < 1:
        parser.error("--repeat must be at least 1")
    return args


def main() -> int:
    """Check, measure, report."""
    args = parse()
    failed: dict[str, str] = {}
    losses = start_losses(args, failed)
    if losses and max(losses.values()) > MAX_LOSS_RATIO * min(losses.values()):
        said = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        print(f"refused: the losses before training differ by more than 1 %: {said}")
        return 1
    results = measure(args, losses, failed)
    info = describe(args, results)
    args.out.write_text(json.dumps({"about": info, "failed": failed, "results": results}, indent=2, ensure_ascii=False))
    print("\n" + ", ".join(f"{key} {value}" for key, value in info.items()) + "\n")
    print(table(results, failed))
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
