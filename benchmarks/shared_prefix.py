"""Measures the gain of computing the system prompt of a micro-batch once: the same rows and steps, without and with it.

    python -m benchmarks.shared_prefix --model FOLDER --train_file rows.jsonl --rows 32 --prompts 13,100,500

Each row begins with a prompt of N tokens. The prompt's markup adds a few shared tokens. Each run is a separate process.
The loss and the gradient norm of the first step must be the same (dropout 0). The last peak is that of a third run,
which does not share the prompt and has as many rows in a micro-batch as the run that shares it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.contenders import SYSTEM, Result, first_rows

ROOT = Path(__file__).parent.parent
SENTENCE = "你是一个乐于助人的助手，请用简洁、准确、礼貌的语言回答用户提出的每一个问题。"


def prompt_of(tokenizer: Any, tokens: int) -> str:
    """A system prompt of about `tokens` tokens. For a small number it is the seed's prompt."""
    if len(tokenizer.encode(SYSTEM)) >= tokens - 8:  # its markup counts: <|im_start|>, system, \n, <|im_end|>, ...
        return SYSTEM
    ids = tokenizer.encode(SENTENCE)
    return tokenizer.decode((ids * (tokens // len(ids) + 1))[:tokens])


def budget_of_as_many_rows(tokenizer: Any, prompt: str, args: argparse.Namespace) -> int:
    """The token limit that, without sharing, gives micro-batches with as many rows as sharing does."""
    from minilora.batching import default_tokens, pack_examples
    from minilora.config import TrainConfig
    from minilora.data.dataset import tokenize
    from minilora.data.markup import ChatMarkup
    from minilora.data.rows import read_rows
    from minilora.utils.device import pick_device

    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        Path(file.name).write_bytes(first_rows(args.train_file, args.rows))
        rows, reading = read_rows(file.name)
    settings = {name: getattr(TrainConfig, name) for name in ("max_length", "overlong", "train_on_prompt")}
    dataset = list(tokenize(rows, ChatMarkup(tokenizer), reading, system_prompt=prompt, **settings)[0])
    most = default_tokens(pick_device(args.device).type, dataset, share_prefix=True)
    return max(sum(len(dataset[i].input_ids) - 1 for i in part) for part in pack_examples(dataset, most, True))


def train(prompt: str, share: str, args: argparse.Namespace, max_tokens: int = 0) -> Result:
    """Train on the rows in a separate process. Returns its summary, with the record of the first step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        rows.write_bytes(first_rows(args.train_file, args.rows))
        command = [sys.executable, str(ROOT / "train.py"), "lora", "--model", args.model, "--train_file", str(rows)]
        command += ["--system_prompt", prompt, "--share_prefix", share, "--num_train_epochs", "1"]
        command += ["--lora_dropout", "0", "--max_tokens_per_micro_batch", str(max_tokens)]
        command += ["--output_dir", str(folder / "run"), "--device", args.device]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=os.environ)
        if done.returncode:
            raise SystemExit((done.stderr.strip() or "no output").splitlines()[-1])
        first = json.loads((folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()[0])
        return json.loads((folder / "run" / "summary.json").read_text("utf-8")) | {"first": first}


def main() -> None:
    """Print one row for each prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompts", default="13,100,500", help="tokens of each system prompt")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    from minilora.models.load import load_tokenizer

    tokenizer = load_tokenizer(Path(args.model))
    peaks = "peak without, GiB | with | without, as many rows"
    print(f"| prompt, tokens | without, tokens/s | with | gain | {peaks} | loss | gradient norm |")
    print("| --- " * 9 + "|")
    for tokens in map(int, args.prompts.split(",")):
        prompt = prompt_of(tokenizer, tokens)
        off, on = (train(prompt, share, args) for share in ("off", "on"))
        as_many = train(prompt, "off", args, budget_of_as_many_rows(tokenizer, prompt, args))
        cells = [f"{off['tokens_per_second']:.1f}", f"{on['tokens_per_second']:.1f}"]
        cells += [f"{on['tokens_per_second'] / off['tokens_per_second']:.2f} x"]
        cells += [f"{each['peak_memory_bytes'] / 2**30:.2f}" for each in (off, on, as_many)]
        cells += [f"{off['first'][key]:.5f} / {on['first'][key]:.5f}" for key in ("loss", "grad_norm")]
        print(f"| {len(tokenizer.encode(prompt))} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
