"""Holds what the measuring scripts share: command lines, processes, tables."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minilora"
Result = dict[str, Any]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def parser_of(script: str, description: str | None) -> Parser:
    """A parser with the arguments that these scripts share."""
    parser = Parser(script, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="@demo/model", help="model folder; @ is minilora/ (default: the demo's)")
    parser.add_argument("--train_file", default="@demo/train.jsonl", help="JSONL file of examples")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    parser.add_argument("--flags", default="{}", help="JSON of further minilora keys")
    parser.add_argument("--out", type=Path, default=Path(f"{script}.json"))
    return parser


def refuse(parser: Parser, args: argparse.Namespace, refusals: dict[str, bool]) -> None:
    """Exit with the first message whose condition is true, from `refusals` or from the checks of all scripts.

    Replaces @ in the paths.
    """
    for name in ("model", "train_file"):
        path = getattr(args, name)
        setattr(args, name, str(PACKAGE / path[1:]) if path.startswith("@") else path)
    refusals = refusals | {
        f"--model {args.model}: not a model folder": not (Path(args.model) / "config.json").is_file(),
        f"--train_file {args.train_file}: no such file": not Path(args.train_file).is_file(),
        f"--out {args.out}: its folder does not exist": not args.out.parent.is_dir(),
        f"--flags {args.flags}: not a JSON object": not is_object(args.flags),
    }
    for message, refused in refusals.items():
        if refused:
            parser.error(message)


def is_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


class FailedError(Exception):
    """The process of a script failed. The text is the last line of its output."""


def written_by(script: str, *words: str) -> Result:
    """Run a script in a separate process, and return the JSON that it writes to --out. Raises FailedError."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", f"benchmarks.{script}", *words, "--out", str(out)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
        if done.returncode == 0 and out.exists():
            return json.loads(out.read_text("utf-8"))
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise FailedError(f"killed by signal {-done.returncode}" if done.returncode < 0 else lines[-1])


def in_a_process(script: str, flag: str, keys: Any) -> Result:
    """The JSON that a script writes for one job. A failure gives {"failed": why}."""
    try:
        return written_by(script, flag, json.dumps(keys))
    except FailedError as error:
        return {"failed": str(error)}


def row(cells: list[str] | tuple[str, ...]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
