"""token_nats against the plain formula and Hugging Face's own loss, and how much memory it never takes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Sizes, random_examples, relative_error

from minilora.batching import collate
from minilora.data.dataset import IGNORE
from minilora.loss import plain_nats, token_nats
from minilora.models.families import decoder_of

ROWS, HIDDEN, VOCABULARY = 11, 6, 37


def operands(rows=ROWS, hidden=HIDDEN, vocabulary=VOCABULARY, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return states, weight, torch.randint(vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize("chunk_rows", [1, 3, ROWS, ROWS + 1])
@pytest.mark.parametrize("trained", ["hidden", "weight", "both"])
@pytest.mark.parametrize(
    "factors",
    [lambda nats: nats.sum() / 7, lambda nats: nats @ torch.linspace(-1, 2, ROWS, dtype=nats.dtype)],
    ids=["one factor", "a factor a row"],
)
def test_loss_and_gradients_are_those_of_the_plain_formula(chunk_rows, trained, factors):
    hidden, weight, targets = operands()
    hidden.requires_grad_(trained != "weight")
    weight.requires_grad_(trained != "hidden")
    leaves = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    expected = plain_nats(hidden.double(), weight.double(), targets)
    wanted = torch.autograd.grad(factors(expected), leaves)

    nats = token_nats(hidden, weight, targets, chunk_rows=chunk_rows)
    found = torch.autograd.grad(factors(nats), leaves)

    # plain_nats takes its softmax in fp32, ours in fp64 where the operands are
    torch.testing.assert_close(nats, expected.double(), rtol=1e-6, atol=0)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk_rows", [3, ROWS + 1])
def test_gradcheck(chunk_rows):
    hidden, weight, targets = operands()
    assert torch.autograd.gradcheck(lambda h, w: token_nats(h, w, targets, chunk_rows=chunk_rows), (hidden, weight))


def test_chunks_do_not_change_the_sum():
    hidden, weight, targets = operands()
    exact = F.cross_entropy(hidden @ weight.T, targets, reduction="none")  # all of it in fp64
    for chunk_rows in (1, 2, 3, ROWS, ROWS + 1):
        found = token_nats(hidden, weight, targets, chunk_rows=chunk_rows)
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_huge_logits_stay_finite():
    hidden, weight, targets = operands(dtype=torch.float32)
    hidden = (hidden.detach() * 1e4).requires_grad_()
    nats = token_nats(hidden, weight, targets, chunk_rows=4)
    torch.testing.assert_close(nats, plain_nats(hidden, weight, targets), rtol=1e-6, atol=0)
    assert torch.isfinite(torch.autograd.grad(nats.sum(), hidden)[0]).all()


def test_no_rows_are_no_loss():
    hidden, weight, targets = operands(rows=0)
    nats = token_nats(hidden, weight, targets)
    nats.sum().backward()
    assert nats.shape == (0,)
    assert not weight.grad.any()


@pytest.mark.parametrize("chunk_rows", [1, 3, 17, 1000])
def test_equals_hugging_faces_loss_on_a_padded_batch(load_tiny, chunk_rows):
    """Theirs: padded rows, mask, labels, the mean over the supervised tokens. Ours: packed, the sum over them."""
    model = load_tiny()
    examples = random_examples([9, 31, 16])
    longest = max(len(example.input_ids) for example in examples)
    ids, labels, mask = np.zeros((3, longest)), np.full((3, longest), IGNORE), np.zeros((3, longest))
    for row, example in enumerate(examples):
        ids[row, : len(example.input_ids)], labels[row, : len(example.labels)] = example.input_ids, example.labels
        mask[row, : len(example.input_ids)] = 1
    ids, labels, mask = (torch.from_numpy(array.astype(np.int64)) for array in (ids, labels, mask))
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    batch = collate(examples)
    decoder = decoder_of(model, torch.float32, "cpu")
    nats = token_nats(decoder(batch), decoder.head_weight, batch.targets, chunk_rows=chunk_rows)
    torch.testing.assert_close(nats.mean(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("master", [torch.bfloat16, torch.float32])
def test_bf16_is_as_exact_as_the_plain_formula_under_autocast(master):
    """master: what the head is kept in, bf16 when it is frozen and fp32 when it is trained."""
    hidden, weight, targets = (t.detach() for t in operands(64, 48, 301))
    hidden, weight = hidden.bfloat16(), (weight / 4).to(master)

    def results(function, dtype, autocast):
        leaves = [t.to(dtype or t.dtype).clone().requires_grad_() for t in (hidden, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            nats = function(*leaves, targets).sum()
        return [nats, *torch.autograd.grad(nats / len(targets), leaves)]

    def exact(hidden, weight, targets):
        return F.cross_entropy(hidden @ weight.T, targets, reduction="none")

    reference = results(exact, torch.float64, False)
    plain, fused = results(plain_nats, None, True), results(token_nats, None, True)
    assert fused[0].dtype == torch.float32
    for name, truth, theirs, ours in zip(("loss", "d_hidden", "d_weight"), reference, plain, fused, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, truth) <= 1.5 * relative_error(theirs, truth) + 1e-7, name


def test_the_logits_of_all_rows_never_exist():
    rows, vocabulary, chunk_rows = 40, 500, 8
    hidden, weight, targets = operands(rows, 5, vocabulary, torch.float32)
    with Sizes() as plain:
        plain_nats(hidden, weight, targets).sum().backward()
    assert plain.largest >= rows * vocabulary  # what is looked for would be seen
    with Sizes() as chunked:
        token_nats(hidden, weight, targets, chunk_rows=chunk_rows).sum().backward()
    assert chunked.largest <= chunk_rows * vocabulary
    assert any(shape == (chunk_rows, vocabulary) for _, shape, _ in chunked.made)


def test_evaluation_computes_no_gradients():
    """With method full the head wants a gradient; each evaluation once computed it, chunk by chunk, for nothing."""
    hidden, weight, targets = operands(16, 5, 500, torch.float32)
    with Sizes() as seen, torch.no_grad():
        nats = token_nats(hidden, weight, targets, chunk_rows=8)
    torch.testing.assert_close(nats, plain_nats(hidden, weight, targets), rtol=1e-6, atol=0)
    made_there = [
        (name, shape) for name, shape, _ in seen.made if shape in ((500, 5), (16, 5)) and "detach" not in name
    ]
    assert not made_there
