"""Fine-tune a Qwen model with LoRA.

python train.py demo                                   # the built-in model, offline, about a minute
python train.py                                        # preset lora on Qwen/Qwen2-0.5B-Instruct
python train.py --model FOLDER --train_file mine.jsonl # your model, your rows
"""

import sys

import minilora
from minilora.cli import parse_train, report_errors


def fine_tune(argv: list[str]) -> None:
    """Train with the settings that the command line gives."""
    config = parse_train(argv)  # a minilora.TrainConfig: a preset or a TOML file, then the keys of the command line
    minilora.train(config)  # the story is told in minilora/loop.py


if __name__ == "__main__":
    raise SystemExit(report_errors(fine_tune, sys.argv[1:]))
