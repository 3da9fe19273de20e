"""The base's fingerprint is that of 0.1, whichever spelling config.json has and whatever transformers makes of it."""

import json

import pytest
import torch
from conftest import CPU

from minilora import demo
from minilora.models import load as loading
from minilora.models.fingerprint import completed, fingerprint, fingerprint_of

TENSORS = [
    ("model.embed_tokens.weight", torch.arange(600.0).reshape(30, 20) / 7),
    ("lm_head.weight", torch.ones(30, 20)),
    ("model.norm.weight", torch.linspace(0, 1, 20)),
]
CONFIG = {
    "max_position_embeddings": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
# (model_type, rotary settings in config.json, what 0.1 computed for TENSORS with transformers 5.17 and 5.23)
BY_0_1 = [
    ("qwen2", {"rope_theta": 1e6}, "25adfc2d364c4c2baf0b689606f9a1ece8bd6707d63f31fc14aac13f1460d39a"),
    (
        "qwen2",
        {"rope_theta": 1e6, "rope_scaling": None},
        "25adfc2d364c4c2baf0b689606f9a1ece8bd6707d63f31fc14aac13f1460d39a",
    ),
    ("qwen2", {"rope_theta": 1000000}, "03a7273edc6676849f9f0c4850e39f926b29ccd9a2369e9be17fa8e19a3b4f6b"),
    (
        "qwen2",
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        "25adfc2d364c4c2baf0b689606f9a1ece8bd6707d63f31fc14aac13f1460d39a",
    ),
    (
        "qwen2",
        {"rope_theta": 1e6, "rope_scaling": YARN},
        "84b408bd345d0e311571e3a72c6c22c7771db7e19b7599e77c9e46187dd326ee",
    ),
    (
        "qwen2",
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "facda9c0f846980ec2d8fa05f15d0d80ecd31c0563a2be4c6ec658739d68a845",
    ),
    ("qwen2", {}, "480d2a24a51a1a66dd9e67100ae83f9fc075c4cf910665aa13dc45d8c3136c66"),
    ("qwen3", {"rope_theta": 1e6}, "23dc48730d26be243bbe0b290cb9a0fc95df9709fae7b1565bf60c491f6ebd99"),
    ("qwen3", {"rope_theta": 1000000}, "c82b0b5bb254d86086fa91bfc876618da2b3c0605647a1df3130203275b9b921"),
]
DEMO_BY_0_1 = "f8aaf7c64301e7c9da5b6a5e7a60797d169f3183ee934913cc78094e167538ac"


def another_transformers(monkeypatch):
    """A release that normalises otherwise: each rotary setting gets a key more, and its theta another name."""
    from transformers import Qwen2Config

    to_dict = Qwen2Config.to_dict

    def renamed(self):
        found = to_dict(self)
        return found | {"rope_parameters": {"base": found["rope_parameters"]["rope_theta"], "attention_factor": None}}

    monkeypatch.setattr(Qwen2Config, "to_dict", renamed)


@pytest.mark.parametrize(("model_type", "rope", "expected"), BY_0_1)
def test_it_is_the_fingerprint_of_0_1(model_type, rope, expected, tmp_path):
    from transformers import AutoConfig

    raw = {"model_type": model_type} | CONFIG | rope
    assert fingerprint_of(raw, TENSORS) == expected
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert loading.folder_fingerprint(tmp_path, TENSORS) == expected
    normalised = AutoConfig.from_pretrained(tmp_path).to_dict()  # what a model carries that others loaded
    assert fingerprint_of(normalised, TENSORS) == expected


@pytest.mark.parametrize("key", ["num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "hidden_act"])
def test_a_key_that_is_left_out_means_the_default(key, tmp_path):
    from transformers import AutoConfig

    raw = {"model_type": "llama", **CONFIG, "num_key_value_heads": 4, "tie_word_embeddings": False}
    short = {name: value for name, value in raw.items() if name != key}
    (tmp_path / "config.json").write_text(json.dumps(short))
    normalised = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert fingerprint_of(completed(short, normalised), TENSORS) == fingerprint_of(raw, TENSORS)


def test_another_transformers_changes_nothing(monkeypatch, tmp_path):
    assert fingerprint(loading.load_model(demo.DEMO_DIR, torch.float32, CPU)) == DEMO_BY_0_1
    another_transformers(monkeypatch)
    assert fingerprint(loading.load_model(demo.DEMO_DIR, torch.float32, CPU)) == DEMO_BY_0_1
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"} | CONFIG | {"rope_theta": 1e6}))
    assert loading.folder_fingerprint(tmp_path, TENSORS) == BY_0_1[0][2]
