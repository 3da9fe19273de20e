"""Computes the memory of a card and the traffic of a step, from Qwen 0.5B to 72B on 1 to 512 cards, without a GPU.

    python -m benchmarks.scaling --methods lora --ranks 8,64 --cards 1,8,64

`minilora.training.memory_estimate` predicts the memory. It runs one step of two and of three layers on fake tensors,
and extrapolates to all layers.
Traffic is counted from the parameters. It is the number of bytes that a card receives in an optimizer step. A card
sends the same number. Replicas sum their gradients in one ring all-reduce: each card receives twice the buffer, without
its own part. Shards are gathered for the forward pass and again for the backward pass of each micro-batch. Each card
receives all parts except its own. If every weight is trained, gradients are also scattered. The shapes are those of
the published config.json of Qwen2.5. The script prints Markdown.
"""

import argparse
import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minilora.batching import collate
from minilora.config import TARGET_GROUPS, TrainConfig, with_method
from minilora.data.dataset import IGNORE, Example
from minilora.models.load import empty_model
from minilora.models.trainable import make_trainable
from minilora.training.memory_estimate import Setup, predict

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}
TOKENS, LENGTH, SUPERVISED_SHARE = 8192, 512, 0.5  # tokens of a micro-batch; tokens of a row, supervised share
FP32 = torch.float32.itemsize


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: all decoder layers, embedding, head, norm, and all trained parameters."""

    layers: int
    embedding: int
    head: int  # 0: tied
    norm: int
    trained: int


def write_shape(folder: Path, name: str) -> Path:
    """Make a folder that contains only the config.json of a Qwen2.5."""
    from transformers import Qwen2Config

    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[name]
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
        use_sliding_window=False,
    )
    config.architectures = ["Qwen2ForCausalLM"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def sizes_of(config: TrainConfig, folder: Path) -> Sizes:
    """Count the parameters on one layer on the meta device, after minilora has made it trainable."""
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    model = empty_model(folder, torch.float32, 1)
    base = sum(param.numel() for param in model.get_decoder().layers[0].parameters())
    make_trainable(model, config)
    in_layer = sum(param.numel() for param in model.get_decoder().layers[0].parameters() if param.requires_grad)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    norm = model.get_decoder().norm.weight.numel()
    own_head = 0 if head is embedding else head.numel()
    outside = embedding.numel() + own_head + norm if config.method == "full" else 0
    return Sizes(base * layers, embedding.numel(), own_head, norm, in_layer * layers + outside)


def traffic(sizes: Sizes, method: str, fsdp: bool, cards: int, micro_batches: int, itemsize: int = 2) -> float:
    """The bytes that each card receives in an optimizer step of `micro_batches` micro-batches on each card.

    itemsize: bytes of a number when layers are gathered. Gradients are summed in fp32.
    """
    others = (cards - 1) / cards
    if not fsdp:
        return 2 * (sizes.trained + 1) * FP32 * others
    layers = 2 * sizes.layers * itemsize  # forward and backward
    if method == "lora":
        return (micro_batches * layers + 2 * (sizes.trained + 1) * FP32) * others
    root = 2 * (sizes.embedding + sizes.norm) * FP32  # embedding and norm, forward and backward
    head = (sizes.head or sizes.embedding) * FP32  # gathered for the loss
    scattered = (sizes.layers + sizes.embedding + sizes.norm) * FP32 + head
    return (micro_batches * (layers + root + head + scattered) + 2 * FP32) * others


def memory(config: TrainConfig, folder: Path, shards: int, checkpointing: bool) -> float:
    """The peak memory of a card, in bytes."""
    setup = Setup(config, folder, torch.bfloat16, "cuda", checkpointing, shards)
    ids = np.zeros(LENGTH + 1, np.int32)
    labels = np.where(np.arange(LENGTH + 1) < LENGTH * (1 - SUPERVISED_SHARE) + 1, IGNORE, ids).astype(np.int32)
    return predict(setup, collate([Example(ids, labels)] * (TOKENS // LENGTH))).total


def gb(num_bytes: float) -> str:
    """A number of bytes as a text for a table."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def memory_table(config: TrainConfig, folders: dict[str, Path], cards: list[int], fsdp: bool) -> str:
    """A Markdown table of the peak of a card, by model and number of cards, without and with checkpointing."""
    counts = [count for count in cards if count > 1] if fsdp else [1]
    heads = [f"{count} cards" for count in counts] if fsdp else ["every card"]
    lines = ["| Qwen2.5 | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(counts)]
    for name, folder in folders.items():
        cells = []
        for count in counts:
            peaks = [memory(config, folder, count if fsdp else 1, checkpointing) for checkpointing in (False, True)]
            cells.append(" / ".join(f"{peak / 1e9:,.1f}" for peak in peaks))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def traffic_table(
    configs: dict[str, TrainConfig], folders: dict[str, Path], cards: list[int], fsdp: bool, micro_batches: int
) -> str:
    """A Markdown table of what a card receives in a step, by model and number of cards."""
    counts = [count for count in cards if count > 1]
    heads = [f"{name}, {count} cards" for name in configs for count in counts]
    lines = ["| Qwen2.5 | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for name, folder in folders.items():
        sizes = {key: sizes_of(config, folder) for key, config in configs.items()}
        cells = [
            gb(traffic(sizes[key], config.method, fsdp, count, micro_batches))
            for key, config in configs.items()
            for count in counts
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the requested tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--methods", default="lora,full")
    parser.add_argument("--ranks", default="8,64", help="of LoRA")
    parser.add_argument("--cards", default="1,8,64,512")
    parser.add_argument("--micro_batches", type=int, default=1, help="on each card, in a step")
    args = parser.parse_args()
    cards, ranks = [int(text) for text in args.cards.split(",")], [int(text) for text in args.ranks.split(",")]
    common = TrainConfig(model="none", lora_alpha=32, target_modules=TARGET_GROUPS["all"])
    loras = {f"r {rank}": dataclasses.replace(common, lora_r=rank) for rank in ranks}
    full = {"full": with_method(TrainConfig(model="none"), "full")}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: write_shape(Path(scratch) / name, name) for name in args.models.split(",")}
        for method, configs in (("lora", loras), ("full", full)):
            if method not in args.methods.split(","):
                continue
            for fsdp in (False, True):
                placement = "--fsdp" if fsdp else "replicas"
                for name, config in configs.items():
                    title = f"{method}, {name}, {placement}" if method == "lora" else f"{method}, {placement}"
                    table = memory_table(config, folders, cards, fsdp)
                    print(
                        f"\n### {title}: GB at the peak of a card, without / with checkpointing\n\n{table}", flush=True
                    )
                table = traffic_table(configs, folders, cards, fsdp, args.micro_batches)
                print(f"\n### {method}, {placement}: received by a card in a step\n\n{table}", flush=True)


if __name__ == "__main__":
    main()
