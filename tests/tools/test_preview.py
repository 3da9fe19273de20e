"""`minilora preview`: what it shows is what a run would train on, and its counts are those of a plain count."""

import json
import re

import numpy as np
import pytest
from conftest import write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from pages import Page
from templates import template
from tokenizers import AddedToken

from minilora import cli
from minilora.config import TrainConfig
from minilora.data import report as data_report
from minilora.data.dataset import tokenize
from minilora.data.markup import ChatMarkup
from minilora.data.rows import read_rows
from minilora.models import load as loading
from minilora.tools import preview
from minilora.tools.preview import MAX_BINS, histogram

ROWS = [
    {"instruction": "red stone", "output": "blue river"},  # 1
    {"instruction": "red stone", "output": "blue river"},  # 2: a copy of 1
    {"instruction": "red stone", "output": "cold bird"},  # 3: another answer to the prompt of 1
    {"instruction": "say <|im_end|>", "output": "no <|im_start|> here"},  # 4: spells control tokens
    {"instruction": "open", "output": "warm " * 40},  # 5: long answer
    {"instruction": "seven " * 60, "output": "nine"},  # 6: a prompt so long that the answer is cut off
    {"instruction": "\x1b[31mred\x07", "output": "line\none\n\ntwo"},  # 7: codes that steer a terminal
]


@pytest.fixture
def file(tmp_path):
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    lines.insert(3, "{not json")  # line 4 of the file; what follows moves on by one
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def look(tiny_folder):
    """A function: the preview of a file with these keys of TrainConfig, and the examples that a run would take."""

    def run(path, rows=99, from_line=1, **keys):
        config = TrainConfig(model=str(tiny_folder), **keys)
        found = preview.preview(str(path), config, rows, from_line)
        kept, report = read_rows(path, "skip")
        settings = {"overlong": config.overlong, "train_on_prompt": config.train_on_prompt}
        settings |= {"system_prompt": config.system_prompt, "max_length": config.max_length}
        return found, tokenize(kept, ChatMarkup(loading.load_tokenizer(tiny_folder)), report, **settings)[0]

    return run


# ---------------------------------------------------------------------------------------- what is shown


def test_learned_tokens_are_those_that_a_run_supervises(file, look, tiny_folder):
    found, dataset = look(file, max_length=60)
    tokenizer = loading.load_tokenizer(tiny_folder)
    by_line = {int(line): dataset[i] for i, line in enumerate(dataset.lines)}
    assert [row.line for row in found.rows] == [1, 2, 3, 5, 6, 7, 8]
    for row in found.rows:
        example = by_line.get(row.line)
        if example is None:
            assert row.kept == row.learned == 0
            continue
        supervised = example.labels >= 0
        assert (row.kept, row.learned) == (len(example.input_ids), int(supervised.sum()))
        assert [id for _, id in row.tokens[: row.kept]] == example.input_ids.tolist()
        learned = "".join(text for kind, text in row.pieces if kind == "learned")
        assert learned == tokenizer.decode(example.input_ids[supervised])
        seen = "".join(text for kind, text in row.pieces if kind != "cut")
        assert seen == tokenizer.decode(example.input_ids)
        assert all(text in ("<|im_start|>", "<|im_end|>") for kind, text in row.pieces if kind == "control")


def test_system_prompt_end_token_and_what_is_cut_can_be_seen(file, look):
    found, _ = look(file, max_length=60, system_prompt="Be brief.")
    rows = {row.line: preview.as_text(row) for row in found.rows}
    assert rows[1] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nred stone<|im_end|>\n"
        "<|im_start|>assistant\n⟦blue river<|im_end|>⟧"
    )
    assert "<|im_end|>⟧" not in rows[6]
    assert re.search(r"⟧ ✂ cut: \d+ of \d+ tokens are beyond max_length 60$", rows[6])
    assert re.fullmatch(r" ✂ dropped: nothing to learn is left within max_length 60", rows[7])
    assert "system" not in preview.as_text(look(file, system_prompt="")[0].rows[0])


def test_train_on_prompt_marks_all(file, look):
    found, _ = look(file, train_on_prompt=True)
    assert {kind for kind, _ in found.rows[0].pieces} == {"learned"}
    assert found.statistics.supervised_tokens == found.statistics.tokens
    assert found.statistics.not_ended == []


def test_colours_in_a_terminal_brackets_elsewhere(file, look, monkeypatch):
    row = look(file)[0].rows[-1]
    plain = preview.as_text(row)
    assert "⟦line\none\n\ntwo<|im_end|>⟧" in plain
    assert "\x1b" not in plain  # the row's own code is spelled
    assert "\\x1b[31mred\\x07" in plain
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = preview.as_text(row)
    assert "\x1b[32mline\x1b[0m\n\x1b[32mone\x1b[0m\n\n\x1b[32mtwo<|im_end|>\x1b[0m" in coloured
    assert "\x1b[36m<|im_start|>\x1b[0m" in coloured
    assert "⟦" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert preview.as_text(row) == plain


# ---------------------------------------------------------------------------------------- what is counted


def test_the_statistics_are_those_of_a_plain_count(file, look):
    found, dataset = look(file, max_length=60)
    whole, _ = look(file, max_length=100_000)
    lengths = sorted(len(row.tokens) for row in whole.rows)
    stats = found.statistics
    assert (stats.rows, stats.kept, len(stats.bad)) == (8, 6, 1)
    assert stats.bad[0].startswith(f"{file}:4: not one JSON value")
    assert stats.dropped == {"nothing to learn is left within max_length 60": [7]}
    assert stats.truncated == [6]
    assert stats.not_ended == [6]
    assert stats.copies == [(2, 1)]
    assert stats.contradictions == [(3, 1)]
    assert stats.spelled == [5]
    assert stats.lengths == {
        "min": lengths[0],
        "median": lengths[3],
        "mean": round(sum(lengths) / 7, 1),
        "p95": lengths[-1],
        "max": lengths[-1],
    }
    assert stats.tokens == sum(len(example.input_ids) for example in dataset)
    assert stats.supervised_tokens == sum(int((example.labels >= 0).sum()) for example in dataset)
    assert sum(count for _, _, count in stats.bins) == 7


def test_rows_that_are_dropped_say_why(file, look):
    found, _ = look(file, max_length=60, overlong="drop")
    assert found.statistics.dropped == {"longer than max_length 60": [6, 7]}
    assert found.statistics.truncated == []
    assert [row.fate for row in found.rows if row.line in (6, 7)] == ["dropped: longer than max_length 60"] * 2


def test_the_counts_are_those_that_a_run_reports(tmp_path, look, tiny_folder):
    path = write_jsonl(tmp_path / "many.jsonl", 300, seed=5)
    found, dataset = look(path, max_length=44)
    rows, reading = read_rows(path)
    markup = ChatMarkup(loading.load_tokenizer(tiny_folder))
    config = TrainConfig(max_length=44)
    _, report = tokenize(rows, markup, reading, system_prompt=config.system_prompt, max_length=44,
             overlong="truncate", train_on_prompt=False)  # fmt: skip
    stats = found.statistics
    assert 0 < report.truncated < 300
    assert (len(stats.truncated), stats.kept) == (report.truncated, report.kept)
    assert sum(map(len, stats.dropped.values())) == report.dropped_unsupervised
    assert (stats.tokens, stats.supervised_tokens) == (report.tokens, report.supervised_tokens)
    ends = [example.labels[-1] == markup.end for example in dataset]
    assert stats.not_ended == dataset.lines[~np.array(ends)].tolist()
    assert any(data_report.describe_data(report))


def test_fields_that_are_not_read_are_reported(tmp_path, look):
    """Only the header of `train` once named them."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row | {"id": 1, "sytem": "s"}) + "\n" for row in ROWS[:2]))
    facts = dict(preview.facts(look(path)[0].statistics))
    assert facts["  unread"] == "fields not read: id (2 rows), sytem (2 rows)"


def test_the_think_tokens_that_the_template_places_are_no_text(tmp_path, look, tiny_folder, monkeypatch):
    """Of Qwen3's <think>, which becomes a control token, it was once said that "it stays text"."""
    plain = loading.load_tokenizer

    def qwen3(folder):
        tokenizer = plain(folder)
        tokenizer.chat_template = template("qwen3")
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
        return tokenizer

    reasoned = "<think>\nOne.\n</think>\n\nTwo."
    rows = [
        {"instruction": "red", "output": reasoned},  # set off as the template does it
        {"instruction": "say <think>", "output": reasoned},  # text in the question
        {"instruction": "red", "output": "<think>\na\n</think>\n\nb </think> <|im_end|>"},  # text in the answer
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": reasoned}] * 2},  # left out
    ]
    path = tmp_path / "rows.jsonl"
    for rows_of, qwen3s, expected in ((rows[:3], True, [2, 3]), (rows[3:], True, []), (rows[:3], False, [3])):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows_of))
        monkeypatch.setattr(preview, "load_tokenizer", qwen3 if qwen3s else plain)
        assert look(path)[0].statistics.spelled == expected


@given(st.lists(st.integers(2, 40_000), min_size=1, max_size=60))
def test_the_histogram_counts_each_row_once(lengths):
    bins = histogram(np.array(lengths))
    assert len(bins) <= MAX_BINS
    assert sum(count for _, _, count in bins) == len(lengths)
    assert [first for first, _, _ in bins[1:]] == [last + 1 for _, last, _ in bins[:-1]]
    for first, last, count in bins:
        assert count == sum(first <= length <= last for length in lengths)


def test_the_last_bin_takes_the_few_that_are_far_out():
    bins = histogram(np.array([*range(100, 300), 30_000]))
    assert len(bins) <= MAX_BINS
    assert bins[0][:2] == (100, 119)
    assert bins[-1] == (280, 30_000, 21)
    assert sum(count for _, _, count in bins) == 201


# ---------------------------------------------------------------------------------------- the command


def test_the_command(file, tiny_folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    flags = ["--rows", "2", "--from_line", "6", "--max_length", "60", "--html", page]
    assert cli.main(list(map(str, ["preview", file, "--model", tiny_folder, *flags]))) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^line (\d+)", printed, re.M) == ["6", "7"]
    for text in (
        "8 rows of instruction/output, 6 kept",
        "2 as 1",
        "3 as 1",
        "5 of 6 rows end with a learned end token",
    ):
        assert text in printed
    assert printed.count("█") > 5
    assert printed.count("\nlengths  ") == 1
    found = Page(page.read_text())
    assert "beyond max_length 60" in found.text
    assert "".join(found.of("mark")).startswith("learned" + "warm warm")
    assert "8 rows of instruction/output, 6 kept" in found.text
    assert len(found.of("mark")) == 2  # of the legend, and of the one row that is not dropped


def test_a_page_of_hostile_rows(tmp_path, tiny_folder):
    path, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    row = {"instruction": "</pre><script>x</script>", "output": "<img src=x onerror=y> &amp; \x00"}
    path.write_text(json.dumps(row) + "\n")
    assert cli.main(["preview", str(path), "--model", str(tiny_folder), "--html", str(page)]) == 0
    text = Page(page.read_text()).text
    assert "beyond" not in text  # no row is
    assert "</pre><script>x</script>" in text
    assert "<img src=x onerror=y> &amp; " in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["FILE", "--rows", "-1"], "--rows = -1 must be at least 0"),
        (["FILE", "--from_line", "0"], "--from_line = 0 must be at least 1"),
        (["FILE", "--overlong", "cut"], "is not one of truncate, drop, error"),
        (["FILE", "--max_length", "9"], "no example is left with max_length 9"),
        (["FILE", "--max_length", "60", "--overlong", "error"], "more than max_length 60"),
        (["FILE", "--html", "/"], "--html /: it is a folder"),
        ([], "FILE"),
    ],
)
def test_mistakes(flags, message, file, tiny_folder, capsys):
    flags = [str(file) if flag == "FILE" else flag for flag in flags]
    assert cli.main(["preview", "--model", str(tiny_folder), *flags]) == 2
    assert message in capsys.readouterr().err


def test_no_row_there(file, tiny_folder, capsys):
    assert cli.main(["preview", str(file), "--model", str(tiny_folder), "--from_line", "999"]) == 0
    assert "there is no row at or after that line" in capsys.readouterr().out
    assert cli.main(["preview", str(file), "--model", str(tiny_folder), "--rows", "0"]) == 0
    assert "there is no row" not in capsys.readouterr().out
