"""Other models than Qwen2: what has its shape is trained exactly, whatever has not is refused with the reason."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, randomize_lora, relative_error

from minilora import demo, loop, lora
from minilora.config import TARGET_GROUPS
from minilora.data.dataset import IGNORE
from minilora.data.formats import Turn
from minilora.errors import ModelError
from minilora.inference import generate
from minilora.inference.generate import Sampling, load_chat_model
from minilora.models import load as loading
from minilora.training.setup import prepare
from minilora.training.signals import StopRequest

pytestmark = pytest.mark.usefixtures("bare_run")
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

# name: (model type, what its config has beside SHAPE)
FAMILIES = {
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2.5": ("qwen2", {"tie_word_embeddings": False, "rope_theta": 1e6, "rms_norm_eps": 1e-6}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 24, "rope_theta": 1e6}),
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama 3": ("llama", {"tie_word_embeddings": True, "head_dim": 8, "attention_bias": True, "rope_theta": 5e5}),
    "mistral": ("mistral", {"sliding_window": None}),
}


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """A function: the folder of a tiny random model of a type, with the demo's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = {}

    def folder_of(kind, **keys):
        key = json.dumps([kind, keys])
        if key not in made:
            folder = made[key] = tmp_path_factory.mktemp("family")
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(demo.DEMO_DIR / name, folder)
            tokenizer = loading.load_tokenizer(folder)
            ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
            config = AutoConfig.for_model(kind, **{**SHAPE, "vocab_size": len(tokenizer), **ids, **keys})
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                tiny = AutoModelForCausalLM.from_config(config)
                for name, param in tiny.named_parameters():
                    torch.nn.init.normal_(param, 1.0 if "norm" in name else 0.0, 0.1)
            tiny.save_pretrained(folder)
        return made[key]

    return folder_of


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_the_plain_formula(name, family, make_config, monkeypatch):
    """Packed, with a shared prefix and the hand-written parts: against transformers' own logits, one row at a time."""
    kind, keys = FAMILIES[name]
    folder = family(kind, **keys)
    with StopRequest() as stop, ExitStack() as held:
        run = prepare(make_config(model=str(folder), target_modules=TARGET_GROUPS["all"], lora_r=4), stop, held)
    randomize_lora(run.model, std=0.05)
    examples = [run.data.train[i] for i in run.schedule.examples_of(0)]
    supervised = sum(int((example.labels[1:] != IGNORE).sum()) for example in examples)
    loss = loop.gradients(run, examples, supervised)

    oracle = loading.load_model(folder, torch.float32, CPU)
    lora.inject(oracle, TARGET_GROUPS["all"], rank=4, alpha=32)
    randomize_lora(oracle, std=0.05)
    monkeypatch.setattr(lora, "lora_linear", lora.plain_lora_linear)
    oracle, total = oracle.double(), torch.zeros((), dtype=torch.float64)
    for example in examples:
        ids, labels = (torch.from_numpy(array).long() for array in (example.input_ids, example.labels))
        total = total + F.cross_entropy(oracle(input_ids=ids[None]).logits[0, :-1], labels[1:], reduction="sum")
    (total / supervised).backward()
    assert float(loss) == pytest.approx(float(total.detach()) / supervised, rel=1e-5)
    found = {name: param.grad for name, param in run.model.named_parameters() if param.requires_grad}
    assert len(found) == 2 * 7 * 2
    for key, param in oracle.named_parameters():
        if param.requires_grad:
            assert relative_error(found[key], param.grad) < 2e-5, key


@pytest.mark.parametrize(
    "name", ["qwen2.5", "qwen3", "llama", "mistral"]
)  # Qwen2: tests/test_loop.py, adapters/test_format.py
def test_it_trains_loads_in_peft_and_answers(name, family, make_config):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    kind, keys = FAMILIES[name]
    config = make_config(model=str(family(kind, **keys)), target_modules=TARGET_GROUPS["all"], num_train_epochs=2)
    summary = loop.train(config)  # loads what it has saved into a fresh base and compares
    assert summary.last_loss < summary.first_loss - 0.5
    folder = Path(config.output_dir) / "adapter"
    chat_model = load_chat_model(None, str(folder), "float32", "cpu")
    base = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(folder)).eval()
    ids = torch.tensor([chat_model.markup.prompt_ids([Turn("user", "red stone 大")], chat_model.system_prompt)])
    with torch.no_grad():
        expected, found = theirs(input_ids=ids).logits, chat_model.model(input_ids=ids).logits
        answered = theirs.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    (text,) = generate.answer(chat_model, [[Turn("user", "red stone 大")]], Sampling(max_new_tokens=8))
    assert text == chat_model.tokenizer.decode(answered, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama"])
def test_every_weight_is_trained_in_bf16(name, family, make_config):
    """Qwen3's norms of q and k, with weights in fp32, once handed attention a q and a k that v's type did not match."""
    kind, keys = FAMILIES[name]
    config = make_config(model=str(family(kind, **keys)), method="full", dtype="bfloat16", learning_rate=1e-3)
    summary = loop.train(config)
    assert summary.last_loss < summary.first_loss


# name: (model type, its config, what the refusal says)
REFUSED = {
    "a sliding window": ("mistral", {"sliding_window": 64}, "its sliding_window of 64 tokens is not supported"),
    "sliding layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
        "layers of type sliding_attention are not supported",
    ),
    "all layers sliding": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0},
        "layers of type sliding_attention are not supported",
    ),
    "attention dropout": ("qwen2", {"attention_dropout": 0.1}, "attention_dropout is set"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    "scaled logits": ("granite", {"logits_scaling": 8.0}, "not supported: minilora trains Qwen2, Qwen2.5 and"),
    "an attention of its own": ("bloom", {"n_layer": 2, "n_head": 4}, "is not supported: minilora trains"),
    "hybrid": (
        "qwen3_next",
        {"layer_types": ["linear_attention", "full_attention"], "num_experts": 2, "num_experts_per_tok": 1},
        "is not supported: minilora trains",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_trained_as_something_else_is_refused_by_its_reason(name, family):
    kind, keys, message = REFUSED[name]
    with pytest.raises(ModelError) as refused:
        loading.load_model(family(kind, **keys), torch.float32, CPU)
    assert f"model type {kind}" in str(refused.value)
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_type_that_transformers_does_not_know_is_refused_by_name(family, tmp_path):
    """transformers once spoke first: it advised a newer version of itself."""
    folder = shutil.copytree(family("qwen2"), tmp_path / "odd")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"model_type": "nonsense"}))
    with pytest.raises(ModelError, match="model type nonsense is not supported: minilora trains Qwen2"):
        loading.load_model(folder, torch.float32, CPU)
