"""Evaluation: the numbers of the training loop, and those of plain transformers; a table, a JSON file."""

import json
import math
import re
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from conftest import save_random_adapter, write_jsonl

from minilora import cli, loop
from minilora.adapters import format as adapter_format
from minilora.adapters.merge import merge
from minilora.data.dataset import IGNORE
from minilora.data.formats import Row, Turn
from minilora.decoder import Decoder
from minilora.errors import AdapterError, DivergedError, OutOfMemoryError
from minilora.inference import evaluate, generate
from minilora.inference.evaluate import Request, Scores, exact_match, questions, score, token_scores
from minilora.inference.generate import Sampling, answer_all
from minilora.models import fingerprint
from minilora.training import setup
from minilora.training.signals import StopRequest

PROMPT = "Be brief."


@pytest.fixture
def rows(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", 12, seed=3)


@pytest.fixture
def tuned(tiny_folder, load_tiny, tmp_path):
    """An adapter's folder: trained, as it were, under a system prompt of its own."""
    save_random_adapter(load_tiny(), tmp_path / "adapter", tiny_folder, ("q_proj", "v_proj", "up_proj"), prompt=PROMPT)
    return tmp_path / "adapter"


def asked(**keys):
    return Request(**({"dtype": "float32", "device": "cpu"} | {key: str(value) for key, value in keys.items()}))


@torch.no_grad()
def by_definition(tiny, examples):
    """(nats a supervised token, share of likeliest ones): one example at a time, all logits, transformers' own code."""
    nats, correct, count = 0.0, 0, 0
    for example in examples:
        ids, labels = (torch.from_numpy(array.copy()).long() for array in (example.input_ids, example.labels))
        logits = tiny(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
        kept = labels[1:] != IGNORE
        nats += float(F.cross_entropy(logits[kept], labels[1:][kept], reduction="sum"))
        correct += int((logits.argmax(-1)[kept] == labels[1:][kept]).sum())
        count += int(kept.sum())
    return nats / count, correct / count, count


def test_the_loss_is_that_of_the_training_loop(make_config, rows):
    """Same rows, same system prompt: what `eval` says of the base is what a run says before its first step."""
    config = make_config(eval_file=str(rows), max_length=44)  # some rows are cut
    with StopRequest() as stop, ExitStack() as held:
        training = setup.prepare(config, stop, held)
        expected = loop.evaluate(training, training.data.eval)
        tokens, supervised = int(training.data.eval.lengths.sum()), int(training.data.eval.counts.sum())
    request = Request(str(rows), model=config.model, max_length=44, dtype="float32", device="cpu")
    found = evaluate.evaluate(request)
    assert found.system_prompt == config.system_prompt
    assert found.truncated > 0
    assert (found.examples, found.tokens, found.supervised_tokens) == (len(training.data.eval), tokens, supervised)
    assert found.scores["base"].loss == pytest.approx(expected, rel=1e-6)


def test_the_numbers_are_those_of_plain_transformers(rows, tuned, load_tiny, tmp_path):
    """Base, adapter and merged folder; examples one by one, without packing, shared prefix or chunks."""
    merge(tuned, tmp_path / "merged", dtype="float32")
    found = evaluate.evaluate(asked(eval_file=rows, adapter=tuned, merged=tmp_path / "merged"))
    assert list(found.scores) == ["base", "adapter", "merged"]
    assert found.system_prompt == PROMPT
    tiny = load_tiny()
    markup = evaluate._chat_model(asked(eval_file=rows, adapter=tuned)).markup
    turns, reading = evaluate.read_rows(str(rows))
    examples, _ = evaluate.tokenize(
        turns, markup, reading, system_prompt=PROMPT, max_length=1024, overlong="error", train_on_prompt=False
    )
    expected = {"base": by_definition(tiny, examples)}
    adapter_format.load(tiny, tuned, fingerprint.fingerprint(tiny))
    expected |= {name: by_definition(tiny.eval(), examples) for name in ("adapter", "merged")}
    for name, (loss, accuracy, count) in expected.items():
        scores = found.scores[name]
        assert scores.loss == pytest.approx(loss, abs=1e-5)
        assert scores.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
        assert scores.token_accuracy == pytest.approx(accuracy, abs=1e-9)
        assert found.supervised_tokens == count
        assert scores.exact_match is None
    assert abs(expected["base"][0] - expected["adapter"][0]) > 0.01


def test_the_token_budget_is_that_of_a_run(make_config, rows, monkeypatch):
    """With its room for a long prefix that is shared; `eval` once had a budget of its own."""
    prompt = "水" * 220
    own = {"train_file": str(rows), "system_prompt": prompt, "per_device_train_batch_size": 12}
    config = make_config(**own, max_tokens_per_micro_batch=0, share_prefix="auto")
    with StopRequest() as stop, ExitStack() as held:
        expected = setup.prepare(config, stop, held).state.max_tokens
    really, budgets = evaluate.micro_batches, set()

    def micro_batches(group, max_tokens, **keys):
        budgets.add(max_tokens)
        return really(group, max_tokens, **keys)

    monkeypatch.setattr(evaluate, "micro_batches", micro_batches)
    evaluate.evaluate(asked(eval_file=rows, model=config.model, system_prompt=prompt))
    assert expected > 960 + 3 * 192
    assert budgets == {expected}


def test_merge_says_of_an_adapter_without_a_base_what_is_missing(tuned, tmp_path):
    """It once looked for a model without a name."""
    config = json.loads((tuned / "adapter_config.json").read_text())
    (tuned / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match="does not say which base it was trained on: give --model"):
        merge(tuned, tmp_path / "merged")


def test_logits_are_there_a_chunk_at_a_time():
    hidden, weight = torch.randn(23, 8), torch.randn(40, 8)
    targets = torch.randint(40, (23,))
    targets[:9] = (hidden @ weight.T).argmax(-1)[:9]  # some are right
    logits = hidden @ weight.T
    nats, correct = token_scores(hidden, weight, targets, chunk=4)
    assert float(nats) == pytest.approx(float(F.cross_entropy(logits, targets, reduction="sum")), rel=1e-6)
    assert int(correct) == int((logits.argmax(-1) == targets).sum()) >= 9


def test_memory_that_runs_out_makes_micro_batches_smaller(rows, tiny_folder, monkeypatch):
    request = asked(eval_file=rows, model=tiny_folder)
    expected = evaluate.evaluate(request).scores["base"]
    really, sizes = Decoder.__call__, []

    def hidden_states(decoder, batch):
        sizes.append(batch.input_ids.shape[1])
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("out of memory")
        return really(decoder, batch)

    monkeypatch.setattr(Decoder, "__call__", hidden_states)
    limit = 100
    found = evaluate.evaluate(request).scores["base"]
    assert max(sizes) > limit
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.token_accuracy == expected.token_accuracy
    limit = 10
    with pytest.raises(OutOfMemoryError, match="one example of"):
        evaluate.evaluate(request)


def test_broken_numbers_are_not_a_score(rows, tiny_folder, load_tiny, monkeypatch):
    broken = load_tiny()
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    monkeypatch.setattr("minilora.inference.generate.load_model", lambda *args: broken)
    with pytest.raises(DivergedError, match="base: the loss is nan"):
        evaluate.evaluate(asked(eval_file=rows, model=tiny_folder))


# ---------------------------------------------------------------------------------------- exact match


@pytest.fixture
def chat_model(tiny_folder):
    return evaluate._chat_model(Request("", model=str(tiny_folder), dtype="float32", device="cpu", system_prompt=""))


def test_exact_match_is_counted_by_the_character(chat_model, monkeypatch):
    """Blanks at the ends, and what a Qwen3 thinks, do not count; everything else does."""
    answers = {"a": " yes\n", "b": "Yes", "c": "<think>\n\n</think>\n\nyes", "d": "yes."}

    def answer(chat_model, conversations, sampling):
        assert sampling.temperature == 0
        assert sampling.max_new_tokens > len(chat_model.markup.encode(["yes"])[0])
        return [answers[turns[-1].content] for turns in conversations]

    monkeypatch.setattr(generate, "answer", answer)
    pairs = [((Turn("user", name),), "yes") for name in answers]
    assert exact_match(chat_model, pairs, 2, "base") == 2 / 4


def test_a_model_that_repeats_its_own_answers_matches_all(chat_model, monkeypatch):
    """Really generated: the references are what the model says, then one of them is changed."""
    conversations = [(Turn("user", prompt),) for prompt in ("red stone", "cold river and a bird", "大")]
    sampling, really = Sampling(max_new_tokens=12), generate.answer
    # A tiny random model never ends by itself: it is stopped where its references were.
    monkeypatch.setattr(generate, "answer", lambda chat_model, turns, _: really(chat_model, turns, sampling))
    texts = answer_all(chat_model, conversations, sampling, 2, "")
    assert all(texts)
    asked = list(zip(conversations, texts, strict=True))
    assert exact_match(chat_model, asked, 2, "") == 1
    asked[1] = (asked[1][0], asked[1][1] + "!")
    assert exact_match(chat_model, asked, 2, "") == pytest.approx(2 / 3)


def test_which_turn_is_the_reference():
    user, assistant, system = (lambda text, role=role: Turn(role, text) for role in ("user", "assistant", "system"))
    rows = [
        Row(1, (user("a"), assistant("b"))),
        Row(2, (system("s"), user("a"), assistant("b"), user("c"), assistant("d"))),
        Row(3, (user("a"), assistant("b"), user("c"))),
        Row(4, (assistant("b"),)),  # nobody asked
    ]
    found = questions(rows)
    assert [reference for _, reference in found] == ["b", "d", "b"]
    assert found[1][0] == rows[1].turns[:4]
    assert found[2][0] == (user("a"),)


# ---------------------------------------------------------------------------------------- the command


def test_the_command_prints_a_table_and_writes_json(rows, tuned, tmp_path, capsys):
    output = tmp_path / "scores.json"
    flags = ["--eval_file", rows, "--max_rows", "5", "--generate", "2", "--batch_size", "1", "--json", output]
    assert cli.main(list(map(str, ["eval", "--adapter", tuned, "--dtype", "float32", *flags]))) == 0
    captured = capsys.readouterr()
    what, head, *lines = captured.out.splitlines()
    assert head.split() == ["loss", "perplexity", "token", "accuracy", "exact", "match", "of", "2"]
    found = json.loads(output.read_text())
    assert [line.split()[0] for line in lines] == list(found["scores"]) == ["base", "adapter"]
    assert what == f"5 rows, {found['supervised_tokens']:,} supervised tokens"
    for line, scores in zip(lines, found["scores"].values(), strict=True):
        assert len(line) == len(head)
        assert f"{scores['loss']:.4f}" in line
        assert f"{100 * scores['token_accuracy']:.2f} %" in line
        assert scores.keys() == set(Scores.__dataclass_fields__)
    assert (found["examples"], found["answered"], found["system_prompt"]) == (5, 2, PROMPT)
    assert "base" in captured.err  # the progress


def test_rows_too_long_to_answer_are_named_and_the_losses_are_printed(rows, tiny_folder, capsys):
    long = {"instruction": "river " * 3000, "output": "No."}
    rows.write_text(json.dumps(long) + "\n" + rows.read_text())
    flags = ["--eval_file", rows, "--dtype", "float32", "--generate", "2"]
    assert cli.main(list(map(str, ["eval", "--model", tiny_folder, *flags]))) == 0
    captured = capsys.readouterr()
    assert "exact match of 1" in captured.out
    assert ", 1 rows too long to be answered" in captured.out
    assert "1 rows are too long to be answered; no answer is compared: line 1\n" in captured.err


def test_answers_that_do_not_fit_in_memory_leave_the_losses(rows, tiny_folder, capsys, monkeypatch):
    def no_memory(*_args):
        raise OutOfMemoryError("not even one answer fits")

    monkeypatch.setattr(evaluate, "answer_all", no_memory)
    flags = ["--eval_file", rows, "--dtype", "float32", "--generate", "2"]
    assert cli.main(list(map(str, ["eval", "--model", tiny_folder, *flags]))) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].split()[-1] == "-"
    assert "base: the answers are not compared: not even one answer fits" in captured.err


def test_ctrl_c_while_answers_are_computed_keeps_the_scores(rows, tuned, tmp_path, capsys, monkeypatch):
    """The losses of the base and of the adapter are printed and written, and the exit code is that of Ctrl-C."""
    calls = []

    def stopped_at_the_second(*_):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 0.5

    monkeypatch.setattr(evaluate, "exact_match", stopped_at_the_second)
    figures = tmp_path / "figures.json"
    flags = ["--adapter", tuned, "--eval_file", rows, "--dtype", "float32", "--generate", "2", "--json", figures]
    code = cli.main(list(map(str, ["eval", *flags])))
    assert code == 130
    out = capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert found["interrupted"]
    assert list(found["scores"]) == ["base", "adapter"]
    assert found["scores"]["base"]["exact_match"] == 0.5
    assert found["scores"]["adapter"]["exact_match"] is None
    assert f"{found['scores']['adapter']['loss']:.4f}" in out


def test_a_base_alone(rows, tiny_folder, capsys):
    assert cli.main(["eval", "--model", str(tiny_folder), "--eval_file", str(rows), "--dtype", "float32"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["12", "loss", "base"]


def test_rows_that_are_cut_are_said(rows, tiny_folder, capsys):
    flags = ["--eval_file", str(rows), "--dtype", "float32", "--max_length", "44"]
    assert cli.main(["eval", "--model", str(tiny_folder), *flags]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(r"\d+ rows, \d+ supervised tokens, [1-9]\d* rows cut to --max_length", first)


def test_bad_rows_are_refused_or_left_out_and_said(rows, tiny_folder, capsys):
    with open(rows, "a") as file:
        file.write("no example\n")
    command = ["eval", "--model", str(tiny_folder), "--eval_file", str(rows), "--dtype", "float32"]
    assert cli.main(command) == 2
    assert "--on_bad_rows skip" in capsys.readouterr().err
    assert cli.main([*command, "--on_bad_rows", "skip"]) == 0
    assert re.search(r"^12 rows, .*, 1 bad rows left out$", capsys.readouterr().out.splitlines()[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_do_not_change_the_model(dtype, rows, load_tiny, tiny_folder):
    tiny = load_tiny(dtype)
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    implementation = tiny.config._attn_implementation
    chat_model = evaluate._chat_model(asked(eval_file=rows, model=tiny_folder))
    turns, reading = evaluate.read_rows(str(rows))
    dataset, _ = evaluate.tokenize(
        turns, chat_model.markup, reading, system_prompt="", max_length=64, overlong="drop", train_on_prompt=False
    )
    first = score(tiny, dataset, "")
    assert score(tiny, dataset, "") == first
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())
    assert tiny.config._attn_implementation == implementation
