"""Fine-tune a Qwen model with LoRA.

python train.py demo                                   # the built-in model, offline, about a minute
python train.py                                        # preset lora on Qwen/Qwen2-0.5B-Instruct
python train.py --model FOLDER --train_file mine.jsonl # your model, your rows

The story is told in minilora/loop.py.
"""

import sys

from minilora.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
