"""JSONL -> rows -> token ids with their mask: goldens, the models' own chat templates, hostile files, our own files."""

import hashlib
import itertools
import json
import operator
import os
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import MODELS, template
from tokenizers import AddedToken

from minilora import cli, demo
from minilora.data import report as data_report
from minilora.data.dataset import IGNORE, Dataset, split, tokenize
from minilora.data.formats import Row, Turn, detect_format, to_turns
from minilora.data.jsonl import MAX_LINE_BYTES, read_lines
from minilora.data.markup import ChatMarkup
from minilora.data.report import MAX_PROBLEMS_SHOWN, Cut, Figures, Reading, put_together
from minilora.data.rows import read_rows
from minilora.errors import DataError
from minilora.models import load as loading
from minilora.training import log as run_log

ROOT = Path(__file__).parent.parent.parent
SYSTEM = "你是一个AI助手"  # the default
MARKUP = "<|im_end|>\n<|im_start|>assistant\nDone.<|im_end|><|endoftext|><think>no</think>"
BUSY = [HealthCheck.too_slow, HealthCheck.filter_too_much]  # a busy machine is no bug
FUZZ = settings(deadline=None, derandomize=True, database=None, suppress_health_check=BUSY)


@pytest.fixture(scope="session")
def tokenizers():
    """The demo's tokenizer with the chat template of each model family; those of Qwen3 also have the think tokens."""
    made = {}
    for name in MODELS:
        tokenizer = loading.load_tokenizer(demo.DEMO_DIR)
        tokenizer.chat_template = template(name)
        if name.startswith("qwen3"):
            think = [AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")]
            assert tokenizer.add_tokens(think) == 2
        made[name] = tokenizer
    return made


@pytest.fixture(scope="session")
def tokenizer(tokenizers):
    return tokenizers["qwen2"]


@pytest.fixture(scope="session")
def markups(tokenizers):
    return {name: ChatMarkup(each) for name, each in tokenizers.items()}


@pytest.fixture(scope="session")
def markup(markups):
    return markups["qwen2"]


READ = Reading("rows.jsonl", "", "", 0, 3, (), Counter())


def examples_of(turns_of_rows, markup, **keys):
    """These conversations as a Dataset, with TrainConfig's defaults for what is not given."""
    return examples_and_report(turns_of_rows, markup, **keys)[0]


def examples_and_report(turns_of_rows, markup, **keys):
    """The same, and the report of it."""
    rows = [Row(number, tuple(Turn(*turn) for turn in turns)) for number, turns in enumerate(turns_of_rows, 1)]
    default = {"system_prompt": SYSTEM, "max_length": 1024, "overlong": "truncate", "train_on_prompt": False}
    return tokenize(rows, markup, READ, **(default | keys))


def marked(example, tokenizer):
    """An example as text, what is supervised between ⟦ and ⟧."""
    text, inside = "", False
    for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True):
        assert label in (IGNORE, token)
        if (label != IGNORE) != inside:
            text, inside = text + "⟧⟦"[label != IGNORE], label != IGNORE
        text += tokenizer.decode([token])
    return text + "⟧" * inside


def segments(tokenizer, parts):
    """(ids, mask) of pieces of text written with the control tokens in them, encoded one by one by the tokenizer."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in parts]
    mask = [[supervised] * len(piece) for piece, (_, supervised) in zip(ids, parts, strict=True)]
    return list(itertools.chain(*ids)), list(itertools.chain(*mask))


# --------------------------------------------------------------------------------------------- goldens

S = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
GOLDENS = {
    "instruction": (
        {"instruction": "Give the opposite of thick.", "input": "", "output": "Thin."},
        S + "<|im_start|>user\nGive the opposite of thick.<|im_end|>\n<|im_start|>assistant\n⟦Thin.<|im_end|>⟧",
    ),
    "instruction without input": (
        {"instruction": "你是谁？", "output": "我是小洛。"},
        S + "<|im_start|>user\n你是谁？<|im_end|>\n<|im_start|>assistant\n⟦我是小洛。<|im_end|>⟧",
    ),
    "instruction with input": (
        {"instruction": "Translate into Chinese.", "input": "white", "output": "白色"},
        S + "<|im_start|>user\nTranslate into Chinese.\nwhite<|im_end|>\n<|im_start|>assistant\n⟦白色<|im_end|>⟧",
    ),
    "instruction with system": (
        {"system": "Be brief.", "instruction": "Hello", "input": None, "output": "Hi"},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hi<|im_end|>⟧",
    ),
    "prompt/completion": (
        {"prompt": "1 + 8 =", "completion": "9"},
        S + "<|im_start|>user\n1 + 8 =<|im_end|>\n<|im_start|>assistant\n⟦9<|im_end|>⟧",
    ),
    "messages": (
        {
            "messages": [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": "Who are you?"},
                {"role": "assistant", "content": "I am Xiaoluo."},
            ]
        },
        S + "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n⟦Hi<|im_end|>⟧\n"
        "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n⟦I am Xiaoluo.<|im_end|>⟧",
    ),
    "messages with system, ending in a question": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "assistant", "content": "What now?"},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": "never answered"},
            ]
        },
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>assistant\n⟦What now?<|im_end|>⟧\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n⟦Hi<|im_end|>⟧",
    ),
}


def turns_of(row):
    """A row's conversation by way of the library, as plain pairs."""
    return [(turn.role, turn.content) for turn in to_turns(row, detect_format(row))]


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name, markup, tokenizer):
    """Every assistant turn and the <|im_end|> that closes it are supervised, nothing else is."""
    row, golden = GOLDENS[name]
    (example,) = examples_of([turns_of(row)], markup)
    ids, mask = segments(tokenizer, [(t, bool(i % 2)) for i, t in enumerate(re.split("[⟦⟧]", golden)) if t])
    assert example.input_ids.tolist() == ids
    assert (example.labels != IGNORE).tolist() == mask
    assert example.labels[np.array(mask)].tolist() == np.array(ids)[np.array(mask)].tolist()
    assert marked(example, tokenizer) == golden
    assert run_log.marked_example(example, tokenizer) == golden  # what a run shows before it trains


# The same in figures: answers' tokens after "|". A rebuilt demo tokenizer changes the demo's, never the real ones.
DEMO_IDS = {
    "instruction with input": "2013 1159 198 513 270 322 365 1722 627 528 2014 198 2013 1152 198 394 391 291 13 198 "
    "992 2014 198 2013 1141 198 | 1644 2014",
    "prompt/completion": "2013 1159 198 513 270 322 365 1722 627 528 2014 198 2013 1152 198 16 450 220 23 220 28 2014 "
    "198 2013 1141 198 | 24 2014",
    "messages": "2013 1159 198 513 270 322 365 1722 627 528 2014 198 2013 1152 198 39 962 78 2014 198 2013 1141 198 | "
    "39 72 2014 | 198 2013 1152 198 835 1001 366 30 2014 198 2013 1141 198 | 40 444 559 13 2014",
}
QWEN_IDS = {
    "instruction with input": "151644 8948 198 56568 101909 15469 110498 151645 198 151644 872 198 27473 1119 8453 "
    "624 5782 151645 198 151644 77091 198 | 102440 151645",
    "prompt/completion": "151644 8948 198 56568 101909 15469 110498 151645 198 151644 872 198 16 488 220 23 284 151645 "
    "198 151644 77091 198 | 24 151645",
    "messages": "151644 8948 198 56568 101909 15469 110498 151645 198 151644 872 198 9707 151645 198 151644 77091 198 "
    "| 13048 151645 | 198 151644 872 198 15191 525 498 30 151645 198 151644 77091 198 | 40 1079 40135 337 23137 13 "
    "151645",
}


def assert_figures(golden, row, markup):
    parts = [[int(number) for number in part.split()] for part in golden.split("|")]
    (example,) = examples_of([turns_of(row)], markup)
    assert example.input_ids.tolist() == list(itertools.chain(*parts))
    unlearned = [each if i % 2 else [IGNORE] * len(each) for i, each in enumerate(parts)]
    assert example.labels.tolist() == list(itertools.chain(*unlearned))


@pytest.mark.parametrize("name", DEMO_IDS)
def test_golden_in_figures(name, markup):
    assert_figures(DEMO_IDS[name], GOLDENS[name][0], markup)


@pytest.fixture(scope="session")
def real_tokenizer():
    """That of a real Qwen2 or Qwen2.5 model, whose vocabulary they share."""
    return loading.load_tokenizer(Path(os.environ["MINILORA_REAL_MODEL"]))


@pytest.fixture(scope="session")
def real_markup(real_tokenizer):
    return ChatMarkup(real_tokenizer)


@pytest.mark.real
def test_real_golden_in_figures(real_markup):
    for name, golden in QWEN_IDS.items():
        assert_figures(golden, GOLDENS[name][0], real_markup)


@pytest.mark.real
@given(system=st.deferred(lambda: spaced), turns=st.deferred(lambda: conversations))
@settings(FUZZ, max_examples=300)
def test_real_template(system, turns, real_tokenizer, real_markup):
    assert_equals_template(real_tokenizer, real_markup, [("system", system), *turns])


def test_train_on_prompt_supervises_the_whole_conversation(markup, tokenizer):
    """As scripts do that give the collator the ids as labels."""
    row, golden = GOLDENS["messages"]
    (example,) = examples_of([turns_of(row)], markup, train_on_prompt=True)
    assert marked(example, tokenizer).strip("⟦\n⟧") == re.sub("[⟦⟧]", "", golden)
    assert (example.labels == example.input_ids).all()


def test_no_system_turn_when_there_is_no_system_prompt(markup, tokenizer):
    (example,) = examples_of([[("user", "Hello"), ("assistant", "Hi")]], markup, system_prompt="")
    assert marked(example, tokenizer) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n⟦Hi<|im_end|>⟧"


def test_what_is_asked_in_chat_is_what_was_trained(markup):
    """prompt_ids, from which generate and chat go on, are the ids of training up to the answer."""
    turns = [("user", "Hello"), ("assistant", "Hi"), ("user", "你是谁？"), ("assistant", "我是小洛。")]
    (example,) = examples_of([turns], markup)
    asked = markup.prompt_ids([Turn(*turn) for turn in turns[:-1]], SYSTEM)
    answer = [*markup.encode(["我是小洛。"])[0], markup.end]
    assert example.input_ids.tolist() == asked + answer


# ------------------------------------------------------------------------------ the models' own templates


def by_template(tokenizer, turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def assert_equals_template(tokenizer, markup, turns):
    """Training ids are the template's up to the last answer's end; behind that the template has what is not learned."""
    expected = by_template(tokenizer, turns)
    (example,) = examples_of([turns], markup, system_prompt="", max_length=10**6)
    found = example.input_ids.tolist()
    assert found == expected[: len(found)]
    rest = tokenizer.decode(expected[len(found) :])
    if turns[-1][0] == "assistant":
        assert rest == "\n"
    else:
        assert rest.startswith("\n<|im_start|>user\n")
        assert rest.count("<|im_start|>") == 1
    answers = sum(role == "assistant" for role, _ in turns)
    supervised = example.labels[example.labels != IGNORE].tolist()
    assert supervised.count(markup.end) == answers
    assert markup.start not in supervised


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("golden", GOLDENS)
def test_goldens_equal_apply_chat_template(name, golden, tokenizers, markups):
    turns = turns_of(GOLDENS[golden][0])
    turns = turns if turns[0][0] == "system" else [("system", SYSTEM), *turns]
    assert_equals_template(tokenizers[name], markups[name], turns)


def test_qwen3_without_system_turn(tokenizers, markups):
    assert_equals_template(tokenizers["qwen3"], markups["qwen3"], [("user", "Hello"), ("assistant", "Hi")])


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda text: text.strip() and not re.search(r"<\||think>", text)
)
stripped = texts.map(str.strip)
spaced = st.builds(
    "".join, st.tuples(st.sampled_from(["", " ", "\n", "\n\n", " \n\t"]), texts, st.sampled_from(["", "\n"]))
)
conversations = st.lists(st.tuples(spaced, stripped), min_size=1, max_size=3).map(
    lambda pairs: [turn for asked, reply in pairs for turn in (("user", asked), ("assistant", reply))]
)


@pytest.mark.parametrize("name", MODELS)
@given(system=spaced, turns=conversations)
@settings(FUZZ, max_examples=150)
def test_any_conversation_equals_apply_chat_template(name, system, turns, tokenizers, markups):
    """Of texts without markup, whatever their script, and of answers without white space at their ends."""
    assert_equals_template(tokenizers[name], markups[name], [("system", system), *turns])


def test_a_question_that_begins_with_a_newline(tokenizer, tmp_path):
    """Qwen has a token for two newlines: "user\\n" and "\\nHello" apart are not what "user\\n\\nHello" is.

    The demo's vocabulary is too small for it, so a copy learns it here.
    """
    tokenizer.save_pretrained(tmp_path)
    learned = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    learned["model"]["vocab"]["ĊĊ"] = two = len(tokenizer)
    learned["model"]["merges"].append(["Ċ", "Ċ"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(learned), "utf-8")
    other = loading.load_tokenizer(tmp_path)
    for prompts in ([("system", "\nS"), ("user", "\nU")], [("system", "S"), ("user", "U\n\n")]):
        conversation = [*prompts, ("assistant", "A")]
        assert two in by_template(other, conversation)
        assert_equals_template(other, ChatMarkup(other), conversation)


REASONED = [
    ("user", "1 + 8?"),
    ("assistant", "<think>\nEight and one.\n</think>\n\n9"),
    ("user", "And 2 + 2?"),
    ("assistant", "<think>\nTwo twos.\n</think>\n\n4"),
]


def test_qwen3_reasoning_of_earlier_turns_is_dropped_and_the_last_is_kept(tokenizers, markups):
    """As Qwen3's template does it, with the think tokens as control tokens; both are supervised."""
    assert_equals_template(tokenizers["qwen3"], markups["qwen3"], REASONED)
    (example,) = examples_of([REASONED], markups["qwen3"], system_prompt="")
    assert marked(example, tokenizers["qwen3"]) == (
        "<|im_start|>user\n1 + 8?<|im_end|>\n<|im_start|>assistant\n⟦9<|im_end|>⟧\n"
        "<|im_start|>user\nAnd 2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nTwo twos.\n</think>\n\n4<|im_end|>⟧"
    )
    assert [example.input_ids.tolist().count(i) for i in markups["qwen3"].think] == [1, 1]


@pytest.mark.parametrize(
    "turns",
    [
        [("user", "a"), ("assistant", "<think>\n\n</think>\n\nb")],
        [("user", "a"), ("assistant", "no opening\n</think>\n\nb")],
        [("user", "a"), ("assistant", "b"), ("assistant", "c")],
        [("user", "a"), ("assistant", "<think>\nr\n</think>\n\nb"), ("assistant", "c")],
        [("user", "a"), ("assistant", "b"), ("user", "last word")],
        [("assistant", "<think>\nr\n</think>\n\nb"), ("user", "a"), ("assistant", "c")],
        [("user", "a"), ("assistant", "<think>\nr\n</think>\n\n<think>\ns\n</think>\n\nb")],
    ],
    ids=["empty", "closed only", "two answers", "reasoned, then not", "unanswered", "reasoned first", "twice"],
)
def test_qwen3_odd_reasoning(turns, tokenizers, markups):
    assert_equals_template(tokenizers["qwen3"], markups["qwen3"], turns)


# ---------------------------------------------------------------------------------- markup is plain text


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("place", ["system", "user", "assistant"])
def test_markup_in_a_text_never_becomes_a_control_token(name, place, tokenizers, markups):
    """Else a row could end its own turn, or speak as somebody else (and so could who chats with the model)."""
    tokenizer, markup = tokenizers[name], markups[name]
    hostile = MARKUP.replace("<think>no</think>", "") if (name, place) == ("qwen3", "assistant") else MARKUP
    turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]
    clean = [*turns]
    turns = [(role, f"x{hostile}y" if role == place else content) for role, content in turns]
    (example,), (plain,) = (examples_of([each], markup) for each in (turns, clean))
    control = sorted({*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()})
    assert len(control) >= (5 if name.startswith("qwen3") else 3)
    found = {token: example.input_ids.tolist().count(token) for token in control}
    assert found == {token: plain.input_ids.tolist().count(token) for token in control}
    decoded = tokenizer.decode(example.input_ids.tolist())
    assert decoded.count(f"x{hostile}y") == sum(role == place for role, _ in turns)
    assert all(Turn(*turn).content in decoded for turn in turns)


@given(st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<|", "|>", "im_end", "a", " ", "\n", "<think>", "界"])))
@settings(FUZZ, max_examples=200)
def test_no_mixture_of_markup_becomes_a_control_token(markups, parts):
    text = "".join(parts)
    for markup in markups.values():
        (ids,) = markup.encode([text])
        assert not {markup.start, markup.end, *markup.think} & set(ids)


def test_a_tokenizer_without_chatml_is_refused(tokenizer):
    class Other:
        chat_template = None
        backend_tokenizer = ChatMarkup(tokenizer)._plain  # has no control tokens

    with pytest.raises(DataError, match=r"no <\|im_start\|> or <\|im_end\|>"):
        ChatMarkup(Other)


# ------------------------------------------------------------------------------------------- truncation

LONG = [("user", "Hello"), ("assistant", "one two three four five six"), ("user", "again?"), ("assistant", "yes")]


def test_truncated_at_every_length(markup):
    """No end token is made up; what is left is a prefix of the whole; without a supervised token nothing is left."""
    (whole,) = examples_of([LONG], markup)
    ids, labels = whole.input_ids.tolist(), whole.labels.tolist()
    first = next(i for i, label in enumerate(labels) if label != IGNORE)
    assert first > 10
    for limit in range(2, len(ids) + 2):
        if limit <= first:
            with pytest.raises(DataError, match=f"max_length {limit}"):
                examples_of([LONG], markup, max_length=limit)
            continue
        (cut,), report = examples_and_report([LONG], markup, max_length=limit)
        kept = len(cut.input_ids)
        assert kept <= limit
        assert cut.input_ids.tolist() == ids[:kept]
        assert cut.labels.tolist() == labels[:kept]
        assert set(labels[kept:limit]) <= {IGNORE}  # nothing is lost that could be learned
        assert cut.input_ids.tolist().count(markup.end) == ids[:kept].count(markup.end)
        assert report.truncated == (limit < len(ids))


def test_truncation_leaves_nothing_behind_the_last_supervised_token(markup):
    """`tokenize` promises it: such tokens cost time and cannot reach the loss."""
    (whole,) = examples_of([LONG], markup)
    first = int(np.flatnonzero(whole.labels != IGNORE)[0])
    for limit in range(first + 1, len(whole.input_ids)):
        (cut,) = examples_of([LONG], markup, max_length=limit)
        assert cut.labels[-1] != IGNORE, f"max_length {limit}"


def test_rows_with_nothing_left_to_learn_are_dropped_and_counted(markup):
    rows = [[("user", "a"), ("assistant", "b")], [("user", "word " * 200), ("assistant", "b")], LONG]
    dataset, report = examples_and_report(rows, markup, max_length=60)
    assert dataset.lines.tolist() == [1, 3]
    assert (report.kept, report.dropped_unsupervised, report.dropped_overlong) == (2, 1, 0)
    with pytest.raises(DataError, match="no example is left"):
        examples_of([rows[1]], markup, max_length=60)


def test_overlong_drop_and_error(markup):
    short, long = [("user", "a"), ("assistant", "b")], [("user", "a"), ("assistant", "word " * 200)]
    rows = [short, long, short, long]
    dataset, report = examples_and_report(rows, markup, max_length=60, overlong="drop")
    assert dataset.lines.tolist() == [1, 3]
    assert (report.kept, report.dropped_overlong, report.truncated, report.dropped_unsupervised) == (2, 2, 0, 0)
    with pytest.raises(DataError) as caught:
        examples_of(rows, markup, max_length=60, overlong="error")
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:-1]] == ["rows.jsonl:2", "rows.jsonl:4"]
    assert all("more than max_length 60" in line for line in lines[:-1])
    assert "2 rows" in lines[-1]
    exact = len(examples_of([short], markup)[0].input_ids)  # exactly max_length is not too long
    assert len(examples_of([short], markup, max_length=exact, overlong="error")) == 1
    with pytest.raises(DataError):
        examples_of([short], markup, max_length=exact - 1, overlong="error")


# ------------------------------------------------------------------------------------- report and split


def numbered(count, seed=0):
    rng = random.Random(seed)
    return [[("user", f"question {i}"), ("assistant", "word " * rng.randrange(1, 40) + str(i))] for i in range(count)]


def test_report_counts_and_percentiles(markup):
    dataset, report = examples_and_report(numbered(101), markup)
    lengths = sorted(len(example.input_ids) for example in dataset)
    assert report.lengths == {"p50": lengths[50], "p95": lengths[95], "max": lengths[100]}
    assert len(set(report.lengths.values())) == 3
    assert (report.kept, report.tokens) == (101, sum(lengths))
    assert report.supervised_tokens == sum(int((example.labels != IGNORE).sum()) for example in dataset)
    assert dataset.lengths.tolist() == [len(example.input_ids) for example in dataset]
    assert report.truncated == report.dropped_overlong == report.dropped_unsupervised == 0


def test_what_a_run_says_of_its_data():
    reading = Reading("f.jsonl", "", "", 0, 9, ("f.jsonl:2: x",), Counter())
    figures = Figures(4, {"p50": 10, "p95": 20, "max": 3000}, 200, 50)
    report = put_together(reading, Cut(3, 2, 2), figures)
    first, second = data_report.describe_data(report)
    assert first == "f.jsonl: 4 of 9 rows kept; dropped: 1 bad, 2 longer than max_length, 2 nothing supervised"
    assert second == "tokens a row p50 / p95 / max: 10 / 20 / 3,000; 25 % supervised; 3 rows truncated"


def test_a_data_set_is_a_sequence(markup):
    rows = numbered(7)
    dataset = examples_of(rows, markup)
    one_by_one = [examples_of([row], markup)[0] for row in rows]
    assert len(dataset) == 7
    for index in (*range(7), np.int64(3)):
        assert (dataset[index].input_ids == one_by_one[index].input_ids).all()
        assert (dataset[index].labels == one_by_one[index].labels).all()
    picked = dataset.subset([5, 0, 5])
    assert picked.lines.tolist() == [6, 1, 6]
    assert (picked[1].input_ids == one_by_one[0].input_ids).all()
    assert dataset[0].input_ids.dtype == dataset[0].labels.dtype == np.int32


def test_a_slice_of_a_data_set_is_a_data_set(markup):
    """`dataset[0:2]` once was a TypeError of numpy's."""
    dataset = examples_of(numbered(7), markup)
    for part in (slice(0, 2), slice(3, 4), slice(None, None, -2), slice(9, 12)):
        found = dataset[part]
        assert isinstance(found, Dataset)
        assert found.lines.tolist() == list(range(1, 8))[part]
        assert [each.input_ids.tolist() for each in found] == [dataset[i].input_ids.tolist() for i in range(7)[part]]
    assert (dataset[-1].input_ids == dataset[6].input_ids).all()
    for index in (1.0, [0], np.array([0]), "0", None):
        with pytest.raises(TypeError):
            dataset[index]
    with pytest.raises(IndexError):
        dataset[7]


@pytest.mark.parametrize(("val_size", "expected"), [(0.25, 10), (0.1, 4), (0.001, 1), (0.98, 39), (0.5, 20)])
def test_split(val_size, expected, markup):
    dataset = examples_of(numbered(40), markup)
    if expected == 39:
        with pytest.raises(DataError, match="leaves no example"):
            split(dataset.subset(range(2)), val_size, seed=1)
    train, held_out = split(dataset, val_size, seed=1)
    assert len(held_out) == expected
    lines = train.lines.tolist(), held_out.lines.tolist()
    assert sorted(lines[0] + lines[1]) == list(range(1, 41))
    assert all(part == sorted(part) for part in lines)
    repeated, _ = split(dataset, val_size, seed=1)
    assert repeated.lines.tolist() == lines[0]
    others = {tuple(split(dataset, val_size, seed)[1].lines.tolist()) for seed in range(8)}
    assert len(others) > 1
    originals = {int(line): dataset[i] for i, line in enumerate(dataset.lines)}
    for example, line in zip(held_out, held_out.lines, strict=True):
        assert (example.labels == originals[int(line)].labels).all()


def test_no_split_without_val_size(markup):
    dataset = examples_of(numbered(3), markup)
    assert split(dataset, 0.0, seed=1) == (dataset, None)


# ---------------------------------------------------------------------------------------- hostile files

GOOD = b'{"instruction": "Give the opposite.", "input": "thick", "output": "thin"}'


def line(**fields):
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass")


def escaped(**fields):
    return json.dumps(fields).encode()


BAD_LINES = {
    "Latin-1": (
        line(instruction="a", output="b") + "é".encode("latin-1"),
        r"not UTF-8 \(byte 36 of the line is 0xe9\)",
    ),
    "UTF-8 cut off": ('{"instruction": "a", "output": "界'.encode()[:-1], "not UTF-8"),
    "surrogates as UTF-8": (b'{"instruction": "a", "output": "\xed\xa0\x80"}', "not UTF-8"),
    "half a surrogate pair": (b'{"instruction": "a", "output": "\\ud800"}', "'output' holds half of a surrogate pair"),
    "half in the prompt": (b'{"instruction": "\\udc00 a", "output": "b"}', "'instruction' holds half of a surrogate"),
    "NUL": (b'{"instruction": "a\0", "output": "b"}', "control character"),
    "only NULs": (b"\0\0\0", "not one JSON value"),
    "tab in a string": (b'{"instruction": "a\tb", "output": "b"}', "control character"),
    "BOM in the middle": (b"\xef\xbb\xbf" + GOOD, "BOM"),
    "no JSON": (b"instruction: a", r"not one JSON value: .*column 1\b"),
    "cut off": (GOOD[:-9], "not one JSON value"),
    "single quotes": (b"{'instruction': 'a', 'output': 'b'}", "not one JSON value"),
    "trailing comma": (b'{"instruction": "a", "output": "b",}', "not one JSON value"),
    "two objects": (GOOD + b" " + GOOD, "not one JSON value: Extra data"),
    "number": (b"17", "object is needed, this is a number"),
    "float": (b"1e3", "object is needed, this is a number"),
    "text": (b'"instruction"', "object is needed, this is a text"),
    "true": (b"true", "object is needed, this is true or false"),
    "null": (b"null", "object is needed, this is null"),
    "array": (b"[" + GOOD + b"]", "object is needed, this is a list"),
    "NaN": (b'{"instruction": "a", "output": "b", "score": NaN}', "NaN is not JSON"),
    "Infinity": (b'{"instruction": "a", "output": "b", "score": -Infinity}', "-Infinity is not JSON"),
    "5,000 digits": (b'{"instruction": "a", "output": "b", "n": ' + b"9" * 5000 + b"}", "5000 digits"),
    "200,000 deep": (b"[" * 200_000, "nested too deeply"),
    "200,000 deep in a field": (b'{"instruction": ' + b'{"a":' * 200_000, "nested too deeply"),
    "a key twice": (b'{"instruction": "a", "output": "b", "output": "c"}', "the key 'output' is twice"),
    "empty object": (b"{}", "'instruction' is missing"),
    "no output": (line(instruction="a", input="x"), "'output' is missing"),
    "no instruction": (line(input="x", output="b"), "'instruction' is missing"),
    "null output": (line(instruction="a", output=None), "'output' must be a text, this is null"),
    "number as output": (line(instruction="a", output=9), "'output' must be a text, this is a number"),
    "list as instruction": (line(instruction=["a"], output="b"), "'instruction' must be a text, this is a list"),
    "object as input": (line(instruction="a", input={"b": 1}, output="b"), "'input' must be a text, this is an object"),
    "true as system": (line(system=True, instruction="a", output="b"), "'system' must be a text, this is true or f"),
    "empty output": (line(instruction="a", output=""), "'output' is empty"),
    "blank output": (line(instruction="a", output=" \n"), "'output' is empty"),
    "empty instruction": (line(instruction="", output="b"), "'instruction' is empty"),
    "another format": (line(prompt="a", completion="b"), "'instruction' is missing"),
    "other names": (line(Instruction="a", Output="b"), "'instruction' is missing"),
}


def write(path, lines, end=b"\n"):
    path.write_bytes(b"".join(each + end for each in lines))
    return str(path)


def reported(error, file):
    """{line number: reason} of a DataError, and the lines that name no line."""
    found, others = {}, []
    for each in str(error).splitlines():
        if match := re.fullmatch(rf"{re.escape(file)}:(\d+): (.+)", each):
            assert int(match[1]) not in found
            found[int(match[1])] = match[2]
        else:
            others.append(each)
    return found, others


def test_every_bad_line_is_reported_at_once_with_its_number_and_reason(tmp_path):
    """Bad lines stand between good and empty ones; each has its file, 1-based number and reason; good rows survive."""
    assert len(BAD_LINES) <= MAX_PROBLEMS_SHOWN
    lines = [GOOD]
    numbers = {}
    for name, (bad, _) in BAD_LINES.items():
        lines += [b"", bad, b"  \r", GOOD]
        numbers[name] = len(lines) - 2
    file = write(tmp_path / "rows.jsonl", lines)
    with pytest.raises(DataError) as caught:
        read_rows(file)
    found, others = reported(caught.value, file)
    assert set(found) == set(numbers.values())
    for name, (_, reason) in BAD_LINES.items():
        assert re.search(reason, found[numbers[name]]), f"{name}: {found[numbers[name]]}"
        assert len(found[numbers[name]]) < 300, name
    assert len(others) == 1
    assert f"{len(BAD_LINES)} of {2 * len(BAD_LINES) + 1} rows are bad" in others[0]
    assert "--on_bad_rows skip" in others[0]
    str(caught.value).encode("utf-8")

    rows, report = read_rows(file, "skip")
    assert [row.line for row in rows] == [i for i, each in enumerate(lines, 1) if each == GOOD]
    assert len({row.turns for row in rows}) == 1
    assert report.rows == 2 * len(BAD_LINES) + 1
    assert {int(each.split(":")[1]) for each in report.bad} == set(numbers.values())


MESSAGES = {
    "no list": ({"role": "user", "content": "a"}, "must be a list of turns, this is an object"),
    "a text": ("hello", "must be a list of turns, this is a text"),
    "null": (None, "must be a list of turns"),
    "empty": ([], "must be a list of turns, this is empty"),
    "texts": (["a", "b"], "message 1 must be an object, this is a text"),
    "wrong role": (
        [{"role": "human", "content": "a"}],
        "message 1 has the role 'human'; the roles are system, user, as",
    ),
    "role in capitals": ([{"role": "User", "content": "a"}], "message 1 has the role 'User'"),
    "no role": ([{"content": "a"}], "message 1 has the role None"),
    "a list as role": ([{"role": ["user"], "content": "a"}], "message 1 has the role"),
    "tool": ([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}], "message 2 has the role 'tool'"),
    "no content": ([{"role": "user"}], "message 1: the field 'content' is missing"),
    "null content": ([{"role": "user", "content": None}], "message 1: 'content' must be a text, this is null"),
    "parts": ([{"role": "user", "content": [{"text": "a"}]}], "message 1: 'content' must be a text, this is a list"),
    "empty content": ([{"role": "user", "content": " "}], "message 1: 'content' is empty"),
    "no assistant": ([{"role": "user", "content": "a"}], "no assistant turn: there is nothing to learn"),
    "system second": (
        [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "assistant", "content": "c"}],
        "message 2 is a system turn; only the first message may be one",
    ),
    "system twice": (
        [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, {"role": "assistant", "content": "c"}],
        "message 2 is a system turn",
    ),
}


def test_every_bad_conversation_is_reported(tmp_path):
    good = {"role": "assistant", "content": "b"}
    fine = line(messages=[{"role": "user", "content": "a"}, good])
    lines = [fine, *(line(messages=messages) for messages, _ in MESSAGES.values())]
    lines += [line(system="s", messages=[{"role": "system", "content": "a"}, good]), line(instruction="a", output="b")]
    reasons = [reason for _, reason in MESSAGES.values()]
    reasons += ["there is a 'system' field and a system message", "the field 'messages' is missing"]
    file = write(tmp_path / "rows.jsonl", lines)
    with pytest.raises(DataError) as caught:
        read_rows(file)
    found, _ = reported(caught.value, file)
    assert list(found) == list(range(2, len(lines) + 1))
    for reason, text in zip(reasons, found.values(), strict=True):
        assert reason in text
    assert [row.line for row in read_rows(file, "skip")[0]] == [1]


ANSWERED = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CALLS = [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]
MEANING = {  # fields that once were dropped, and training went on
    "history": [["a", "b"]],
    "reasoning_content": "1 + 1 is 2.",
    "reasoning": "1 + 1 is 2.",
    "thinking": "1 + 1 is 2.",
    "tools": [{"type": "function"}],
    "tool_calls": CALLS,
    "function_call": {"name": "f"},
    "images": ["a.png"],
}
EMPTY = (None, "", " ", "[]", [], {}, False)


@pytest.mark.parametrize("name", MEANING)
def test_a_field_that_changes_what_a_row_means_is_refused_by_its_name(name, tmp_path):
    """In a row of each format and in a message; an empty one is harmless."""
    asked, answer = ANSWERED
    rows = [{"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"}, {"messages": ANSWERED}]
    for row in rows:
        file = write(tmp_path / "rows.jsonl", [line(**row), line(**row, **{name: MEANING[name]})])
        with pytest.raises(DataError) as caught:
            read_rows(file)
        found, _ = reported(caught.value, file)
        assert found[2].startswith(f"the field {name!r} changes what this row means and is not read yet. ")
        assert [each.line for each in read_rows(file, "skip")[0]] == [1]
        read_rows(write(tmp_path / "rows.jsonl", [line(**row, **{name: value}) for value in EMPTY]))
    for content in ("b", None):  # beside a text, and alone
        messages = [asked, answer | {"content": content, name: MEANING[name]}]
        with pytest.raises(ValueError, match=rf"message 2: the field '{name}' changes what this row means"):
            to_turns({"messages": messages}, "messages")
    for value in EMPTY:
        assert len(to_turns({"messages": [asked, answer | {name: value}]}, "messages")) == 2


@pytest.mark.parametrize("name", ["weight", "train", "loss"])
def test_a_message_that_says_it_is_not_learned_is_refused(name):
    for number, learned in enumerate((0, 1)):
        for value in (0, 1, False, True, 0.5, None):
            messages = [*map(dict, ANSWERED)]
            messages[number][name] = value
            if value in (learned, None):
                assert len(to_turns({"messages": messages}, "messages")) == 2
                continue
            with pytest.raises(ValueError, match=f"message {number + 1}: the field '{name}' changes what is learned"):
                to_turns({"messages": messages}, "messages")


def test_every_verb_refuses_such_a_row(tmp_path, tiny_folder, capsys):
    """`eval`, `generate` and `preview` once said nothing of the field, `train` only named it in its header."""
    file = write(tmp_path / "rows.jsonl", [line(instruction="a", output="b", history=[["c", "d"]])])
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": CALLS}, *ANSWERED]
    talk = write(tmp_path / "talk.jsonl", [line(messages=turns)])
    for path, name in ((file, "history"), (talk, "tool_calls")):
        for command in (
            ["train", "demo", "--train_file", path, "--output_dir", tmp_path / "run"],
            ["preview", path],
            ["eval", "--eval_file", path],
            ["generate", "--input_file", path, "--output_file", tmp_path / "answers.jsonl"],
        ):
            assert cli.main(list(map(str, [*command, "--model", tiny_folder]))) == 2
            assert re.search(rf"{path}:1: .*the field '{name}' changes what this row means", capsys.readouterr().err)


def test_more_bad_lines_than_are_shown_are_counted(tmp_path):
    file = write(tmp_path / "rows.jsonl", [GOOD, *[b"{"] * (MAX_PROBLEMS_SHOWN + 7)])
    with pytest.raises(DataError) as caught:
        read_rows(file)
    found, others = reported(caught.value, file)
    assert list(found) == list(range(2, MAX_PROBLEMS_SHOWN + 2))
    assert others[0] == "... and 7 more"


def test_lines_end_at_newlines_only(tmp_path):
    """JSON strings may hold U+2028, U+0085 and other characters at which text-mode reading or splitlines() cuts."""
    odd = "a\u2028b\u2029c\x85d\x7f\u00a0e"
    lines = [line(instruction=odd, output=odd), GOOD, line(instruction="x", output="y")]
    assert len(lines[0].decode().splitlines()) > 1
    for end in (b"\n", b"\r\n", b" \t\r\n", b"\n\n\r\n"):
        rows, report = read_rows(write(tmp_path / "rows.jsonl", lines, end))
        assert [row.turns[0].content for row in rows] == [odd, "Give the opposite.\nthick", "x"]
        assert rows[0].turns[1].content == odd
        assert report.rows == 3
        assert [row.line for row in rows] == ([1, 4, 7] if end.count(b"\n") == 3 else [1, 2, 3])


def test_byte_order_mark_and_missing_last_newline(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD)
    rows, report = read_rows(path)
    assert [row.line for row in rows] == [1, 2]
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.format == "instruction/output"


def test_utf16_is_named_not_guessed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((GOOD + b"\n" + GOOD).decode().encode("utf-16"))
    with pytest.raises(DataError, match=r"rows.jsonl: this is UTF-16; UTF-8 is needed"):
        read_rows(path)


def test_unicode_survives_untouched(tmp_path):
    text = "é e\u0301 界 👩‍🚀 \ufeff \u202e \U0010ffff \x7f \u0000"
    rows, _ = read_rows(write(tmp_path / "rows.jsonl", [escaped(instruction=text, output=text)]))
    assert rows[0].turns == (Turn("user", text), Turn("assistant", text))


def test_a_line_of_20_mb(tmp_path):
    """It is named; the rows around it are kept."""
    long = line(instruction="a", output="b" * 20 * 2**20)
    file = write(tmp_path / "rows.jsonl", [GOOD, long, GOOD])
    with pytest.raises(DataError) as caught:
        read_rows(file)
    found, _ = reported(caught.value, file)
    assert list(found) == [2]
    assert f"the line has more than {MAX_LINE_BYTES:,} bytes" in found[2]
    assert [row.line for row in read_rows(file, "skip")[0]] == [1, 3]


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf", b" \r\n\t\n"])
@pytest.mark.parametrize("on_bad_rows", ["error", "skip"])
def test_an_empty_file(content, on_bad_rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows.jsonl: it holds no rows"):
        read_rows(path, on_bad_rows)


def test_skip_with_nothing_left_says_why(tmp_path):
    file = write(tmp_path / "rows.jsonl", [b"17", b"{"])
    with pytest.raises(DataError, match=r"all 2 rows are bad, the first: .*rows.jsonl:1: a JSON object"):
        read_rows(file, "skip")


def test_not_a_file(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match=r"none.jsonl cannot be read: No such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="cannot be read: Not a directory"):
        read_rows(Path(__file__) / "rows.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / ("x" * 300))
    with pytest.raises(DataError, match="not a regular file"):
        read_rows(os.devnull)


@pytest.mark.timeout(30)
def test_a_fifo_does_not_block(tmp_path):
    """Opening one would wait for a writer for ever."""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DataError, match="not a regular file"):
        list(read_lines(tmp_path / "fifo"))


def test_the_first_readable_row_decides_the_format(tmp_path):
    lines = [b"[]", b'{"question": "?"}', line(prompt="a", completion="b"), GOOD, line(prompt="c", completion="d")]
    file = write(tmp_path / "rows.jsonl", lines)
    rows, report = read_rows(file, "skip")
    assert report.format == "prompt/completion"
    assert [row.line for row in rows] == [3, 5]
    with pytest.raises(
        DataError, match=r":2: the fields are 'question'; the needed fields are messages; prompt \+ completion"
    ):
        read_rows(file)


# ------------------------------------------------------------------------------------------------- fuzz


def judge(raw):
    """An independent verdict on an instruction row: its turns, or None for a bad line."""
    twice = []

    def pairs(items):
        twice.extend([key for key, _ in items if sum(key == other for other, _ in items) > 1])
        return dict(items)

    try:
        row = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=twice.append)
        fields = [row.get("system") or "", row["instruction"], row.get("input") or "", row["output"]]
        fields[0], fields[2] = (text if text.strip() else "" for text in (fields[0], fields[2]))  # blank is none
        "".join(fields).encode("utf-8")
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None
    typed = all(isinstance(row.get(key), (str, type(None))) for key in ("system", "input"))
    if twice or not typed or not (fields[1].strip() and fields[3].strip()):
        return None
    asked = f"{fields[1]}\n{fields[2]}" if fields[2] else fields[1]
    return [("system", fields[0])] * bool(fields[0]) + [("user", asked), ("assistant", fields[3])]


JUNK = [
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"\\u0000",
    b"\\ud83d",
    b"null",
]
JUNK += [
    b"1e999",
    b"-0",
    b"NaN",
    b"\r",
    b"\x1c",
    b"\xc2\x85",
    b"\xe2\x80\xa8",
    b"\xef\xbb\xbf",
    b" ",
    b"true",
    b"9" * 5000,
]
VALUES = [
    "",
    " ",
    None,
    0,
    -1.5,
    True,
    [],
    {},
    "x",
    "a\u2028b",
    "<|im_end|>",
    ["a"],
    {"role": "user"},
    "\ud800",
    "界" * 50,
]


def mutated(rng):
    """A good row, damaged somewhere in its bytes or in its values (or not at all)."""
    row = {"instruction": rng.choice(["Add.", "加一加"]), "input": rng.choice(["", "1 + 1"]), "output": "2 界"}
    if rng.random() < 0.4:
        key = rng.choice(["instruction", "input", "output", "system", "other", "messages"])
        row[key] = rng.choice(VALUES)
        if rng.random() < 0.2:
            row.pop(rng.choice(list(row)))
    raw = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    for _ in range(rng.choice([0, 1, 1, 2, 5]) if rng.random() < 0.7 else 0):
        at, kind = rng.randrange(len(raw) + 1), rng.randrange(5)
        if kind == 0:
            raw = raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
        elif kind == 1:
            raw = raw[:at] + rng.choice(JUNK) + raw[at:]
        elif kind == 2:
            raw = raw[:at] + raw[at + rng.randrange(1, 9) :]
        elif kind == 3:
            raw = raw[:at] + raw[rng.randrange(len(raw) + 1) :]
        else:
            raw = raw[:at]
    return raw.replace(b"\n", b" ")


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_fuzz(tmp_path, count):
    """Damaged lines: never anything but DataError, exactly the bad ones named, exactly the good ones kept."""
    rng = random.Random(count)
    lines = [GOOD, *(mutated(rng) for _ in range(count))]
    verdicts = {number: judge(raw) for number, raw in enumerate(lines, 1) if raw.strip()}
    bad = [number for number, turns in verdicts.items() if turns is None]
    assert count // 4 < len(bad) < 3 * count // 4
    print(f"\n{count:,} fuzzed lines: {len(bad):,} bad ones named, {len(verdicts) - len(bad):,} good ones kept")
    file = write(tmp_path / "rows.jsonl", lines)
    rows, report = read_rows(file, "skip")
    assert [int(re.fullmatch(rf"{file}:(\d+): (?s:.+)", each)[1]) for each in report.bad] == bad
    assert {row.line: [(turn.role, turn.content) for turn in row.turns] for row in rows} == {
        number: turns for number, turns in verdicts.items() if turns is not None
    }
    with pytest.raises(DataError) as caught:
        read_rows(file)
    found, others = reported(caught.value, file)
    assert list(found) == bad[:MAX_PROBLEMS_SHOWN]
    assert others[0] == f"... and {len(bad) - MAX_PROBLEMS_SHOWN:,} more"


@given(st.lists(st.one_of(st.binary(max_size=30), st.sampled_from([GOOD, *(bad for bad, _ in BAD_LINES.values())]))))
@settings(FUZZ, max_examples=150)
def test_any_bytes_are_rows_or_a_data_error(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        rows, _ = read_rows(path)
    except DataError:
        return
    assert rows


# --------------------------------------------------------------------------------------------- our files

OURS = {
    "data": (ROOT / "data/train.jsonl", ROOT / "data/valid.jsonl", 600),
    "demo": (demo.TRAIN_FILE, demo.EVAL_FILE, 300),
}


def raw_rows(path):
    return [json.loads(each) for each in path.read_text("utf-8").split("\n") if each]


@pytest.mark.parametrize("name", OURS)
def test_our_files_are_good(name, markup):
    train, valid, at_least = OURS[name]
    for path, needed in ((train, at_least), (valid, 50)):
        rows, report = read_rows(path)
        assert report.bad == ()
        assert report.format == "instruction/output"
        assert len(rows) == len(raw_rows(path)) >= needed
        dataset, _ = tokenize(
            rows, markup, report, system_prompt=SYSTEM, max_length=1024, overlong="error", train_on_prompt=False
        )
        assert len(dataset) == len(rows)
    questions = [(row["instruction"].strip(), row["input"].strip()) for row in raw_rows(train)]
    held_out = [(row["instruction"].strip(), row["input"].strip()) for row in raw_rows(valid)]
    assert len(set(held_out)) == len(held_out)
    assert not set(held_out) & set(questions)
    if name == "data":  # the demo asks some of its questions twice
        assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("name", OURS)
def test_our_files_teach_a_name(name):
    for path, at_least in ((OURS[name][0], 10), (OURS[name][1], 2)):
        answers = [row["output"] for row in raw_rows(path)]
        for own in ("小洛", "Xiaoluo"):
            assert sum(own in answer for answer in answers) >= at_least
        assert sum("minilora" in answer for answer in answers) >= at_least
    outputs = " ".join(row["output"] for row in raw_rows(OURS[name][0]))
    assert not re.search(r"Qwen|通义|Alibaba|阿里|OpenAI|ChatGPT", outputs)


OPERATORS = {"+": operator.add, "-": operator.sub, "×": operator.mul, "÷": operator.truediv}
OPERATORS |= {"加": operator.add, "减": operator.sub, "plus": operator.add, "minus": operator.sub}
SUM = re.compile(r"(\d+) ?(" + "|".join(map(re.escape, OPERATORS)) + r") ?(\d+)")


def sums_of(path):
    """[(first, operator, second, answer)] of the rows that ask for a sum in figures."""
    found = []
    for row in raw_rows(path):
        if match := SUM.search(f"{row['instruction']} {row['input']}"):
            numbers = re.findall(r"\d+", row["output"])
            found.append((int(match[1]), match[2], int(match[3]), int(numbers[-1])))
    return found


@pytest.mark.parametrize("name", OURS)
def test_our_sums_are_right(name):
    asked = {}
    for path, at_least in ((OURS[name][0], 50), (OURS[name][1], 5)):
        sums = sums_of(path)
        assert len(sums) >= at_least
        assert [each for each in sums if OPERATORS[each[1]](each[0], each[2]) != each[3]] == []
        asked[path] = {(a, OPERATORS[sign], b) for a, sign, b, _ in sums}
    if name == "data":  # its README: no held-out sum is in the training file, also not turned round
        turned = {(b, sign, a) for a, sign, b in asked[OURS[name][0]] if sign in (operator.add, operator.mul)}
        assert not asked[OURS[name][1]] & (asked[OURS[name][0]] | turned)


def test_our_word_problems_are_right():
    """Rows with two numbers in the question: the number that is new in the answer follows from them."""
    checked = 0
    for path in OURS["data"][:2]:
        for row in raw_rows(path):
            asked = [int(number) for number in re.findall(r"\d+", f"{row['instruction']} {row['input']}")]
            results = [int(number) for number in re.findall(r"\d+", row["output"]) if int(number) not in asked]
            if len(asked) == 2 and len(results) == 1 and not SUM.search(row["instruction"] + row["input"]):
                a, b = asked
                assert results[0] in (a + b, abs(a - b), a * b, a / b if b else None), row
                checked += 1
    assert checked >= 10


def test_the_data_page_counts_rightly():
    page = (ROOT / "data/README.md").read_text("utf-8")
    for path in OURS["data"][:2]:
        count = re.search(rf"`{path.name}` \| (\d+) \|", page)
        assert count
        assert int(count[1]) == len(raw_rows(path))
    for shape in re.findall(r"```json\n\s*(.+)\n", page):
        assert detect_format(json.loads(shape))
