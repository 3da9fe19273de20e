"""Text out: a batch answers as its prompts do one by one, and as the plain greedy loop does."""

import gzip
import json

import numpy as np
import pytest
import torch
from conftest import CPU, WORDS, Sizes

from minilora import cli, demo
from minilora.data.formats import Turn
from minilora.data.markup import ChatMarkup
from minilora.errors import AdapterError, DataError, OutOfMemoryError
from minilora.inference import answer_file, generate
from minilora.inference.answer_file import read_questions
from minilora.inference.generate import ChatModel, Sampling, answer, answer_all
from minilora.lora import inject
from minilora.models import load as loading
from minilora.models import probe

PROMPTS = [
    "你是谁？",
    "Who made you?",
    "Give the opposite.\npush",
    "猫是什么？",
    "How do you say heart in Chinese?",
    "“大”的反义词是什么？",
    "你叫什么？",
    "1",
]
GREEDY = Sampling(max_new_tokens=24)


@pytest.fixture(scope="module")
def chat_model():
    """The demo model in fp32."""
    return generate.load_chat_model(
        str(demo.DEMO_DIR), None, dtype="float32", device="cpu", system_prompt="你是一个AI助手"
    )


@pytest.fixture
def tiny(tiny_folder, load_tiny):
    tokenizer = loading.load_tokenizer(tiny_folder)
    return ChatModel(load_tiny(), tokenizer, ChatMarkup(tokenizer), "")


def asked(prompts):
    return [[Turn("user", prompt)] for prompt in prompts]


@torch.no_grad()
def plain_greedy(chat_model, prompt, limit):
    """The definition: the whole sequence anew for each token, no cache, no padding, until <|im_end|>."""
    ids = chat_model.markup.prompt_ids([Turn("user", prompt)], chat_model.system_prompt)
    new = []
    while len(new) < limit:
        token = int(chat_model.model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
        if token in (chat_model.markup.end, chat_model.tokenizer.pad_token_id):
            return new, True
        new.append(token)
    return new, False


def test_a_batch_answers_as_one_by_one(chat_model):
    lengths = {len(chat_model.markup.prompt_ids(turns, chat_model.system_prompt)) for turns in asked(PROMPTS)}
    assert len(lengths) > 3  # so that there is padding
    together = answer(chat_model, asked(PROMPTS), GREEDY)
    assert together == [answer(chat_model, [turns], GREEDY)[0] for turns in asked(PROMPTS)]
    assert len(set(together)) > 4


def test_answers_are_those_of_the_plain_greedy_loop_and_stop_at_the_end_token(chat_model):
    texts, ended = [], []
    for prompt in PROMPTS:
        tokens, stopped = plain_greedy(chat_model, prompt, GREEDY.max_new_tokens)
        texts.append(chat_model.tokenizer.decode(tokens).strip())
        ended.append(stopped)
    found = answer(chat_model, asked(PROMPTS), GREEDY)
    assert found == texts
    assert any(ended)
    assert not any("<|" in text for text in found)


def test_random_weights_too(tiny):
    """Without trained habits: the tiny model's answers run to the limit, padding would change them at once."""
    sampling = Sampling(max_new_tokens=8)
    expected = [tiny.tokenizer.decode(plain_greedy(tiny, prompt, 8)[0]).strip() for prompt in PROMPTS]
    assert answer(tiny, asked(PROMPTS), sampling) == expected


def test_generation_stops_at_the_end_token_and_drops_it(tiny, monkeypatch):
    """A model made to say <|im_end|> fourth, whatever it is asked."""
    original, calls = tiny.model.forward, [0]

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        calls[0] += 1
        output.logits[..., tiny.markup.end] = 1e4 if calls[0] >= 4 else -1e4
        output.logits[..., tiny.tokenizer.pad_token_id] = -1e4
        return output

    monkeypatch.setattr(tiny.model, "forward", forward)
    texts = answer(tiny, asked(PROMPTS[:3]), Sampling(max_new_tokens=50))
    assert calls[0] == 4
    assert not any("<|" in text for text in texts)


def test_what_streams_is_the_answer(chat_model):
    pieces = []
    (text,) = answer(chat_model, asked(PROMPTS[:1]), GREEDY, on_text=pieces.append)
    assert "".join(pieces).strip() == text
    assert len(pieces) > 1


@pytest.mark.parametrize("over", [0, 1])
def test_a_prompt_that_is_too_long_is_a_clear_error(tiny, over):
    limit = tiny.model.config.max_position_embeddings
    prompt = "river " * 300
    length = len(tiny.markup.prompt_ids([Turn("user", prompt)], ""))
    sampling = Sampling(max_new_tokens=limit - length + over)
    assert 0 < sampling.max_new_tokens < limit
    if over:
        with pytest.raises(DataError) as error:
            answer(tiny, asked([prompt]), sampling)
        assert f"the prompt has {length:,} tokens" in str(error.value)
        assert f"{limit - sampling.max_new_tokens:,}" in str(error.value)
    else:
        assert len(answer(tiny, asked([prompt]), sampling)) == 1  # the longest that fits does


def test_sampling_with_one_choice_is_greedy_and_depends_on_the_seed_otherwise(tiny):
    greedy = answer(tiny, asked(PROMPTS[:2]), Sampling(max_new_tokens=6))
    assert answer(tiny, asked(PROMPTS[:2]), Sampling(max_new_tokens=6, temperature=0.7, top_k=1)) == greedy

    def sampled(seed):
        torch.manual_seed(seed)
        return answer(tiny, asked(PROMPTS[:2]), Sampling(max_new_tokens=6, temperature=1.5))

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_probing_leaves_the_mode_as_it_was(tiny):
    ids = [5, 6, 7]
    for training in (True, False):
        tiny.model.train(training)
        logits = probe.probe_logits(tiny.model, ids)
        assert tiny.model.training is training
    assert logits.shape == (3, tiny.model.config.vocab_size)
    assert not logits.requires_grad


def test_a_speaker_without_a_model_is_refused():
    with pytest.raises(AdapterError, match="--model"):
        generate.load_chat_model(None, None, device=str(CPU))


# ---------------------------------------------------------------------------------------- many prompts


def many(count, seed=0):
    """Prompts of one word to sixty, in no order."""
    rng = np.random.default_rng(seed)
    lengths = rng.permutation(np.linspace(1, 60, count).astype(int))
    return [" ".join(rng.choice(WORDS, size=length)) for length in lengths]


def test_32_prompts_in_batches_are_answered_as_one_by_one_and_in_order(tiny):
    """Left-padded, sorted by length on the way: none of it may be seen in the answers."""
    conversations, sampling = asked(many(32)), Sampling(max_new_tokens=12)
    assert len({len(tiny.markup.prompt_ids(turns, "")) for turns in conversations}) > 20
    singles = [answer(tiny, [turns], sampling)[0] for turns in conversations]
    assert len(set(singles)) > 12
    for batch_size in (5, 32):
        assert answer_all(tiny, conversations, sampling, batch_size, "") == singles


def test_batches_get_smaller_when_memory_runs_out(tiny, monkeypatch):
    conversations, sampling = asked(many(10)), Sampling(max_new_tokens=4)
    expected = answer_all(tiny, conversations, sampling, 8, "")
    really, tried, limit = generate.answer, [], 2

    def answer_few(chat_model, turns_of, sampling):
        tried.append(len(turns_of))
        if len(turns_of) > limit:
            raise torch.OutOfMemoryError("out of memory")
        return really(chat_model, turns_of, sampling)

    monkeypatch.setattr(generate, "answer", answer_few)
    assert answer_all(tiny, conversations, sampling, 8, "") == expected
    assert tried == [8, 4, 2, 2, 2, 2, 2]
    limit = 0
    with pytest.raises(OutOfMemoryError, match="not even one answer"):
        answer_all(tiny, conversations, sampling, 8, "")


def test_a_token_costs_fewer_operations_than_under_peft(load_tiny):
    """Speaking is bound by reading the weights, and by the number of operators; there peft is the measure."""
    from peft import LoraConfig, get_peft_model

    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    ours, theirs = load_tiny(torch.bfloat16), load_tiny(torch.bfloat16)
    inject(ours, targets, rank=4, alpha=8)
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=list(targets))).eval()
    counts = []
    for tuned in (ours.eval(), theirs):
        with torch.no_grad():
            cache = tuned(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
            with Sizes() as sizes:
                tuned(input_ids=torch.tensor([[8]]), past_key_values=cache, use_cache=True)
        counts.append(len(sizes.made))
    assert counts[0] < counts[1]


# ---------------------------------------------------------------------------------------- files

ROWS = (
    '{"instruction": "red", "input": "stone", "output": "left out of the prompt"}',
    '{"instruction": "blue river", "score": 1.10, "big": 12345678901234567890123}',
    '{"prompt": "大", "completion": "", "system": "Be brief."}',
    '  {"prompt": "a\\u2028b" }\r',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, '
    '{"role": "user", "content": "c"}]}',
)


def command(tiny_folder, source, output, *flags):
    argv = ["--model", tiny_folder, "--input_file", source, "--output_file", output, "--max_new_tokens", 6]
    return cli.main(list(map(str, ["generate", *argv, "--dtype", "float32", *flags])))


def test_a_file_of_prompts_comes_back_with_answers(tiny, tiny_folder, tmp_path, capsys):
    """Every row as it was, to the digit, in its place, its answer the one that it gets alone."""
    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(ROWS).encode())
    assert command(tiny_folder, source, output, "--batch_size", 4) == 0
    captured = capsys.readouterr()
    assert captured.out == f"answered 6 rows: {output}\n"
    assert "answers" in captured.err  # the progress
    lines = output.read_text("utf-8").split("\n")
    assert lines.pop() == ""
    for text, row in zip(lines, ROWS, strict=True):
        assert text.startswith(row.strip().removesuffix("}").strip() + ', "answer": "')
        found = json.loads(text)
        reply = found.pop("answer")
        assert found == json.loads(row)
    assert '"score": 1.10, "big": 12345678901234567890123,' in lines[1]

    turns = [question.turns for question in read_questions(source)]
    assert [[turn.role for turn in turns_of] for turns_of in turns] == [
        *(["user"], ["user"], ["system", "user"], ["user"], ["user"], ["user", "assistant", "user"])
    ]
    assert turns[0][0].content == "red\nstone"
    assert turns[3][0].content == "a\u2028b"
    for turns_of, text in zip(turns, lines, strict=True):
        reply = json.loads(text)["answer"]
        assert reply
        assert reply == answer(tiny, [turns_of], Sampling(max_new_tokens=6))[0]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


BAD_ROWS = {
    "nonsense": "not one JSON value",
    '{"text": "a"}': "needed is messages, prompt or instruction",
    '{"prompt": ""}': "'prompt' is empty",
    '{"prompt": 3}': "'prompt' must be a text",
    '{"prompt": "a", "answer": "b"}': "there is already a field 'answer'",
    '{"messages": []}': "the last turn before the answer must be the user's",
    '{"messages": "a"}': "'messages' must be a list of turns",
    '{"messages": [{"role": "assistant", "content": "b"}]}': "must be the user's",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}': "a system turn",
    '{"messages": [{"role": "user"}]}': "message 1: the field 'content' is missing",
    '{"messages": [1]}': "message 1 must be an object",
}


def test_bad_rows_are_all_named_before_the_model_is_loaded(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "load_chat_model", lambda *args: pytest.fail("the model was loaded"))
    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(['{"prompt": "good"}', *BAD_ROWS]))
    assert command(tiny_folder, source, output) == 2
    message = capsys.readouterr().err.splitlines()
    for number, (line, reason) in enumerate(zip(message, BAD_ROWS.values(), strict=False), 2):
        assert f"{source}:{number}: " in line
        assert reason in line
    assert message[-1] == f"{len(BAD_ROWS)} of {len(BAD_ROWS) + 1} rows are bad."
    assert not output.exists()


def test_output_that_cannot_be_is_found_before_the_model_is_loaded(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "load_chat_model", lambda *args: pytest.fail("the model was loaded"))
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "good"}')
    (tmp_path / "link").symlink_to(source)
    theirs = tmp_path / "theirs.jsonl"  # such a file was once replaced
    theirs.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c"}\n')
    for output, reason in {
        source: "it is the input itself",
        tmp_path / "link": "it is the input itself",
        tmp_path: "it is a folder",
        tmp_path / "none" / "out.jsonl": f"the folder {tmp_path / 'none'} does not exist",
        theirs: "this flag did not write what is in that file",
    }.items():
        assert command(tiny_folder, source, output) == 2
        assert capsys.readouterr().err == f"minilora: --output_file {output}: {reason}. Give another file.\n"
    assert theirs.read_text() == '{"prompt": "a", "answer": "b"}\n{"prompt": "c"}\n'
    assert source.read_text() == '{"prompt": "good"}'


def test_a_row_that_is_too_long_is_named_before_the_first_answer(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "answer", lambda *args: pytest.fail("an answer was started"))
    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"prompt": "good"}) + "\n" + json.dumps({"prompt": "word " * 600}))
    assert command(tiny_folder, source, output) == 2
    assert "minilora: line 2: the prompt has " in capsys.readouterr().err
    assert not output.exists()


def test_what_stood_in_the_output_file_stays_when_answering_fails(tiny_folder, tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "answer", fail)
    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "good"}')
    before = '{"prompt": "old", "answer": "a"}\n'
    output.write_text(before)
    assert command(tiny_folder, source, output) == 130
    assert output.read_text() == before


def test_prompts_of_the_command_line_are_answered_in_batches_and_in_order(tiny_folder, capsys, monkeypatch):
    sizes = []

    def answer(_chat_model, conversations, _sampling):
        sizes.append(len(conversations))
        return [f"to {turns[-1].content}" for turns in conversations]

    monkeypatch.setattr(generate, "answer", answer)
    prompts = ["a", "b b b b", "c c", "d", "e e e"]
    assert cli.main(["generate", "--model", str(tiny_folder), "--batch_size", "2", *prompts]) == 0
    assert capsys.readouterr().out == "".join(f"> {prompt}\nto {prompt}\n\n" for prompt in prompts)
    assert sizes == [2, 2, 1]


# ---------------------------------------------------------------------------------------- going on where it stopped


def fails_after(count, monkeypatch):
    """generate.answer raises KeyboardInterrupt after so many batches; returns the sizes of the batches."""
    really, sizes = generate.answer, []

    def answer_some(chat_model, turns_of, sampling, *args):
        if len(sizes) == count:
            raise KeyboardInterrupt
        sizes.append(len(turns_of))
        return really(chat_model, turns_of, sampling, *args)

    monkeypatch.setattr(generate, "answer", answer_some)
    return sizes


def test_a_stopped_command_goes_on_where_it_stopped(tiny_folder, tmp_path, monkeypatch, capsys):
    """Hours of answers once stood in memory only, until the last one was there."""
    source, output, whole = (tmp_path / name for name in ("rows.jsonl", "out.jsonl", "whole.jsonl"))
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in many(10)))
    assert command(tiny_folder, source, whole, "--batch_size", 3) == 0
    with monkeypatch.context() as patch:
        assert fails_after(2, patch) == []
        capsys.readouterr()
        assert command(tiny_folder, source, output, "--batch_size", 3) == 130
    partial = tmp_path / "out.jsonl.partial"
    message = f"minilora: interrupted; 6 of 10 answers are kept in {partial}. The same command continues.\n"
    assert capsys.readouterr().err.endswith(message)
    assert not output.exists()
    with open(partial, "ab") as file:
        file.write(b'[9, "cut sho')  # as a killed process leaves it
    capsys.readouterr()
    sizes = fails_after(-1, monkeypatch)
    assert command(tiny_folder, source, output, "--batch_size", 3) == 0
    assert sum(sizes) == 4
    assert "6 of 10 rows are answered" in capsys.readouterr().err
    assert output.read_bytes() == whole.read_bytes()
    assert not partial.exists()


@pytest.mark.parametrize("other", ["rows", "sampling"])
def test_answers_of_other_work_are_neither_taken_nor_lost(tiny_folder, tmp_path, monkeypatch, capsys, other):
    """A forgotten setting once threw away the answers of hours."""
    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "red"}\n{"prompt": "a longer blue one"}\n')
    with monkeypatch.context() as patch:
        fails_after(1, patch)
        assert command(tiny_folder, source, output, "--batch_size", 1) == 130
    if other == "rows":
        source.write_text('{"prompt": "red"}\n{"prompt": "stone"}\n')
    flags = ["--max_new_tokens", 5] if other == "sampling" else []
    capsys.readouterr()
    partial = tmp_path / "out.jsonl.partial"
    before = partial.read_bytes()
    assert command(tiny_folder, source, output, *flags) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"minilora: {partial} keeps answers (1) to other rows, or with other settings")
    assert f"or another --output_file, or delete {partial}.\n" in message
    assert partial.read_bytes() == before
    partial.unlink()
    sizes = fails_after(-1, monkeypatch)
    assert command(tiny_folder, source, output, *flags) == 0
    assert sum(sizes) == 2


def test_a_name_that_ends_in_gz_gets_a_packed_file(tiny_folder, tmp_path):
    """It was once plain text, which minilora itself could not read again."""
    source, plain, packed = (tmp_path / name for name in ("rows.jsonl", "out.jsonl", "out.jsonl.gz"))
    source.write_text('{"prompt": "red"}\n{"prompt": "blue"}\n')
    for output in (plain, packed, packed):  # the second time over its own file
        assert command(tiny_folder, source, output) == 0
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()


def test_a_file_that_is_no_partial_answers_stays(tiny_folder, tmp_path, capsys):
    """The input itself may have that name: it was once replaced, and deleted at the end."""
    source, output = tmp_path / "out.jsonl.partial", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "red"}\n')
    assert command(tiny_folder, source, output) == 2
    assert "is no file of answers from here" in capsys.readouterr().err
    assert source.read_text() == '{"prompt": "red"}\n'


def test_a_damaged_line_costs_only_its_own_answer(tiny, tmp_path):
    questions = [answer_file.PromptRow(i, f'{{"prompt": "{i}"}}', (Turn("user", str(i)),)) for i in range(3)]
    key = answer_file.key_of(tiny, questions, Sampling())
    assert key != answer_file.key_of(tiny, questions, Sampling(max_new_tokens=9))
    partial = answer_file.PartialAnswers(tmp_path / "out", key)
    partial.add(0, "a")
    with open(partial.path, "ab") as file:
        file.write(b"nonsense\n[2]\n")
    partial.add(2, "c")
    assert answer_file.PartialAnswers(tmp_path / "out", key).answers == {0: "a", 2: "c"}


def test_an_empty_think_block_is_not_shown(tiny, monkeypatch):
    """Qwen3's template begins an answer without reasoning with an empty block; a real reasoning stays."""
    for text, shown in {
        "<think>\n\n</think>\n\nred": "red",
        "<think>\nwhy\n</think>\n\nred": "<think>\nwhy\n</think>\n\nred",
        "red <think></think>": "red <think></think>",
    }.items():
        monkeypatch.setattr(tiny.tokenizer, "decode", lambda *_, text=text, **__: text)
        assert answer(tiny, [[Turn("user", "a")]], Sampling(max_new_tokens=1)) == [shown]


def test_an_empty_think_block_is_not_streamed():
    for pieces, shown in (
        (["<think>", "\n\n</th", "ink>\n", "\nred", " bird"], "red bird"),
        (["<think>", "\nwhy", "\n</think>\n\n", "red"], "<think>\nwhy\n</think>\n\nred"),
        (["<thi", "s is red"], "<this is red"),
        ([" red"], " red"),
    ):
        texts = []
        on_piece = generate.without_empty_thinking(texts.append)
        for piece in pieces:
            on_piece(piece)
        assert "".join(texts) == shown
