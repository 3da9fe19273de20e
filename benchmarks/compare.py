"""Compares minilora with other trainers: each trains on the same rows in a separate process, in turn, several times.

    python -m benchmarks.compare --model FOLDER --train_file rows.jsonl --rows 64 --repeat 3

First every contender computes its loss on the answers of the first 32 rows before training. If these losses differ by
more than 1 %, the contenders do not compute the same function, and nothing is measured. Then they train in turn. The
script prints one table (medians over the repeats) and writes all figures to --out. "loss of step 1" is what each
contender reports. It is over different rows, because each contender shuffles the rows itself. For the seed it is over
all tokens.

Every contender takes dtype auto: minilora's own, and for the others bf16 if the hardware has it. With --best_dtype,
each of the others first trains on --trial_rows rows in bf16 and in fp32, and takes the faster one for all that follows.
A trial is short: its time contains the first step's, in which products of new shapes are prepared.
Exit code 1: refused, or a contender failed.
"""

import argparse
import json
import statistics
import sys
from datetime import UTC, datetime
from importlib import metadata

from benchmarks.common import FailedError, Result, parser_of, refuse, row, written_by

NAMES = ("minilora", "seed", "trl", "trl-grouped", "trl-1")
EXAMPLES_PER_STEP = 32
MAX_LOSS_RATIO = 1.01
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")
DTYPES = ("bfloat16", "float32")
HEAD = (
    "contender",
    "dtype",
    "real tokens/s (min - max)",
    "supervised tokens/s",
    "against minilora",
    "peak memory, GiB",
    "first step done after, s",
    "loss before",
    "loss of step 1",
)


def run(name: str, args: argparse.Namespace, dtype: str, rows: int, check: bool = False) -> Result:
    """Run one contender in a separate process, and return its report. Raises FailedError."""
    words = ["--model", args.model, "--train_file", args.train_file, "--rows", str(rows), "--dtype", dtype]
    words += ["--device", args.device, "--flags", args.flags] + ["--check"] * check
    return written_by("contenders", name, *words)


def best_dtypes(
    args: argparse.Namespace, failed: dict[str, str]
) -> tuple[dict[str, str], dict[str, dict[str, Result]]]:
    """(the dtype of each contender, the trials of each by dtype). A dtype that fails is not taken.

    The contenders take turns, as in the measured runs. minilora has no trial: it measures the machine itself.
    """
    trials: dict[str, dict[str, Result]] = {name: {} for name in args.contenders if name != "minilora"}
    for dtype in DTYPES:
        for name, own in trials.items():
            try:
                own[dtype] = run(name, args, dtype, args.trial_rows)
                print(f"trial: {name} in {dtype}: {own[dtype]['tokens_per_second']:.1f} tokens/s", flush=True)
            except FailedError as error:
                own[dtype] = {"failed": str(error)}
                print(f"trial: {name} in {dtype} failed: {error}", flush=True)
    taken = {}
    for name, own in trials.items():
        speeds = {dtype: result["tokens_per_second"] for dtype, result in own.items() if "failed" not in result}
        if speeds:
            taken[name] = max(speeds, key=lambda dtype: speeds[dtype])
        else:
            failed[name] = own[DTYPES[0]]["failed"]
    return taken, trials


def trials_table(taken: dict[str, str], trials: dict[str, dict[str, Result]]) -> str:
    """The figures of the trials as Markdown."""
    head = ["contender", *(f"{dtype}, tokens/s (peak GiB)" for dtype in DTYPES), "taken"]
    lines = [row(head), row(["---"] * len(head))]
    for name, own in trials.items():
        cells = [
            f"failed: {result['failed']}"
            if "failed" in result
            else f"{result['tokens_per_second']:.1f} ({result['peak_bytes'] / 2**30:.2f})"
            for result in own.values()
        ]
        lines.append(row([name, *cells, taken.get(name, "none")]))
    return "\n".join(lines)


def attempt(name: str, args: argparse.Namespace, failed: dict[str, str], check: bool = False) -> Result | None:
    """`run` for a contender that has not failed yet. A failure is printed and stored, and the others continue."""
    if name in failed:
        return None
    try:
        return run(name, args, args.dtypes.get(name, "auto"), args.rows, check)
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
    """Run every contender `repeat` times, in turn, so that a slow period of the machine affects all of them."""
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
        cells = [name, runs[0]["dtype"], f"{speed:.1f} ({min(speeds):.1f} - {max(speeds):.1f})"]
        cells += [f"{middle(runs, 'supervised_tokens_per_second'):.1f}", f"{speed / own:.2f} x" if own else ""]
        cells += [memory, f"{middle(runs, 'seconds_to_first_step'):.1f}"]
        cells += [f"{middle(runs, 'start_completion_loss'):.4f}", f"{middle(runs, 'first_step_loss'):.4f}"]
        lines.append(tuple(cells))
    lines += [(name, f"failed: {why}") + ("",) * (len(HEAD) - 2) for name, why in failed.items()]
    return "\n".join(map(row, lines))


def describe(args: argparse.Namespace, results: dict[str, list[Result]]) -> Result:
    """The conditions of the figures: versions, machine, date, rows."""
    info: Result = {name: metadata.version(name) for name in PACKAGES} | {"python": sys.version.split()[0]}
    some = next(iter(results.values()), [{}])[0]
    info |= {key: some[key] for key in ("device", "threads", "tokens", "supervised_tokens") if key in some}
    info |= {"date": datetime.now(UTC).isoformat(timespec="minutes"), "model": args.model}
    return info | {"train_file": args.train_file, "rows": args.rows, "repeat": args.repeat, "flags": args.flags}


def parse() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = parser_of("compare", __doc__)
    parser.add_argument("--rows", type=int, default=64, help=f"a multiple of {EXAMPLES_PER_STEP}")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--contenders", default=",".join(NAMES), help=f"of {', '.join(NAMES)}")
    parser.add_argument("--best_dtype", action="store_true", help="the others train in the faster of bf16 and fp32")
    parser.add_argument("--trial_rows", type=int, default=EXAMPLES_PER_STEP, help="rows of a trial of --best_dtype")
    args = parser.parse_args()
    args.contenders = list(dict.fromkeys(args.contenders.split(",")))
    unknown = [name for name in args.contenders if name not in NAMES]
    odd = {
        name: rows < EXAMPLES_PER_STEP or rows % EXAMPLES_PER_STEP != 0
        for name, rows in (("rows", args.rows), ("trial_rows", args.trial_rows))
    }
    refusals = {
        f"unknown contenders {', '.join(unknown)}; the contenders are {', '.join(NAMES)}": bool(unknown),
        f"--rows {args.rows} is not a multiple of the {EXAMPLES_PER_STEP} examples of a step": odd["rows"],
        f"--trial_rows {args.trial_rows} is not a multiple of {EXAMPLES_PER_STEP}": odd["trial_rows"],
        "--repeat must be at least 1": args.repeat < 1,
    }
    refuse(parser, args, refusals)
    return args


def main() -> int:
    """Check, measure and report."""
    args = parse()
    failed: dict[str, str] = {}
    args.dtypes, trials = best_dtypes(args, failed) if args.best_dtype else ({}, {})
    losses = start_losses(args, failed)
    if losses and max(losses.values()) > MAX_LOSS_RATIO * min(losses.values()):
        loss_text = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        print(f"refused: the losses before training differ by more than 1 %: {loss_text}")
        return 1
    results = measure(args, losses, failed)
    info = describe(args, results)
    everything = {"about": info, "failed": failed, "trials": trials, "results": results}
    args.out.write_text(json.dumps(everything, indent=2, ensure_ascii=False))
    print("\n" + ", ".join(f"{key} {value}" for key, value in info.items()) + "\n")
    print(table(results, failed))
    if trials:
        print(f"\nTrials of {args.trial_rows} rows:\n\n{trials_table(args.dtypes, trials)}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
