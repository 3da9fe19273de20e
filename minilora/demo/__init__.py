"""Gives the paths of the built-in demo: a tiny Qwen2 model and the rows that fine-tune it."""

from pathlib import Path

DEMO_DIR: Path = Path(__file__).parent / "model"
TRAIN_FILE: Path = Path(__file__).parent / "train.jsonl"
EVAL_FILE: Path = Path(__file__).parent / "valid.jsonl"
