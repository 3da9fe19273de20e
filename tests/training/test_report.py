"""`minilora report`: the numbers of a run as they lie in its folder, whatever lies there, on a page that only shows."""

import json
import re
import shutil
import subprocess
import types
from pathlib import Path

import pytest
from conftest import write_jsonl
from pages import Page

from minilora import cli, loop
from minilora.config import TrainConfig
from minilora.errors import ConfigError, StoppedError, StorageError
from minilora.training import finish, report
from minilora.training.rundir import lasting_settings

NASTY = "<script>alert(1)</script></td> & \x1b[0m \ud800 \u202e"


def summary(**keys):
    """summary.json of a run that has ended."""
    good = {
        "steps": 40,
        "stop_reason": "completed",
        "tokens": 40_000,
        "supervised_tokens": 20_000,
        "seconds": 80.0,
        "tokens_per_second": 500.0,
        "peak_memory_bytes": 2 * 2**30,
        "predicted_peak_memory_bytes": round(2.2 * 2**30),
        "trainable_parameters": 1000,
        "parameters": 100_000,
        "skipped_steps": 0,
        "first_loss": 3.5,
        "last_loss": 0.25,
        "first_eval_loss": 3.25,
        "last_eval_loss": 0.75,
        "best_eval_loss": 0.5,
        "verified_max_logit_difference": 0.0,
        "result": "adapter",
        "answers": [{"prompt": "who?", "base": "nobody", "tuned": "me"}],
    }
    return good | keys


@pytest.fixture
def make_run(tmp_path):
    """A function: a run's folder with 40 steps and 3 evaluations; summary=None: it has not ended."""

    def make(name="a", keys=None, ended=None, metrics=None, **about):
        folder = tmp_path / name
        folder.mkdir()
        settings = lasting_settings(TrainConfig(**({"eval_file": "valid.jsonl"} | (keys or {}))))
        data = {"file": "rows.jsonl", "rows": 12, "kept": 10, "bad": 2, "truncated": 1, "dropped_overlong": 0}
        data |= {"dropped_unsupervised": 0, "lengths": {"p50": 30, "p95": 50, "max": 77}, "tokens": 400}
        data |= {"supervised_tokens": 100}
        text = {"config": settings, "base_fingerprint": "f" * 64, "versions": {"torch": "2.13.0"}, "data": [data]}
        text |= {"device": "cpu (2 threads)", "dtype": "torch.float32"}
        (folder / "config.json").write_text(json.dumps(text | about))
        (folder / "metrics.jsonl").write_text(metrics if metrics is not None else "".join(lines()))
        if ended is not False:
            (folder / "summary.json").write_text(json.dumps(ended or summary()))
        return folder

    return make


def lines(factor=1.0):
    for step in (0, 20, 40):
        yield json.dumps({"step": step, "eval_loss": 3.25 - step / 16}) + "\n"
    for step in range(1, 41):
        record = {"step": step, "epoch": step / 10, "loss": factor * (3.5 - step / 16), "learning_rate": 1e-4 * step}
        record |= {"grad_norm": 2.0, "tokens": 1000, "tokens_per_second": 500.0 + step, "time": 1.7e9}
        yield json.dumps(record | {"peak_memory_bytes": 2**30 + step * 2**20}) + "\n"


def page_of(*folders: Path) -> Page:
    report.write(folders, folders[0] / "report.html")
    return Page((folders[0] / "report.html").read_text("utf-8"))


# ---------------------------------------------------------------------------------------- one run


def test_a_page_says_what_the_run_says(make_run):
    folder = make_run()
    page = page_of(folder)
    assert page.of("h1") == ["a"]
    assert {"3.5000 → 0.2500", "3.2500 → 0.7500", "500 tokens/s", "2.00 GiB", "1,000", "40"} <= set(page.of("b"))
    assert "best 0.5000" in page.text
    assert "predicted 2.20 GiB (+10 %)" in page.text
    assert "1.00 % of 100,000" in page.text
    assert [name.strip() for name in page.of("figcaption") if name.strip()] == [
        *("Loss", "Learning rate", "Gradient norm", "Speed", "Peak memory so far")
    ]
    assert "rows.jsonl" in page.of("th")
    assert {"12", "10", "2", "30 / 50 / 77", "25 %"} <= set(page.of("td"))
    assert "who?" in page.of("b")
    spans = page.of("span")
    first = spans.index("base")
    assert spans[first : first + 4] == ["base", "nobody", "tuned", "me"]
    assert "read from the disk into a fresh base" in page.text
    assert "ffffffffffffffff" in page.text


def test_the_curves_are_those_of_metrics(make_run):
    page = page_of(make_run())
    titles = page.of("title")
    assert [text for text in titles if text.startswith("held-out")] == [
        "held-out, step 0: 3.25", "held-out, step 20: 2", "held-out, step 40: 0.75"
    ]  # fmt: skip
    assert "step 40: 0.004" in titles  # the learning rate
    assert "step 7: 507" in titles  # tokens a second
    assert "step 40: 1.04" in titles  # GiB
    assert "clipped to, step 40: 0.1" in titles
    assert "predicted, step 40: 2.2" in titles


def test_settings_that_differ_from_the_defaults_come_first(make_run):
    page = page_of(make_run(keys={"lora_r": 16, "eval_file": None}))
    cells = page.of("th", "td")
    first = cells.index("lora_r")
    assert cells[first + 1] == "16"
    assert first < cells.index("learning_rate")
    assert "train_file" in cells
    assert "version of torch" in cells


def test_commands_to_go_on_are_quoted(make_run):
    folder = make_run("it's a run; rm x")
    commands = page_of(folder).of("pre")
    adapter = f"'{folder.parent}/it'\"'\"'s a run; rm x/adapter'"
    assert f"python -m minilora chat --adapter {adapter}" in commands
    for verb in ("eval", "verify", "merge", "export"):
        assert f"minilora {verb} --adapter {adapter}" in "\n".join(commands)


def test_a_run_that_has_not_ended(make_run):
    folder = make_run(ended=False)
    page = page_of(folder)
    assert "has not ended: 40 steps so far" in page.text
    assert page.of("pre") == [f"python -m minilora train --resume {folder}"]
    assert page.attributes("polyline")


def test_method_full_has_a_model(make_run):
    folder = make_run(ended=summary(result="model"))
    commands = "\n".join(page_of(folder).of("pre"))
    assert f"chat --model {folder}/model" in commands
    assert "merge" not in commands


def test_a_real_run_writes_its_page(make_config, tmp_path, capsys, bare_run):
    config = make_config(eval_file=str(write_jsonl(tmp_path / "valid.jsonl", 6, seed=9)))
    done = loop.train(config)
    page = Page((Path(config.output_dir) / "report.html").read_text("utf-8"))
    assert f"{done.first_loss:.4f} → {done.last_loss:.4f}" in page.of("b")
    assert f"report       {config.output_dir}/report.html" in capsys.readouterr().out
    assert {"32", "6"} <= set(page.of("td"))  # rows of both files
    assert len(page.attributes("svg")) == 5


def test_a_page_that_cannot_be_written_is_no_failed_run(tmp_path, monkeypatch):
    """The adapter is saved and verified by then; a full disk, or a mistake of ours, must not make that a failure."""
    notes = []
    run = types.SimpleNamespace(folder=tmp_path, log=types.SimpleNamespace(note=notes.append))
    for error in (StorageError("No space left on device."), ZeroDivisionError("ours")):
        monkeypatch.setattr(report, "write", raising(error))
        finish._write_page(run)
        assert notes.pop() == f"{tmp_path}/report.html could not be written: {error}"
    monkeypatch.setattr(report, "write", raising(StoppedError("stopped", 15)))
    with pytest.raises(StoppedError):
        finish._write_page(run)


def raising(error):
    def write(*args):
        raise error

    return write


# ---------------------------------------------------------------------------------------- answers over the steps


def write_samples(folder, *questions):
    """samples.jsonl of (prompt, reference, answers) each, at steps 0, 20, 40, ..."""
    lines = [
        json.dumps({"step": 20 * i, "prompt": prompt, "answer": answer, "reference": reference}) + "\n"
        for prompt, reference, answers in questions
        for i, answer in enumerate(answers)
    ]
    (folder / "samples.jsonl").write_text("".join(lines))


def folded(page: Page) -> str:
    """What lies inside the folds of the answers over the steps."""
    part = page.source.split("<h2>Answers over the steps</h2>")[1].partition("</section>")[0]
    return "".join(re.findall("<details>.*?</details>", part, re.DOTALL))


def test_answers_over_the_steps(make_run):
    """The first and the last stand open; successive steps with the same answer are one line."""
    folder = make_run()
    write_samples(folder, ("why?", "because", ["nobody", "no one", "no one", "it is me", "me"]), ("so?", "", ["x"]))
    page = page_of(folder)
    assert "Answers over the steps" in page.of("h2")
    spans = page.of("span")
    first = spans.index("step 0")
    assert spans[first : first + 10] == [
        *("step 0", "nobody", "steps 20 to 40", "no one", "step 60", "it is me", "step 80", "me"),
        *("in the file", "because"),
    ]
    inside = folded(page)
    assert inside.count("<span") == 4
    assert "no one" in inside
    assert "it is me" in inside
    assert page.of("summary")[0] == "2 answers between"
    assert {"why?", "so?"} <= set(page.of("b"))


def test_without_samples_there_is_no_such_section(make_run):
    folder = make_run()
    assert "Answers over the steps" not in page_of(folder).of("h2")
    (folder / "samples.jsonl").write_text('not json\n{"step": 1}\n{"answer": "x"}\n[]\n')
    assert "Answers over the steps" not in page_of(folder).of("h2")


def test_answers_of_several_runs_stand_under_one_question(make_run):
    folders = [make_run(name) for name in ("one", "other", "third")]
    write_samples(folders[0], ("why?", "because", ["a", "b"]))
    write_samples(folders[1], ("why?", "because", ["a", "c"]), ("so?", "", ["d"]))
    page = page_of(*folders)
    assert page.of("b").count("why?") == 1
    assert page.of("b").count("so?") == 1
    named = [text for text in page.of("p") if text in ("one", "other", "third")]
    assert named == ["one", "other", "other"]
    assert page.of("span").count("because") == 1


def test_many_samples_make_no_large_page(make_run):
    folder = make_run()
    write_samples(folder, *((f"question {i} " + "x" * 5000, "y" * 5000, map(str, range(300))) for i in range(40)))
    page = page_of(folder)
    assert len(page.source) < 200_000
    assert "20 of 298 answers between" in page.of("summary")
    assert {"step 0", "step 20", "step 5,960", "step 5,980"} <= set(page.of("span"))  # the ends, and those beside them
    assert "and 20 more questions in samples.jsonl" in page.text


# ---------------------------------------------------------------------------------------- several runs


def test_several_runs_side_by_side(make_run, tmp_path):
    one = make_run("one")
    other = make_run("other", {"learning_rate": 3e-4}, summary(last_loss=0.125, answers=[
        {"prompt": "who?", "base": "nobody", "tuned": "you"}]), "".join(lines(0.5)))  # fmt: skip
    page = page_of(one, other)
    assert page.of("h1") == ["2 runs compared"]
    assert {"3.5000 → 0.2500", "3.5000 → 0.1250"} <= set(page.of("span"))
    assert page.text.count("predicted 2.20 GiB (+10 %)") == 2
    assert "Held-out loss" in " ".join(page.of("figcaption"))
    titles = page.of("title")
    assert "one, step 7: 507" in titles
    assert "other, step 7: 507" in titles
    cells = page.of("td")
    place = cells.index("learning_rate")
    assert cells[place : place + 3] == ["learning_rate", "0.0001", "0.0003"]
    assert page.of("b").count("who?") == 1
    spans = page.of("span")
    assert [spans.count(text) for text in ("nobody", "me", "you")] == [1, 1, 1]  # the base speaks once
    assert page.of("th").count("rows.jsonl") == 1
    assert "skipped steps" not in page.of("td")  # neither has skipped any
    classes = {each["class"] for each in page.attributes("polyline")}
    assert {"plot line c0", "plot line c1"} <= classes


def test_runs_of_the_same_name_are_told_apart(make_run, tmp_path):
    for name in ("x", "y"):
        make_run(name).rename(tmp_path / "run")
        (tmp_path / f"in-{name}").mkdir()
        (tmp_path / "run").rename(tmp_path / f"in-{name}" / "run")
    heads = page_of(tmp_path / "in-x" / "run", tmp_path / "in-y" / "run").of("th")
    assert {f"{tmp_path}/in-x/run", f"{tmp_path}/in-y/run"} <= set(heads)


def test_runs_of_other_bases_bring_their_own_answers(make_run):
    other = make_run("other", base_fingerprint="e" * 64)
    page = page_of(make_run("one"), other)
    spans = page.of("span")
    assert [text for text in spans if text.startswith("base")] == ["base", "base of other"]
    assert spans.index("base") < spans.index("base of other")


def test_the_charts_say_what_is_smoothed(make_run):
    text = "".join(json.dumps({"step": step, "loss": 2.0}) + "\n" for step in range(1, 101))
    short, other, long = make_run("short"), make_run("other"), make_run("long", metrics=text)
    printed = "nats per supervised token, smoothed (faint: each step)"
    assert [printed in page_of(*runs).of("small") for runs in ([short], [short, other])] == [False, False]
    assert [printed in page_of(*runs).of("small") for runs in ([long], [long, other])] == [True, True]


# ---------------------------------------------------------------------------------------- what a stranger left


def test_hostile_texts_stay_texts(make_run):
    answers = [{"prompt": NASTY, "base": NASTY, "tuned": NASTY}]
    folder = make_run(
        "<script>alert(1)",
        ended=summary(answers=answers, stop_reason=NASTY),
        device=NASTY,
        base_fingerprint=NASTY,
        versions={NASTY: NASTY},
        data=[{"file": NASTY}],
        config={"model": NASTY, NASTY: NASTY, "method": NASTY, "eval_file": NASTY},
    )
    write_samples(folder, (NASTY, NASTY, [NASTY, "x", NASTY]))
    page = page_of(folder)
    assert page.text.count("<script>alert(1)</script></td> & ") >= 12
    page_of(folder, make_run("other"))


@pytest.mark.parametrize("value", [None, [], {}, "text", [1], {"a": {}}, 1e999, -1e999, True, 10**400, [[[]]], [{}]])
def test_values_of_any_kind_are_passed_over(make_run, value):
    """Each key of each file in turn; the page is whole, and says the rest."""
    odd = dict.fromkeys(summary(), value)
    for number, (about, ended) in enumerate([({}, odd), (dict.fromkeys(("config", "versions", "data"), value), None)]):
        metrics = [{"step": 1, "loss": value, "grad_norm": 1}, {"step": value, "loss": 1}, {"loss": 2}, value]
        text = "".join(json.dumps(line) + "\n" for line in metrics)
        folder = make_run(f"odd{number}", ended=ended, metrics=text, **about)
        asked = [{"step": 1, "prompt": value, "answer": value, "reference": value}, {"step": value, "answer": "x"}]
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
        page_of(folder)
        page_of(folder, make_run(f"good{number}"))
    record = report.read_run(folder)
    assert record.steps["grad_norm"] == [(1.0, 1.0)]


def test_lines_that_are_no_json_are_passed_over(make_run):
    broken = "\n".join(
        ['{"step": 1, "loss": 2.0}', '{"step": 2, "lo', "\x00\xff", "[" * 100_000, "NaN", '{"step": 3, "loss": 1.0}']
    )
    record = report.read_run(make_run(metrics=broken))
    assert record.steps == {"loss": [(1.0, 2.0), (3.0, 1.0)]}
    assert record.last_step == 3
    (make_run("empty", metrics="") / "metrics.jsonl").unlink()
    assert "polyline" not in page_of(record.folder.parent / "empty").source


def test_a_page_of_a_long_run_is_small(make_run):
    def many():
        for step in range(1, 20_001):
            yield json.dumps({"step": step, "loss": 2.0 + step % 7, "grad_norm": 1.0, "learning_rate": 1e-4,
                              "tokens_per_second": 1000, "peak_memory_bytes": 2**30}) + "\n"  # fmt: skip

    page = page_of(make_run(metrics="".join(many())))
    assert len(page.source) < 200_000
    assert "step 20,000" in page.source


# ---------------------------------------------------------------------------------------- the command


def test_the_command_says_where_the_page_is(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one, other = make_run("one"), make_run("other")
    assert cli.main(["report", str(one)]) == 0
    assert capsys.readouterr().out == f"written: {one}/report.html\n"
    assert cli.main(["report", "one", "other"]) == 0
    assert capsys.readouterr().out == "written: report.html\n"
    assert cli.main(["report", str(other), "--html", "mine.html"]) == 0
    assert {"report.html", "mine.html"} <= {path.name for path in tmp_path.iterdir()}
    assert not (other / "report.html").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "nowhere is not a run of minilora: nowhere/config.json: No such file or directory"),
        ([], "RUN"),
        (["nowhere", "--html", "/"], "--html /: it is a folder"),
    ],
)
def test_mistakes(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *flags]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config.json: a JSON object is needed"):
        report.read_run(tmp_path)


# ---------------------------------------------------------------------------------------- in a browser


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium")
@pytest.mark.parametrize("width", [500, 1280])
def test_a_browser_shows_it_without_scrolling_sideways(make_run, tmp_path, width):
    """A real browser lays the page out; a script of ours, which the page's own policy would not allow, measures."""
    answers = [{"prompt": "who?", "base": "nobody " * 60, "tuned": "x" * 300}]
    one = make_run("a-run-with-quite-a-long-name-" * 3, ended=summary(answers=answers))
    write_samples(one, ("why? " * 60, "z" * 300, ["x" * 300, "y", "nobody " * 60]))
    source = page_of(one, make_run("other")).source
    assert re.search("<meta http-equiv", source)
    measure = "document.title = 'is ' + document.documentElement.scrollWidth + ' of ' + innerWidth"
    measured = re.sub("<meta http-equiv[^>]*>", "", source).replace("</body>", f"<script>{measure}</script></body>")
    (tmp_path / "measured.html").write_text(measured)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},800", "--dump-dom", f"file://{tmp_path / 'measured.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>is (\d+) of (\d+)</title>", done.stdout)
    assert found, done.stderr[-1000:]
    assert int(found[1]) <= int(found[2]) <= width
