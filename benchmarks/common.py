"""What the measuring scripts share: their command lines, their processes, their tables."""

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
    """argparse whose mistakes are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what cannot be obeyed; exit code 2."""
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def parser_of(script: str, description: str | None) -> Parser:
    """A parser with the arguments that all these scripts have."""
    parser = Parser(script, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="@demo/model", help="model folder; @ is the package's (default: the demo's)")
    parser.add_argument("--train_file", default="@demo/train.jsonl", help="JSONL file of examples")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    parser.add_argument("--flags", default="{}", help="JSON of further minilora keys")
    parser.add_argument("--out", type=Path, default=Path(f"{script}.json"))
    return parser


def refuse(parser: Parser, args: argparse.Namespace, refusals: dict[str, bool]) -> None:
    """End with the first message whose mistake was made, of the script's own and of those all can make.

    Replaces @ in the paths.
    """
    for name in ("model", "train_file"):
        path = getattr(args, name)
        setattr(args, name, str(PACKAGE / path[1:]) if path.startswith("@") else path)
    refusals = refusals | {
        f"--model {args.model}: no model folder": not (Path(args.model) / "config.json").is_file(),
        f"--train_file {args.train_file}: no such file": not Path(args.train_file).is_file(),
        f"--out {args.out}: there is no such folder": not args.out.parent.is_dir(),
        f"--flags {args.flags}: no JSON object": not is_object(args.flags),
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
    """A script's process ended badly; the text is the last line it said."""


def written_by(script: str, *words: str) -> Result:
    """The JSON that a script writes to its --out, in a process of its own. Raises FailedError."""
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
    """What a script writes for one job; a failure stands there as {"failed": why}."""
    try:
        return written_by(script, flag, json.dumps(keys))
    except FailedError as error:
        return {"failed": str(error)}


def row(cells: list[str] | tuple[str, ...]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
