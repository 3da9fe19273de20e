"""What the tests share: a tiny random Qwen2 with the demo's tokenizer, small data files, small runs."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch.utils._python_dispatch import TorchDispatchMode

from minilora import demo, model, output
from minilora.config import TrainConfig
from minilora.data import IGNORE, Example
from minilora.lora import lora_layers

os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "minilora-hypothesis"))
settings.register_profile("minilora", database=None, derandomize=True, deadline=None)
settings.load_profile("minilora")

CPU = torch.device("cpu")
WORDS = ["red", "blue", "stone", "river", "bird", "cold", "warm", "大", "小", "水", "火", "山", "seven", "nine", "open"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A Hugging Face folder: Qwen2 of 2 layers with random weights (biases and norms too), the demo's tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo.DEMO_DIR / name, folder)
    tokenizer = model.load_tokenizer(folder)
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        use_sliding_window=False,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny = Qwen2ForCausalLM(config)
        for name, param in tiny.named_parameters():
            torch.nn.init.normal_(param, 1.0 if "norm" in name else 0.0, 0.1)
    tiny.save_pretrained(folder)
    return folder


@pytest.fixture
def load_tiny(tiny_folder):
    """A function that loads a fresh copy of the tiny model, in fp32 or another dtype."""
    return lambda dtype=torch.float32: model.load_model(tiny_folder, dtype, CPU)


@pytest.fixture
def quiet_finish(monkeypatch):
    """Runs end without letting the models speak, which is most of a tiny run's time."""
    monkeypatch.setattr(output, "sample_answers", lambda speaker: [""] * len(output.SAMPLE_PROMPTS))


def write_jsonl(path: Path, count: int, seed: int = 0) -> Path:
    """Rows of instruction, input and output, of different lengths, the same for the same seed."""
    rng = np.random.default_rng(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            words = rng.choice(WORDS, size=int(rng.integers(3, 25))).tolist()
            asked = int(rng.integers(1, len(words) - 1))
            row = {
                "instruction": " ".join(words[:asked]),
                "input": "",
                "output": " ".join([*words[asked:], str(number)]),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


@pytest.fixture
def make_config(tiny_folder, tmp_path):
    """A function: keys of TrainConfig over those of a small fp32 run of 4 steps, 8 unequal examples each."""

    def make(**keys):
        if "train_file" not in keys:
            keys["train_file"] = str(write_jsonl(tmp_path / "train.jsonl", 32))
        small = {
            "model": str(tiny_folder),
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 1,
            "learning_rate": 1e-2,
            "max_grad_norm": 1.0,
            "lora_dropout": 0.0,
            "max_tokens_per_micro_batch": 96,
            "dtype": "float32",
            "device": "cpu",
        }
        return TrainConfig(**(small | keys))

    return make


def random_examples(lengths, seed: int = 0, vocabulary: int = 2000) -> list[Example]:
    """Examples of random tokens whose first third is not supervised."""
    rng = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        ids = rng.integers(0, vocabulary, length).astype(np.int32)
        labels = np.where(np.arange(length) < length // 3, IGNORE, ids).astype(np.int32)
        examples.append(Example(ids, labels))
    return examples


def randomize_lora(module, seed: int = 1, std: float = 0.2) -> None:
    """Give every LoRALinear random A and B, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(module).values():
            layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=generator, dtype=torch.float64) * std)
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator, dtype=torch.float64) * std)


def relative_error(found, expected) -> float:
    """||found - expected|| / ||expected||, in fp64."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


class Sizes(TorchDispatchMode):
    """Inside, remembers (operator, shape, dtype) of every tensor that an operator returns, backward included."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.made.append((str(func), tuple(tensor.shape), tensor.dtype))
        return result

    @property
    def largest(self) -> int:
        """Elements of the largest tensor made."""
        return max(torch.Size(shape).numel() for _, shape, _ in self.made)
