"""`minilora inspect`: its probabilities are those of plain transformers, at the last position, over all tokens."""

import json

import pytest
import torch
from conftest import CPU, save_random_adapter
from pages import Page

from minilora import cli
from minilora.errors import DataError, DivergedError
from minilora.inference import generate
from minilora.models import load as loading
from minilora.tools import inspect as inspection
from minilora.tools.inspect import inspect, token_text

SEEDS_TEXT = "猴子喜欢吃香蕉，兔子喜欢吃"
SYSTEM = "Be brief."


@pytest.fixture(scope="module")
def tuned(tiny_folder, tmp_path_factory):
    """An adapter's folder, trained, as it were, under a system prompt of its own."""
    tiny = loading.load_model(tiny_folder, torch.float32, CPU)
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    save_random_adapter(tiny, folder, tiny_folder, ("q_proj", "v_proj", "up_proj"), prompt=SYSTEM)
    return folder


@pytest.fixture
def chat_model(tiny_folder):
    return generate.load_chat_model(str(tiny_folder), None, "float32", "cpu")


@torch.no_grad()
def directly(folder, ids, adapter_folder=None):
    """Probabilities of the next token by transformers (and PEFT) alone. (vocabulary,)"""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter_folder:
        from peft import PeftModel

        plain = PeftModel.from_pretrained(plain, str(adapter_folder)).eval()
    return torch.softmax(plain(torch.tensor([ids])).logits[0, -1], dim=-1)


def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# ---------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("raw", [True, False])
def test_probabilities_are_those_of_transformers_and_peft(raw, tiny_folder, tuned):
    """Over the whole vocabulary, base and adapter: another position, or fewer tokens, and they would differ."""
    tokenizer = tokenizer_of(tiny_folder)
    chat_model = generate.load_chat_model(None, str(tuned), "float32", "cpu")
    found = inspect(chat_model, SEEDS_TEXT, raw, top_k=10**6)
    if raw:
        ids = tokenizer(SEEDS_TEXT)["input_ids"]
    else:
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": SEEDS_TEXT}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text)["input_ids"]
    assert [token.id for token in found.tokens] == ids
    assert found.system_prompt == ("" if raw else SYSTEM)
    expected = {"base": directly(tiny_folder, ids), "adapter": directly(tiny_folder, ids, tuned)}
    assert len(found.candidates) == len(expected["base"])
    assert (expected["base"] - expected["adapter"]).abs().max() > 1e-4
    for name, chances in expected.items():
        by_id = {candidate.id: candidate.probability[name] for candidate in found.candidates}
        assert max(abs(by_id[id] - float(chances[id])) for id in range(len(chances))) < 1e-6
        assert sum(by_id.values()) == pytest.approx(1, abs=1e-9)
        ranked = sorted(by_id, key=lambda id: -by_id[id])
        assert {candidate.id: candidate.rank[name] for candidate in found.candidates}[ranked[4]] == 5
        (likeliest,) = [candidate for candidate in found.candidates if candidate.rank[name] == 1]
        assert likeliest.id == int(chances.argmax())
        assert found.predicted[name] == likeliest.text
    last = [candidate.probability["adapter"] for candidate in found.candidates]
    assert last == sorted(last, reverse=True)


def test_the_shapes_and_the_embeddings(chat_model):
    found = inspect(chat_model, SEEDS_TEXT, raw=True, top_k=3)
    weight = chat_model.model.get_input_embeddings().weight
    assert found.embedding_shape == (len(found.tokens), weight.shape[1])
    assert found.logits_shape == (len(found.tokens), weight.shape[0])
    for token in found.tokens:
        assert token.embedding == weight[token.id, : inspection.FIRST_VALUES].tolist()
    assert len(found.candidates) == 3
    assert list(found.predicted) == ["base"]


def test_each_model_brings_its_own_best(tuned):
    chat_model = generate.load_chat_model(None, str(tuned), "float32", "cpu")
    found = inspect(chat_model, "red stone", raw=True, top_k=4)
    for name in ("base", "adapter"):
        best = sorted(candidate.rank[name] for candidate in found.candidates)[:4]
        assert best == [1, 2, 3, 4]
    assert 4 <= len(found.candidates) <= 8


def test_broken_weights_make_no_probabilities(chat_model):
    with torch.no_grad():
        chat_model.model.model.norm.weight[0] = float("nan")
    with pytest.raises(DivergedError, match="base: its logits are not finite"):
        inspect(chat_model, "red", raw=True, top_k=3)


# ---------------------------------------------------------------------------------------- tokens as text


@pytest.mark.parametrize("text", [SEEDS_TEXT, "red  stone\n\tbird", "鱻 🦜 naïve", "\x00\x1b[31m\u2028\u202e"])
def test_the_tokens_together_are_the_text(chat_model, text):
    """Byte by byte: a rare character is several tokens, none of which is a character."""
    ids = chat_model.tokenizer(text)["input_ids"]
    pieces = [token_text(chat_model.tokenizer, id) for id in ids]
    assert "�" not in "".join(pieces)
    bytes_of = b"".join(piece.encode() for piece in pieces).decode("unicode_escape").encode("latin-1")
    assert bytes_of.decode() == text


def test_control_tokens_and_ids_without_a_token(chat_model):
    assert token_text(chat_model.tokenizer, chat_model.markup.end) == "<|im_end|>"
    assert token_text(chat_model.tokenizer, len(chat_model.tokenizer)) == f"[no token {len(chat_model.tokenizer)}]"


def test_what_cannot_be_seen_is_spelled():
    assert inspection.visible("a\n\x1b[31m\u202e猴 b") == "a\\n\\x1b[31m\\u202e猴 b"
    assert [len(inspection.padded(text, 6)) for text in ("ab", "猴子", "a\u0301")] == [6, 4, 7]


# ---------------------------------------------------------------------------------------- the command


def test_the_command_shows_both_side_by_side(tuned, tmp_path, capsys):
    html, output = tmp_path / "page.html", tmp_path / "found.json"
    flags = ["--dtype", "float32", "--top_k", "5", "--html", html, "--json", output]
    assert cli.main(list(map(str, ["inspect", "--adapter", tuned, *flags, "<b>猴子</b>"]))) == 0
    printed = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert [*found["predicted"]] == ["base", "adapter"]
    page = Page(html.read_text())
    assert "<b>猴子</b>" in page.of("p")
    for candidate in found["candidates"]:
        for name in ("base", "adapter"):
            shown = f"{100 * candidate['probability'][name]:.4f} %"
            assert shown in printed
            assert shown in page.text
    assert found["tokens"][0]["text"] == "<|im_start|>"
    assert SYSTEM in printed
    assert SYSTEM in page.text
    tokens, hidden = found["embedding_shape"]
    for text in (printed, page.text):
        assert f"({tokens}, {hidden})" in text
        assert f"({tokens}, {found['logits_shape'][1]:,})" in text
        assert f"position {tokens - 1}" in text


def test_what_is_not_there_or_not_exact_is_said(tiny_folder, tmp_path, capsys):
    printed, pages = {}, {}
    for dtype in ("float32", "bfloat16"):
        html = tmp_path / f"{dtype}.html"
        flags = ["--model", str(tiny_folder), "--device", "cpu", "--dtype", dtype, "--html", str(html), "猴子"]
        assert cli.main(["inspect", *flags]) == 0
        printed[dtype], pages[dtype] = capsys.readouterr().out, Page(html.read_text()).text
        assert "no system prompt" in printed[dtype]
    for shown in (printed, pages):
        assert "--dtype float32" in shown["bfloat16"]
        assert "--dtype float32" not in shown["float32"]


def test_a_long_text_is_shown_from_both_ends(chat_model, capsys):
    found = inspect(chat_model, "red bird " * 80, raw=True, top_k=2)
    inspection.show(found)
    printed = capsys.readouterr().out
    assert f"... and {len(found.tokens) - inspection.SHOWN_TOKENS} more" in printed
    assert f" {len(found.tokens) - 1:>5} " in printed
    assert len(printed.splitlines()) < inspection.SHOWN_TOKENS + 15


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--raw", ""], "the text is empty"),
        (["--raw", "red " * 600], "this model takes 512"),
        (["red " * 600], "this model takes 511"),
        (["--raw", "\udcff"], "not UTF-8"),
        (["\udcff"], "not UTF-8"),
    ],
)
def test_texts_that_cannot_be(flags, message, tiny_folder, capsys):
    assert cli.main(["inspect", "--model", str(tiny_folder), "--dtype", "float32", *flags]) == DataError.exit_code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top_k", "0"], "--top_k = 0 must be at least 1"),
        (["--raw", "--system_prompt", "x"], "leave --system_prompt out"),
        (["--html", "/"], "--html /: it is a folder"),
        (["--json", "/nowhere/x"], "--json /nowhere/x: the folder /nowhere does not exist"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(flags, message, monkeypatch, capsys):
    monkeypatch.setattr("minilora.inference.generate.load_chat_model", lambda *args: pytest.fail("a model was loaded"))
    assert cli.main(["inspect", "--model", "x", *flags, "text"]) == 2
    assert message in capsys.readouterr().err
