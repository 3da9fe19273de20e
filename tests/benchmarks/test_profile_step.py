"""benchmarks/profile_step.py: its parts are the whole step, and its products are those that the formula counts."""

import pytest
from conftest import write_jsonl

from benchmarks import profile_step
from benchmarks.profile_step import HEAD, LAYERS, LORA, PARTS, prepared, profiled
from minilora import lora
from minilora.batching import ROWS_MULTIPLE
from minilora.decoder import Decoder


@pytest.mark.parametrize(
    "argv",
    [["--rows", "0"], ["--steps", "0"], ["--dtype", "float16"], ["--device", "cuda"], ["--model", "nowhere"]],
)
def test_bad_arguments_are_one_line(argv, capsys):
    with pytest.raises(SystemExit) as refused:
        profile_step.main(argv)
    assert refused.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def flops_of_frozen_products(config, tokens, rows):
    """(of the layers, of the head), forward and backward, of a micro-batch: by hand.

    The last layer's o_proj and MLP see only the supervised rows. No gradient goes to the embeddings, so the first
    layer's q, k and v have no product in the backward pass.
    """
    hidden, ffn, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    qkv = hidden * head_dim * (heads + 2 * config.num_key_value_heads)
    others = hidden * head_dim * heads + 3 * hidden * ffn
    layers = config.num_hidden_layers
    padded = rows + -rows % ROWS_MULTIPLE
    body = (2 * layers - 1) * qkv * tokens + 2 * others * ((layers - 1) * tokens + padded)
    return 2 * body, 2 * 2 * hidden * config.vocab_size * rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_parts_are_the_step_and_the_products_those_of_the_formula(dtype, tiny_folder, tmp_path, monkeypatch):
    batches = []
    original = Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, batch: batches.append(batch) or original(self, batch))
    keys = {"model": str(tiny_folder), "train_file": str(write_jsonl(tmp_path / "rows.jsonl", 8)), "device": "cpu"}
    functions = lora.zeroed, lora.zero_
    with prepared(keys | {"dtype": dtype, "max_tokens_per_micro_batch": 64, "lora_r": 3}, 8) as run:
        config = run.model.config
        profile_step.one_step(run)
        batches.clear()
        found = profiled(run, 1)
        alone = profile_step.alone(run, found.products[LAYERS], buffered=False)
    assert sum(found.seconds.values()) == pytest.approx(found.total_s, rel=1e-3)
    assert set(found.seconds) == set(PARTS)
    nothing = {part for part, seconds in found.seconds.items() if not seconds}
    assert nothing <= {"other products", "conversions of frozen weights"}
    assert len(batches) > 1
    counts = [(batch.input_ids.numel(), len(batch.rows)) for batch in batches]
    by_hand = [flops_of_frozen_products(config, *each) for each in counts]
    assert config.hidden_size in {tokens for tokens, _ in counts}  # then LoRA's dz^T x has the shapes of a weight
    assert (found.flops(LAYERS), found.flops(HEAD)) == tuple(map(sum, zip(*by_hand, strict=True)))
    assert 0 < found.flops(LORA) < found.flops(LAYERS)
    assert alone > 0
    assert (lora.zeroed, lora.zero_) == functions


def test_the_script_prints_and_writes_its_figures(tiny_folder, tmp_path, capsys):
    rows, out = write_jsonl(tmp_path / "rows.jsonl", 4), tmp_path / "profile.json"
    argv = ["--model", str(tiny_folder), "--train_file", str(rows), "--rows", "4", "--steps", "1", "--out", str(out)]
    assert profile_step.main(argv) == 0
    printed = capsys.readouterr().out
    assert f"| {LAYERS} | " in printed
    assert "| 100.0 % |" in printed
    assert out.is_file()
