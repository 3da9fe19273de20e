"""What adapters promise, on a real Qwen of half a billion parameters: MINILORA_REAL_MODEL names its folder.

Run by hand (`pytest -m real tests/test_real.py -s`): minutes, and up to 6 GB. Figures are printed.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minilora.config import resolve
from minilora.data.formats import Turn
from minilora.inference.generate import Sampling, answer, load_chat_model
from minilora.inference.multi_adapter import load_several
from minilora.loop import train
from minilora.models.probe import probe_logits
from minilora.utils.device import memory_bytes

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]

DATA = Path(__file__).parent.parent / "data"
GREEDY = Sampling(max_new_tokens=24)
ASKED = [
    "你是谁？",
    "Who are you?",
    "1 + 1 = ?",
    "Name three colours.",
    "写一句关于春天的话。",
    "Translate to English: 早上好。",
    "What is the capital of France, and what is it known for? Answer in one sentence.",
    "把“我喜欢读书”翻译成英文。",
    "Write a Python function that adds two numbers.",
    "水的沸点是多少？",
    "Say hello.",
    "列出两种水果。",
    "Why is the sky blue? Explain it to a child, in two short sentences, without any formula.",
    "“快”的反义词是什么？",
    "What comes after Monday?",
    "用一句话介绍北京。",
    "How many legs has a spider?",
    "太阳从哪边升起？",
    "Give me a synonym of 'happy'.",
    "什么是机器学习？",
]


@pytest.fixture(scope="module", autouse=True)
def _all_threads():
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base() -> str:
    return os.environ["MINILORA_REAL_MODEL"]


def trained(base: str, folder: Path, **keys) -> Path:
    """An adapter of two short steps at a high rate: far enough from the base to answer differently."""
    short = {"max_steps": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 2e-3}
    flags = {"model": base, "train_file": str(DATA / "train.jsonl"), "eval_file": None, "output_dir": str(folder)}
    train(resolve("lora", flags | short | keys))
    return folder / "adapter"


@pytest.fixture(scope="module")
def two(base, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("two")
    other = {"seed": 7, "lora_r": 4, "target_modules": "attn"}
    return [trained(base, folder / "one"), trained(base, folder / "other", **other)]


def conversations(count: int) -> list[list[Turn]]:
    """Prompts of unequal length."""
    texts = (ASKED + [f"{text} ({text})" for text in ASKED])[:count]
    return [[Turn("user", text)] for text in texts]


def test_merged_answers_as_the_adapter_does(base, two, tmp_path):
    """20 greedy answers in fp32; the merged folder is read by plain transformers."""
    from transformers import AutoModelForCausalLM

    merged = tmp_path / "merged"
    command = [sys.executable, "-m", "minilora", "merge", "--adapter", str(two[0]), "--output_dir", str(merged)]
    done = subprocess.run([*command, "--dtype", "float32"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    chat_model = load_chat_model(base, str(two[0]), "float32", "cpu")
    expected = [answer(chat_model, [each], GREEDY)[0] for each in conversations(20)]
    plain = load_chat_model(base, None, "float32", "cpu")
    without = [answer(plain, [each], GREEDY)[0] for each in conversations(20)]
    plain.model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    plain.system_prompt = chat_model.system_prompt
    found = [answer(plain, [each], GREEDY)[0] for each in conversations(20)]
    print(f"{sum(a == b for a, b in zip(found, expected, strict=True))} of 20 agree")
    assert found == expected != without


def test_merging_is_lean(base, two, tmp_path):
    """bf16 in, bf16 out: the whole process's peak against the size of the weights."""
    program = (  # not ru_maxrss, which a child has from its parent
        "import sys; from minilora.cli import main; code = main(sys.argv[1:]); "
        "print(*(line for line in open('/proc/self/status') if 'VmHWM' in line)); raise SystemExit(code)"
    )
    command = [sys.executable, "-c", program, "merge", "--adapter", str(two[0]), "--output_dir", str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-2]) * 1024
    size = sum(file.stat().st_size for file in Path(base).glob("*.safetensors"))
    print(f"peak {peak / 2**30:.2f} GiB, {peak / size:.2f} x the weights")
    assert peak <= 1.3 * size


def test_batched_is_as_one_by_one(base, two):
    chat_model = load_chat_model(base, str(two[0]), "float32", "cpu")
    asked = conversations(32)
    single = [answer(chat_model, [each], GREEDY)[0] for each in asked]
    batched = [text for start in range(0, 32, 8) for text in answer(chat_model, asked[start : start + 8], GREEDY)]
    assert batched == single


def test_switching_a_hundred_times(base, two):
    """The same logits each time, and no memory more."""
    chat_model, adapters = load_several({"one": two[0], "other": two[1]}, base, "bfloat16", "cpu")
    ids = chat_model.markup.prompt_ids([Turn("user", ASKED[0])], chat_model.system_prompt)
    first = {}
    for name in ("one", "other", None):
        adapters.use(name)
        first[name] = probe_logits(chat_model.model, ids)
    assert not torch.equal(first["one"], first["other"])
    assert not torch.equal(first["one"], first[None])
    before = memory_bytes(torch.device("cpu"))
    for turn in range(100):
        name = ("one", "other")[turn % 2]
        adapters.use(name)
        assert torch.equal(probe_logits(chat_model.model, ids), first[name])
    grown = memory_bytes(torch.device("cpu")) - before
    print(f"grown by {grown / 2**20:.1f} MiB")
    assert grown < 32 * 2**20


def test_answers_no_slower_than_through_peft(base, two):
    """Medians of 32 greedy tokens, taken in turn; CPU seconds, which other programs disturb less."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ours = load_chat_model(base, str(two[0]), "bfloat16", "cpu")
    peers = load_chat_model(base, None, "bfloat16", "cpu")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    peers.model = PeftModel.from_pretrained(model, two[0]).eval()
    times: dict[str, list[float]] = {"ours": [], "peft": []}
    sampling = Sampling(max_new_tokens=32)
    for _ in range(6):
        for name, chat_model in (("ours", ours), ("peft", peers)):
            started = time.process_time()
            answer(chat_model, conversations(1), sampling)
            times[name].append(time.process_time() - started)
    medians = {name: sorted(each[1:])[2] for name, each in times.items()}
    print({name: f"{seconds:.2f} s" for name, seconds in medians.items()})
    assert medians["ours"] <= 1.05 * medians["peft"]
