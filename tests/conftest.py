"""What the tests share: a tiny random Qwen2 with the demo's tokenizer, small data files, small runs."""

import copy
import functools
import gc
import itertools
import json
import os
import shutil
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

FOREIGN = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_", "LC_", "TORCHINDUCTOR_", "TORCHELASTIC_", "OMP_", "MKL_")
FOREIGN_NAMES = {
    *("LANG", "LANGUAGE", "TZ", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TOKENIZERS_PARALLELISM"),
    *("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY", "RANK", "WORLD_SIZE"),
}
for _name in [name for name in os.environ if name.startswith(FOREIGN) or name in FOREIGN_NAMES]:
    del os.environ[_name]  # before torch and transformers read them: the tests do not depend on who runs them
os.environ["LANG"] = "C.UTF-8"
time.tzset()

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import worlds  # noqa: E402
from hypothesis import settings  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from minilora import demo, loop  # noqa: E402
from minilora.adapters import format as adapter_format  # noqa: E402
from minilora.config import TrainConfig  # noqa: E402
from minilora.data.dataset import IGNORE, Example  # noqa: E402
from minilora.lora import inject, lora_layers  # noqa: E402
from minilora.models import fingerprint, probe  # noqa: E402
from minilora.models import load as loading  # noqa: E402
from minilora.training import finish, setup  # noqa: E402
from minilora.training.memory_estimate import Choice  # noqa: E402
from minilora.training.run import Run  # noqa: E402
from minilora.training.setup import prepare  # noqa: E402
from minilora.training.signals import StopRequest  # noqa: E402

os.environ.setdefault(
    "HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), f"minilora-hypothesis-{os.getuid()}")
)
settings.register_profile("minilora", database=None, derandomize=True, deadline=None)
settings.load_profile("minilora")

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
WORDS = ["red", "blue", "stone", "river", "bird", "cold", "warm", "大", "小", "水", "火", "山", "seven", "nine", "open"]


@pytest.fixture(autouse=True, scope="session")
def _lean():
    torch.set_num_threads(1)
    # In torch 2.11 a process whose first backward pass is one on fake tensors starts threads for devices. The processes
    # that it forks then cannot train.
    torch.ones(1, requires_grad=True).sum().backward()
    gc.collect()
    gc.freeze()  # each run ends with a look through all that lives, and pytest holds much


@pytest.fixture(autouse=True)
def _same_numbers():
    """Whatever ran before a test, it draws the same."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A Hugging Face folder: Qwen2 of 2 layers with random weights (biases and norms too), the demo's tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo.DEMO_DIR / name, folder)
    tokenizer = loading.load_tokenizer(folder)
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


@pytest.fixture(scope="session")
def _loaded(tiny_folder):
    return functools.cache(lambda dtype: loading.load_model(tiny_folder, dtype, CPU))


@pytest.fixture
def load_tiny(_loaded):
    """A function: a fresh copy of the tiny model as it is loaded, in fp32 or another dtype."""
    return lambda dtype=torch.float32: copy.deepcopy(_loaded(dtype))


@pytest.fixture
def mute(monkeypatch):
    """Runs let no model speak at their end."""
    monkeypatch.setattr(finish, "sample_answers", lambda chat_model: [""] * len(probe.SAMPLE_PROMPTS))


@contextmanager
def bare_runs():
    """Inside, runs predict no memory and let no model speak at their end, which is most of a tiny run's time."""

    def cut(setup, dataset, schedule, asked, most, *_):
        return Choice(asked or most, setup.checkpointing, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "sample_answers", lambda chat_model: [""] * len(probe.SAMPLE_PROMPTS))
        patch.setattr(setup, "choose_cut", cut)
        yield


@pytest.fixture
def bare_run():
    """`bare_runs` around a test."""
    with bare_runs():
        yield


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


def small_config(base: Path, folder: Path, **keys) -> TrainConfig:
    """Keys of TrainConfig over those of a small fp32 run of 4 steps, 8 unequal examples each."""
    if "train_file" not in keys:
        keys["train_file"] = str(write_jsonl(folder / "train.jsonl", 32))
    small = {
        "model": str(base),
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 1.0,
        "lora_dropout": 0.0,
        "dtype": "float32",
        "device": "cpu",
    }
    small |= {} if keys.get("packing") is False else {"max_tokens_per_micro_batch": 96}
    return TrainConfig(**(small | keys))


@pytest.fixture
def make_config(tiny_folder, tmp_path):
    """A function: `small_config` on the tiny model, in the test's own folder."""
    return lambda **keys: small_config(tiny_folder, tmp_path, **keys)


@pytest.fixture
def start(make_config):
    """A function: a run of these keys, prepared and not yet begun."""
    with ExitStack() as held:
        yield lambda **keys: prepare(make_config(**keys), StopRequest(), held)


@pytest.fixture
def start_world(tmp_path):
    """A function: work(rank) in so many forked processes that find each other; returns them (`worlds.Child`)."""
    children, numbers = [], itertools.count(1)

    def start(size, work):
        children.extend(worlds.start(size, work, tmp_path, next(numbers)))
        return children[-size:]

    yield start
    for child in children:
        child.kill()


@pytest.fixture
def world(start_world):
    """A function: work(rank) in so many processes; returns (exit code, what it returned) of each, in time."""

    def ended(size, work):
        children = start_world(size, work)
        until = time.monotonic() + worlds.LIMIT_S
        return [child.end(until) for child in children]

    return ended


def trained(module) -> dict[str, torch.nn.Parameter]:
    """What is trained of a model, by name."""
    return {name: param for name, param in module.named_parameters() if param.requires_grad}


def first_step(run: Run) -> tuple[list[Example], int]:
    """The examples of the run's next step and the number of their supervised tokens."""
    examples = [run.data.train[i] for i in run.schedule.examples_of(run.state.step)]
    return examples, sum(int((example.labels[1:] != IGNORE).sum()) for example in examples)


def gradients_of(run: Run, budget: int | None = None) -> dict[str, torch.Tensor]:
    """The gradients of the run's next step, by name."""
    run.optimizer.zero_grad(set_to_none=True)
    run.state.max_tokens = budget or run.state.max_tokens
    loop.gradients(run, *first_step(run))
    return {name: param.grad.clone() for name, param in trained(run.model).items()}


def random_examples(lengths, seed: int = 0, vocabulary: int = 2000) -> list[Example]:
    """Examples of random tokens whose first third is not supervised."""
    rng = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        ids = rng.integers(0, vocabulary, length).astype(np.int32)
        labels = np.where(np.arange(length) < length // 3, IGNORE, ids).astype(np.int32)
        examples.append(Example(ids, labels))
    return examples


IDS = torch.from_numpy(random_examples([40])[0].input_ids[None]).long()


@torch.no_grad()
def logits(module) -> torch.Tensor:
    """What a model makes of the same 40 tokens, answering. (1, 40, vocabulary)"""
    return module.eval()(IDS).logits


def lines(folder) -> tuple[list[dict], list[dict]]:
    """metrics.jsonl as (training lines, evaluation lines)."""
    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if "eval_loss" not in r], [r for r in records if "eval_loss" in r]


def flat(tensors) -> torch.Tensor:
    """Named tensors end to end, in the order of their names."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


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


def save_random_adapter(module, folder: Path, base, targets, rank=4, alpha=8, prompt="Be brief.", **values) -> None:
    """Put LoRA with random values around a fresh model and save it: trained, as it were, on the model in `base`.

    values: seed and std of the random values, rslora, dora
    """
    identity, variant = fingerprint.fingerprint(module), {key: values.get(key, False) for key in ("rslora", "dora")}
    inject(module, targets, rank, alpha, 0.05, **variant)
    randomize_lora(module, values.get("seed", 1), values.get("std", 0.1))
    settings = adapter_format.AdapterConfig(str(base), rank, alpha, 0.05, tuple(targets), **variant)
    adapter_format.save(folder, module, settings, {"base_fingerprint": identity, "system_prompt": prompt})


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
