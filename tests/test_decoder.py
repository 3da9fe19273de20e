"""The decoder against transformers' own forward: logits and all gradients, for every family, method and variant."""

import copy
import dataclasses
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import random_examples, relative_error
from torch.func import functional_call

from minilora import decoder as decoding
from minilora import lora
from minilora.batching import ROWS_MULTIPLE, collate
from minilora.config import TARGET_GROUPS, TrainConfig
from minilora.decoder import recomputed
from minilora.lora import lora_layers
from minilora.models.families import FAMILIES, decoder_of
from minilora.models.trainable import make_trainable
from minilora.objectives.sft import SFT

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
KINDS = {  # name: (model type, what its config has beside SHAPE)
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2.5": ("qwen2", {"tie_word_embeddings": False, "rope_theta": 1e6}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 12, "rope_theta": 1e6}),
    "llama": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 12}),
}
METHODS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa, dora": {"init_lora_weights": "pissa", "use_dora": True},
    "full": {"method": "full"},
}
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5}


def base(name, dtype=torch.float64):
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, keys = KINDS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **keys}))
    for name, param in model.named_parameters():
        torch.nn.init.normal_(param, 1.0 if "norm" in name else 0.0, 0.1)
    return model.to(dtype).eval()


def examples_of_a_step():
    """Rows of several lengths with a common beginning, which `collate` computes once."""
    examples = random_examples([17, 9, 30, 24], vocabulary=SHAPE["vocab_size"])
    prefix = torch.arange(5).numpy() + 7
    for example in examples:
        example.input_ids[:5], example.labels[:5] = prefix, -100
    return examples


def trained_model(name, method, dtype):
    """A trainable model whose adapters are no longer at their start, dropout off."""
    model = base(name, dtype)
    keys = {"lora_r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": TARGET_GROUPS["all"]}
    make_trainable(model, TrainConfig(**(keys | METHODS[method] if method != "full" else METHODS[method])))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for param in (layer.lora_A, layer.lora_B):
                param.add_(0.1 * torch.randn(param.shape, generator=generator, dtype=torch.float64).to(dtype))
            if layer.lora_magnitude_vector is not None:
                layer.lora_magnitude_vector.mul_(1.1)
    return model


def merged_weights(model):
    """(name of a base weight, its value as a plain formula of the parameters, in fp64 with gradients)"""
    leaves = {
        name: param.detach().double().requires_grad_(param.requires_grad) for name, param in model.named_parameters()
    }
    weights = {name.replace("base_layer.", ""): leaf for name, leaf in leaves.items() if "lora_" not in name}
    for name, layer in lora_layers(model).items():
        W, A, B = (leaves[f"{name}.{part}"] for part in ("base_layer.weight", "lora_A", "lora_B"))
        update = B @ A
        if layer.lora_A0 is not None:
            update = update - layer.lora_B0.double() @ layer.lora_A0.double()
        merged = W + layer.scale * update
        if layer.lora_magnitude_vector is not None:
            merged = (leaves[f"{name}.lora_magnitude_vector"] / merged.detach().norm(dim=1))[:, None] * merged
        weights[f"{name}.weight"] = merged
    return leaves, weights


def norm_in_fp64(self, hidden_states):
    """transformers' RMSNorm computes in fp32, whatever the model is in."""
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


def oracle(name, model, examples):
    """(logits at the supervised positions, summed nats, gradients by name) by transformers' forward, row by row."""
    plain = base(name)
    leaves, weights = merged_weights(model)
    logits, total = [], torch.zeros((), dtype=torch.float64)
    with mock.patch.object(type(plain.model.norm), "forward", norm_in_fp64):
        for example in examples:
            ids, labels = (torch.from_numpy(array).long() for array in (example.input_ids, example.labels))
            keys = {"input_ids": ids[None, :-1], "use_cache": False}
            out = functional_call(plain, weights, (), keys, tie_weights=True).logits[0]
            logits.append(out[labels[1:] != -100].detach())
            total = total + F.cross_entropy(out, labels[1:], reduction="sum")
    total.backward()
    return torch.cat(logits), total.detach(), {key: leaf.grad for key, leaf in leaves.items() if leaf.requires_grad}


@pytest.fixture(scope="module")
def expected():
    """A function: the oracle of a family and a method, computed once."""
    made = {}

    def of(name, method, dtype):
        key = (name, method, dtype)
        if key not in made:
            made[key] = oracle(name, trained_model(name, method, dtype), examples_of_a_step())
        return made[key]

    return of


@pytest.mark.parametrize("dtype", BOUNDS, ids=["fp64", "fp32"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", KINDS)
def test_logits_and_gradients_are_those_of_transformers(name, method, dtype, expected):
    """Packed, with a shared prefix, with and without checkpointing."""
    logits, nats, gradients = expected(name, method, dtype)
    model = trained_model(name, method, dtype).train()
    batch = collate(examples_of_a_step(), share_prefix=True)
    assert batch.layout.prefix == 5
    for checkpointing in (False, True):
        decoder = decoder_of(model, dtype, "cpu", checkpointing=checkpointing)
        hidden = decoder(batch)
        assert relative_error(hidden @ decoder.head_weight.T, logits) < BOUNDS[dtype]
        model.zero_grad()
        loss = SFT().loss(decoder, batch)
        loss.backward()
        assert relative_error(loss, nats) < BOUNDS[dtype]
        found = {key: param.grad for key, param in model.named_parameters() if param.requires_grad}
        assert found.keys() == gradients.keys()
        for key, gradient in found.items():
            assert relative_error(gradient, gradients[key]) < BOUNDS[dtype], key


def test_every_family_of_the_table_is_tested():
    assert {kind for kind, _ in KINDS.values()} == set(FAMILIES)


def test_products_in_fp32_from_weights_in_bf16():
    """The weights stay in bf16; the step is that of the same weights converted to fp32."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        model = base("qwen2.5", torch.bfloat16).to(dtype)
        lora.inject(model, TARGET_GROUPS["attn"], rank=2, alpha=4)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, 0, 0.1)
        decoder = decoder_of(model.train(), torch.float32, "cpu")
        hidden = decoder(collate(examples_of_a_step()))
        assert hidden.dtype == torch.float32
        loss = SFT().loss(decoder, collate(examples_of_a_step()))
        loss.backward()
        results.append([loss, *(layer.lora_A.grad for layer in lora_layers(model).values())])
        torch.manual_seed(0)
    for found, wanted in zip(*results, strict=True):
        assert relative_error(found, wanted) < 1e-6


def test_only_supervised_rows_go_through_the_end_of_the_last_layer():
    model = base("qwen2.5", torch.float32)
    batch = collate(examples_of_a_step())
    rows = []
    decoder = decoder_of(model, torch.float32, "cpu")
    with mock.patch.object(decoding, "linear", lambda x, *rest: rows.append(len(x)) or lora.linear(x, *rest)):
        decoder(batch)
    tokens, supervised = batch.input_ids.numel(), len(batch.rows)
    padded = supervised + -supervised % ROWS_MULTIPLE
    assert padded < tokens
    assert rows == [tokens, tokens] * 2 + [padded, padded]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_supervised_row_is_no_loss_and_no_gradient(checkpointing):
    model = trained_model("qwen3", "lora", torch.float32).train()
    batch = collate(examples_of_a_step()).unsupervised()
    loss = SFT().loss(decoder_of(model, torch.float32, "cpu", checkpointing=checkpointing), batch)
    loss.backward()
    assert loss == 0
    assert all(not param.grad.any() for param in model.parameters() if param.requires_grad)


def test_checkpointing_keeps_one_tensor_a_layer():
    model = base("qwen2.5", torch.float32)
    lora.inject(model, TARGET_GROUPS["attn"], rank=2, alpha=4)
    batch = collate(examples_of_a_step())
    decoder = dataclasses.replace(decoder_of(model.train(), torch.float32, "cpu"), run_layer=recomputed())
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x, lambda x: x):
        decoder(batch)
    tokens = batch.input_ids.numel()
    assert shapes.count((tokens, SHAPE["hidden_size"])) <= 3 + 1, "an input a layer, and one of the last norm"
    assert (tokens, SHAPE["intermediate_size"]) not in shapes


def test_no_forward_of_transformers_runs_and_none_is_changed():
    """The modules only hold weights: the decoder calls none of them but the embedding and the table of angles."""
    model = base("qwen3", torch.float32)
    lora.inject(model, TARGET_GROUPS["attn"], rank=2, alpha=4)
    before = {name: vars(module).get("forward") for name, module in model.named_modules()}
    called = set()
    handles = [
        module.register_forward_hook(lambda module, *_: called.add(type(module).__name__)) for module in model.modules()
    ]
    decoder_of(model.train(), torch.float32, "cpu")(collate(examples_of_a_step()))
    for handle in handles:
        handle.remove()
    assert called == {"Embedding", "Qwen3RotaryEmbedding"}
    assert {name: vars(module).get("forward") for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == copy.deepcopy(model.config)._attn_implementation == "sdpa"
