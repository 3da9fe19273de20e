"""minilora beside what a user would pick instead, on the same rows, one process each, in turn.

    python benchmarks/compare.py --model FOLDER --train_file rows.jsonl --rows 64 --repeat 3

Prints one table (medians; the range of the repeats) and writes everything to --out. Refuses when contenders that
should compute the same function differ by more than 1 % in the loss before the first step.
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
NAMES = ("minilora", "trl-grouped", "trl-1", "trl", "seed")


def run_once(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The result of one contender in a process of its own; raises RuntimeError with its last line when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "contenders.py"), name, "--json", str(out)]
        command += ["--model", args.model, "--train_file", args.train_file, "--rows", str(args.rows)]
        command += ["--device", args.device] + (["--flags", args.flags] if name == "minilora" else [])
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode or not out.exists():
            raise RuntimeError((done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1])
        return json.loads(out.read_text())


def machine(device: str) -> dict[str, str]:
    """What the figures depend on."""
    names = ("torch", "transformers", "peft", "trl", "accelerate")
    info = {name: metadata.version(name) for name in names} | {"date": datetime.now(UTC).date().isoformat()}
    if device == "cpu":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
        return info | {"device": f"CPU, {os.cpu_count()} cores, {model}"}
    import torch

    return info | {"device": torch.cuda.get_device_name()}


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """The results as Markdown, medians over the repeats."""
    head = "real tokens/s (range) | supervised tokens/s | against minilora | peak memory GiB | first step after s"
    rows = [f"| contender | {head} | loss before |", "| --- | --- | --- | --- | --- | --- | --- |"]
    own = statistics.median(r["tokens_per_second"] for r in results.get("minilora", [])) if "minilora" in results else 0
    for name, runs in results.items():
        speeds = [r["tokens_per_second"] for r in runs]
        speed = statistics.median(speeds)
        middle = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        rows.append(
            f"| {name} | {speed:.1f} ({min(speeds):.1f} - {max(speeds):.1f}) | "
            f"{middle['supervised_tokens_per_second']:.1f} | {speed / own if own else 0:.2f} x | "
            f"{middle['peak_bytes'] / 2**30:.2f} | {middle['seconds_to_first_step']:.0f} | "
            f"{middle['start_completion_loss']:.4f} |"
        )
    return "\n".join(rows)


def main() -> int:
    """Run the contenders in turn; 1 when one failed or they do not compute the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--contenders", default="minilora,trl-grouped,seed", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--flags", default="{}", help="JSON of further minilora keys")
    parser.add_argument("--out", type=Path, default=Path("compare.json"))
    args = parser.parse_args()
    chosen = args.contenders.split(",")
    if unknown := set(chosen) - set(NAMES):
        parser.error(f"unknown contenders {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    results: dict[str, list[dict[str, Any]]] = {}
    failed = False
    for turn in range(args.repeat):
        for name in chosen:
            try:
                results.setdefault(name, []).append(run_once(name, args))
                print(
                    f"{turn + 1}/{args.repeat} {name}: {results[name][-1]['tokens_per_second']:.1f} tokens/s",
                    flush=True,
                )
            except RuntimeError as error:
                failed = True
                print(f"{turn + 1}/{args.repeat} {name} failed: {error}", flush=True)
    results = {name: runs for name, runs in results.items() if runs}
    about = machine(args.device)
    args.out.write_text(json.dumps({"about": about, "rows": args.rows, "results": results}, indent=2))
    losses = [r["start_completion_loss"] for runs in results.values() for r in runs]
    if losses and max(losses) > 1.01 * min(losses):
        print(
            f"refused: the losses before the first step differ by more than 1 %: {min(losses):.4f} to {max(losses):.4f}"
        )
        return 1
    if any(r["first_grad_norm"] <= 0 for runs in results.values() for r in runs):
        print("refused: a contender's first gradient is zero")
        return 1
    print(f"\n{args.rows} rows, {args.repeat} repeats; " + ", ".join(f"{k} {v}" for k, v in about.items()) + "\n")
    print(table(results))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
