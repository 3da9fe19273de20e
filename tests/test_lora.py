"""LoRALinear is W0 + scale B A: against dense maths, the plain formula and PEFT; and what `inject` does to a model."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import random_examples, randomize_lora, relative_error
from torch import nn

from minilora import lora
from minilora.errors import ConfigError
from minilora.kernels import Policy
from minilora.lora import LoRALinear, disabled, inject, lora_layers, lora_linear, plain_lora_linear, project

IN, OUT, RANK = 12, 7, 3
CPU = Policy("cpu")


def operands(seed=0, dtype=torch.float64, bias=True, x_grad=True, shape=(2, 5), features=(IN, OUT, RANK)):
    """x, weight, bias, A, B; x, A and B require gradients, the base does not."""
    generator = torch.Generator().manual_seed(seed)
    size_in, size_out, rank = features

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    x = draw(*shape, size_in).requires_grad_(x_grad)
    weight, vector = draw(size_out, size_in), draw(size_out) if bias else None
    return x, weight, vector, draw(rank, size_in).requires_grad_(), draw(size_out, rank).requires_grad_()


# ---------------------------------------------------------------------------------------- the maths


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (4,), (2, 5)])
def test_layer_is_a_dense_layer_with_the_sum_as_its_weight(rslora, bias, shape):
    x, weight, vector, A, B = operands(bias=bias, shape=shape)
    base = nn.Linear(IN, OUT, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        base.weight.copy_(weight)
        if bias:
            base.bias.copy_(vector)
    layer = LoRALinear(base, RANK, alpha=5, rslora=rslora)
    with torch.no_grad():
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
    scale = 5 / math.sqrt(RANK) if rslora else 5 / RANK
    dense = weight + scale * B @ A
    expected = F.linear(x, dense, vector)
    dy = torch.randn(expected.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, (x, A, B), dy)

    y = layer(x)
    found = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), dy)

    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    torch.testing.assert_close(weight + layer.delta(), dense, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("x_grad", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias, x_grad, dropout):
    x, weight, vector, A, B = operands(bias=bias, x_grad=x_grad)

    def function(x, A, B):
        torch.manual_seed(3)  # the same mask at every evaluation
        return lora_linear(x, weight, vector, A, B, 1.7, dropout)

    assert torch.autograd.gradcheck(function, (x, A, B))


def dropout_of(x, dropout, seed):
    """dropout(x) as lora_linear sees it: its output when A and B are identities and the base is zero."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    torch.manual_seed(seed)
    with torch.no_grad():
        return lora_linear(x, torch.zeros_like(eye), None, eye, eye, 1.0, dropout)


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.9])
def test_fused_dropout_is_the_plain_one_with_the_same_mask(dropout, monkeypatch):
    x, weight, vector, A, B = operands(shape=(3, 20))
    factor = dropout_of(torch.ones_like(x), dropout, seed=11)  # 0 or 1 / (1 - dropout) for each element
    assert ((factor == 0) | (factor - 1 / (1 - dropout)).abs().lt(1e-12)).all()
    assert (factor == 0).any()
    assert (factor != 0).any()
    monkeypatch.setattr(F, "dropout", lambda x, p: x * factor)
    dy = torch.randn(3, 20, OUT, dtype=torch.float64)
    expected = plain_lora_linear(x, weight, vector, A, B, 0.8, dropout)
    wanted = torch.autograd.grad(expected, (x, A, B), dy)

    torch.manual_seed(11)
    y = lora_linear(x, weight, vector, A, B, 0.8, dropout)
    found = torch.autograd.grad(y, (x, A, B), dy)

    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.05, 0.3, 0.9])
def test_every_element_is_dropped_as_often_as_any_other(dropout):
    """Five standard deviations for each element of a small x, the first and the last among them, and for the pairs."""
    ones, draws = torch.ones(2, 5), 1500
    dropped = torch.stack([dropout_of(ones, dropout, seed) == 0 for seed in range(draws)]).view(draws, -1).double()
    share = dropped.mean(0)
    assert (share - dropout).abs().max() < 5 * math.sqrt(dropout * (1 - dropout) / draws)
    deviation = dropped - dropout
    covariance = deviation.T @ deviation / draws
    covariance.fill_diagonal_(0)
    assert covariance.abs().max() < 5 * dropout * (1 - dropout) / math.sqrt(draws)


def test_dropout_belongs_to_training_and_to_the_low_rank_path_only():
    layer = LoRALinear(nn.Linear(IN, OUT), RANK, alpha=5, dropout=0.5)
    x = torch.randn(50, IN)
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=0)  # B is 0: the base sees all of x
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), F.linear(x, layer.base_layer.weight + layer.delta(), layer.base_layer.bias))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_strided_inputs_and_gradients(dropout):
    """A transposed x once broke the dropout, which went over a copy with x's strides by .view(-1)."""
    x, weight, vector, A, B = operands(shape=(9,))
    strided = x.detach().T.contiguous().T.requires_grad_()
    assert not strided.is_contiguous()
    results = []
    for each in (x, strided):
        torch.manual_seed(0)
        y = lora_linear(each, weight, vector, A, B, 1.5, dropout)
        results.append((y, *torch.autograd.grad(y.sum(), (each, A, B))))  # dy of a sum has stride 0
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_bf16_is_as_exact_as_the_plain_formula_under_autocast():
    features = (192, 160, 8)
    x, weight, vector, A, B = operands(shape=(128,), features=features)
    x, weight, vector = (t.detach().bfloat16() for t in (x, weight, vector))
    A, B = (t.detach().float() for t in (A, B))
    dy = torch.randn(128, 160).bfloat16()

    def results(function, cast, autocast):
        leaves = [t.to(cast).requires_grad_() if cast else t.clone().requires_grad_() for t in (x, A, B)]
        frozen = [t.to(cast) if cast else t for t in (weight, vector)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(leaves[0], *frozen, leaves[1], leaves[2], 0.5, 0.0)
        assert autocast is False or y.dtype == torch.bfloat16
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    reference = results(plain_lora_linear, torch.float64, autocast=False)
    plain = results(plain_lora_linear, None, autocast=True)
    fused = results(lora_linear, None, autocast=True)
    for name, exact, theirs, ours in zip(("y", "dx", "dA", "dB"), reference, plain, fused, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, exact) <= 1.5 * relative_error(theirs, exact), name


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_backward_keeps_no_wide_tensor_but_x(dropout):
    """No fp32 copy of x, no second output: what is saved beyond x, weights and mask has the width of the rank."""
    features, tokens = (64, 48, 4), 100
    x, weight, vector, A, B = operands(shape=(tokens,), features=features)
    x = x.detach().bfloat16().requires_grad_()
    A, B = A.detach().float().requires_grad_(), B.detach().float().requires_grad_()
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear(x, weight.bfloat16(), vector.bfloat16(), A, B, 2.0, dropout)
    known = (x.data_ptr(), A.data_ptr(), B.data_ptr())
    extra = [t for t in saved if t.data_ptr() not in known and t.shape != weight.shape]
    rank_wide = [t for t in extra if t.is_floating_point()]
    assert [tuple(t.shape) for t in rank_wide] == [(tokens, 4)]
    assert {t.dtype for t in rank_wide} == {torch.bfloat16}
    assert sum(t.numel() * t.element_size() for t in extra if not t.is_floating_point()) <= x.numel()  # the mask


@pytest.mark.parametrize("rslora", [False, True])
def test_a_model_equals_pefts_forward_and_gradients(load_tiny, rslora):
    from peft import LoraConfig, get_peft_model

    ours, theirs = load_tiny(torch.float64), load_tiny(torch.float64)
    targets = ["q_proj", "v_proj", "down_proj"]
    inject(ours, targets, rank=4, alpha=10, rslora=rslora)
    randomize_lora(ours)
    settings = LoraConfig(r=4, lora_alpha=10, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM")
    peft_model = get_peft_model(theirs, settings)
    layers = {}
    for name, layer in lora_layers(ours).items():
        layers[name] = peft_model.base_model.model.get_submodule(name)
        with torch.no_grad():
            layers[name].lora_A["default"].weight.copy_(layer.lora_A)
            layers[name].lora_B["default"].weight.copy_(layer.lora_B)
    ids = torch.from_numpy(random_examples([30])[0].input_ids[None]).long()
    logits, expected = ours(ids).logits, peft_model(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    F.cross_entropy(expected[0, :-1], ids[0, 1:]).backward()
    for name, layer in lora_layers(ours).items():
        assert relative_error(layer.lora_A.grad, layers[name].lora_A["default"].weight.grad) < 1e-6, name
        assert relative_error(layer.lora_B.grad, layers[name].lora_B["default"].weight.grad) < 1e-6, name


# ---------------------------------------------------------------------------------------- inject


def named_model():
    """Linear layers whose names contain one another."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "xq_proj", "q_proj2", "lm_head")})
    model["block"] = nn.ModuleDict({"q_proj": nn.Linear(4, 6, bias=False), "norm": nn.LayerNorm(4)})
    return model


def test_targets_match_the_last_segment_exactly():
    model = named_model()
    assert inject(model, ["q_proj"], rank=2, alpha=2) == ["q_proj", "block.q_proj"]
    assert list(lora_layers(model)) == ["q_proj", "block.q_proj"]
    assert type(model["xq_proj"]) is type(model["q_proj2"]) is nn.Linear


@pytest.mark.parametrize("wrong", ["proj", "q_pro", "block", "norm", "block.q_proj", "Q_proj", ""])
def test_a_target_that_matches_nothing_is_refused_with_the_names_there_are(wrong):
    model = named_model()
    with pytest.raises(ConfigError) as error:
        inject(model, ["q_proj", wrong], rank=2, alpha=2)
    assert repr([wrong]) in str(error.value)
    assert str(error.value).endswith(
        "end in q_proj, xq_proj, q_proj2, lm_head"
    )  # no counts: see memory_estimate.LAYERS
    assert not lora_layers(model)


def test_A_depends_on_the_seed_alone(load_tiny):
    def drawn(seed, before):
        torch.manual_seed(before)
        torch.rand(before)
        model = load_tiny()
        state = torch.get_rng_state()
        inject(model, ["q_proj", "o_proj"], rank=4, alpha=8, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)  # and the draws after it do not depend on it
        return [layer.lora_A.detach() for layer in lora_layers(model).values()]

    one, same, other = drawn(7, before=1), drawn(7, before=5), drawn(8, before=1)
    assert all(map(torch.equal, one, same))
    assert not any(map(torch.equal, one, other))
    assert not torch.equal(one[0], one[1])
    for A in one:  # Kaiming-uniform with a = sqrt(5) is U(-1/sqrt(in), 1/sqrt(in))
        bound = 1 / math.sqrt(A.shape[1])
        assert 0.95 * bound < A.abs().max() <= bound
        assert abs(A.mean()) < 5 * bound / math.sqrt(3 * A.numel())


def test_training_starts_at_the_base_to_the_bit(load_tiny):
    ids = torch.from_numpy(random_examples([40])[0].input_ids[None]).long()
    base = load_tiny()
    before = base(ids).logits
    inject(base, ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"], rank=8, alpha=32, dropout=0.1)
    assert all(not layer.lora_B.any() for layer in lora_layers(base).values())
    assert torch.equal(base.eval()(ids).logits, before)
    assert torch.equal(base.train()(ids).logits, before)


def test_only_A_and_B_are_trained_and_they_are_fp32(load_tiny):
    model = load_tiny(torch.bfloat16).requires_grad_(True)
    sizes = {name: (m.in_features, m.out_features) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = inject(model, ["q_proj", "v_proj"], rank=5, alpha=5)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert set(trained) == {f"{name}.lora_{letter}" for name in chosen for letter in "AB"}
    assert {param.dtype for param in trained.values()} == {torch.float32}
    assert sum(p.numel() for p in trained.values()) == sum(5 * sum(sizes[name]) for name in chosen)
    assert len(chosen) == 2 * model.config.num_hidden_layers
    assert {layer.base_layer.weight.dtype for layer in lora_layers(model).values()} == {torch.bfloat16}


def test_disabled_is_the_base_and_ends(load_tiny):
    ids = torch.from_numpy(random_examples([20])[0].input_ids[None]).long()
    model = load_tiny()
    base = model(ids).logits
    inject(model, ["q_proj", "v_proj"], rank=4, alpha=8)
    randomize_lora(model)
    tuned = model(ids).logits
    assert not torch.equal(tuned, base)
    with disabled(model):
        assert torch.equal(model(ids).logits, base)
        with disabled(model):
            pass
        assert torch.equal(model(ids).logits, base)  # the inner one put back what it found
    assert torch.equal(model(ids).logits, tuned)
    with pytest.raises(ZeroDivisionError), disabled(model):
        raise ZeroDivisionError
    assert torch.equal(model(ids).logits, tuned)


def test_the_layer_says_what_it_is():
    layer = lora.LoRALinear(nn.Linear(4, 4), 2, 8, dropout=0.1)
    assert "rank=2" in repr(layer)
    assert "scale=4" in repr(layer)
    assert "dropout=0.1" in repr(layer)


def group(dropout=0.0, ranks=(3, 3), outs=(7, 4)):
    """Two LoRA layers in fp64 that read the same input, the second without a bias."""
    torch.manual_seed(5)
    layers = []
    for rank, out in zip(ranks, outs, strict=True):
        base = nn.Linear(IN, out, bias=out == outs[0], dtype=torch.float64)
        layer = LoRALinear(base, rank, alpha=2 * rank, dropout=dropout)
        nn.init.normal_(layer.lora_B)
        layers.append(layer)
    return layers


def test_layers_projected_together_are_each_what_it_is_alone():
    layers = group(ranks=(3, 5))
    x = torch.randn(2, 9, IN, dtype=torch.float64, requires_grad=True)
    dys = [torch.randn(2, 9, layer.base_layer.out_features, dtype=torch.float64) for layer in layers]
    weights = [weight for layer in layers for weight in (layer.lora_A, layer.lora_B)]
    together, alone = project(x, layers, CPU), [layer(x) for layer in layers]
    found, wanted = (torch.autograd.grad(ys, [x, *weights], dys) for ys in (together, alone))
    for ours, theirs in zip((*together, *found), (*alone, *wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("x_grad", [True, False])
def test_gradcheck_of_layers_projected_together(x_grad, dropout):
    layers = group(dropout)
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=x_grad)
    weights = [weight for layer in layers for weight in (layer.lora_A, layer.lora_B)]

    def function(x, *_):
        torch.manual_seed(3)  # the same mask at every evaluation
        return tuple(project(x, layers, CPU))

    assert torch.autograd.gradcheck(function, (x, *weights))


def test_layers_projected_together_share_one_mask_and_others_do_not():
    layers = group(dropout=0.5, outs=(IN, IN))
    eye = torch.eye(IN, dtype=torch.float64)
    for layer in layers:
        layer.lora_A, layer.lora_B = nn.Parameter(eye), nn.Parameter(eye)
        layer.base_layer.weight.zero_()
        layer.base_layer.bias = None
    x = torch.ones(20, IN, dtype=torch.float64)
    one, other = project(x, layers, CPU)
    assert torch.equal(one, other)
    assert (one == 0).any()
    layers[1].dropout = 0.25  # another kind: each by itself
    one, other = project(x, layers, CPU)
    assert not torch.equal(one == 0, other == 0)
    layers[0].enabled = False
    assert torch.equal(project(x, layers, CPU)[0], torch.zeros_like(x))
    assert torch.equal(project(x, [layers[0].base_layer, nn.Identity()], CPU)[1], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_answer_is_the_same_to_the_bit(dtype):
    layer = LoRALinear(nn.Linear(64, 48, dtype=dtype), RANK, alpha=5, dropout=0.5).eval()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 7, 64, dtype=dtype)
    with torch.no_grad():
        answer = layer(x)
    assert torch.equal(answer, layer(x))
    layer.train()
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x))  # dropout stays where training is
