"""`minilora tune`: the same short run at every rate, one table, one suggestion, nothing left."""

import dataclasses
import math
import os
import random
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import write_jsonl

from minilora import cli, demo, loop
from minilora.config import TrainConfig, resolve
from minilora.models import load as loading
from minilora.tools import tune
from minilora.tools.tune import Search, descend, held_out_rows, loss_after, short_run, suggestion
from minilora.training.checkpoint import trainable
from minilora.training.setup import prepare
from minilora.training.signals import StopRequest

DEMO = str(demo.DEMO_DIR)
SEARCH = Search((), steps=2, rows=4, held_out=8)


@pytest.fixture
def short(make_config, tmp_path):
    """A function: a prepared short run of the tiny model."""
    with ExitStack() as held:
        stop = held.enter_context(StopRequest())

        def prepared(search=SEARCH, **keys):
            config = short_run(make_config(**keys), search, tmp_path / f"short-{len(list(tmp_path.iterdir()))}")
            return prepare(config, stop, held, header=False)

        yield prepared


def start_of(run):
    return {name: param.detach().clone() for name, param in trainable(run.model).items()}


@pytest.mark.parametrize("keys", [{"lora_dropout": 0.1}, {"method": "full"}, {"loraplus_lr_ratio": 4.0}])
def test_every_rate_begins_anew(short, keys):
    """Neither weights nor moments nor counts of one short run are left for the next; the base has not moved."""
    run = short(**keys)
    start = start_of(run)
    rows = held_out_rows(run, SEARCH)
    first = loss_after(run, 1e-3, start, rows)
    loss_after(run, 5e-2, start, rows)
    assert loss_after(run, 1e-3, start, rows) == first
    assert run.state.step == SEARCH.steps
    assert loss_after(run, 2e-3, start, rows) != first
    assert loop.evaluate(run, rows) != first


def test_the_short_run_is_the_training_loops_own(short, make_config):
    """The same steps as `train` takes on the same settings at that rate, to the bit."""
    search = dataclasses.replace(SEARCH, steps=3)
    run = short(search)
    loss_after(run, 1e-2, start_of(run), held_out_rows(run, search))
    config = short_run(make_config(learning_rate=1e-2), search, Path("elsewhere"))
    with StopRequest() as stop, ExitStack() as held:
        own = prepare(dataclasses.replace(config, output_dir=run.config.output_dir + "-own"), stop, held, header=False)
        for _ in range(3):
            assert loop.train_step(own)["learning_rate"] == 1e-2
        for name, param in trainable(own.model).items():
            assert torch.equal(param, trainable(run.model)[name])


def test_no_row_is_both_learnt_from_and_judged_by(short):
    search = Search((), steps=3, rows=8, held_out=8)
    run = short(search)  # of 32 rows: every one is used
    learnt = {int(i) for step in range(3) for i in run.data.train.lines[run.schedule.examples_of(step)]}
    judged = set(held_out_rows(run, search).lines.tolist())
    assert len(learnt) == 24
    assert len(judged) == 8
    assert not learnt & judged


def test_an_evaluation_set_is_what_judges(short, tmp_path):
    run = short(eval_file=str(write_jsonl(tmp_path / "valid.jsonl", 20, seed=5)))
    rows = held_out_rows(run, SEARCH)
    assert len(rows) == 8
    assert {tuple(row.input_ids) for row in rows} <= {tuple(row.input_ids) for row in run.data.eval}
    run = short(Search((), 2, 4, held_out=99), val_size=0.25)
    assert len(held_out_rows(run, Search((), 2, 4, held_out=99))) == 8  # all there are


def test_numbers_gone_bad_are_no_loss_and_spoil_nothing(short):
    run = short()
    start, rows = start_of(run), held_out_rows(run, SEARCH)
    assert loss_after(run, 1e30, start, rows) == math.inf
    assert math.isfinite(loss_after(run, 1e-3, start, rows))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.99, 1.95, 1.8, 1.5, 2.5], 3e-3),
        ([1.99, 1.95, 1.52, 1.5, 2.5], 1e-3),  # nearly as good, and a third of the rate
        ([1.99, 1.95, 1.56, 1.5, 2.5], 3e-3),
        ([2.1, 2.2], None),
        ([2.0], None),
        ([1.9, math.inf], 1e-4),
        ([math.inf], None),
    ],
)
def test_the_suggestion(losses, expected):
    found = dict(zip(tune.GRID["lora"], losses, strict=False))
    assert suggestion(2.0, found) == expected
    assert suggestion(2.0, dict(reversed(found.items()))) == expected


@pytest.mark.parametrize(
    ("losses", "tried"),
    [
        ([5, 4, 3, 2, 1], [1e-3, 3e-3, 1e-2]),
        ([5, 4, 3, 2, 9], [1e-3, 3e-3, 1e-2]),
        ([5, 4, 3, 9, 9], [1e-3, 3e-3, 3e-4]),
        ([5, 4, 4, 4, 4], [1e-3, 3e-3, 3e-4]),  # equal is no descent
        ([1, 2, 3, 4, 5], [1e-3, 3e-3, 3e-4, 1e-4]),
        ([1, 2, math.inf, math.inf, 5], [1e-3, 3e-3, 3e-4, 1e-4]),
    ],
)
def test_the_descent_tries_no_more_than_it_must(losses, tried):
    grid, asked = tune.GRID["lora"], []

    def loss_at(rate):
        if rate not in asked:
            asked.append(rate)
        return losses[grid.index(rate)]

    descend(grid, 1e-3, loss_at)
    assert asked == tried


# ---------------------------------------------------------------------------------------- the verb


@pytest.mark.parametrize(
    "words",
    [["--rates", "1e-3", "1e-2", "quick"], ["--rates", "1e-3,1e-2", "quick"], ["quick", "--rates=1e-2,1e-3"]],
    ids=" ".join,
)
def test_rates_are_numbers_and_what_follows_is_the_preset(words, monkeypatch):
    seen = []
    monkeypatch.setattr(tune, "tune", lambda *asked: seen.append(asked))
    assert cli.main(["tune", *words]) == 0
    ((config, search),) = seen
    assert search.rates == (1e-3, 1e-2)
    assert config.num_train_epochs == 2


@pytest.fixture
def tuned(tmp_path, monkeypatch, capsys):
    """A function: what `minilora tune` prints, in a folder with 60 rows of the demo."""
    rows = (Path(DEMO).parent / "train.jsonl").read_text("utf-8").splitlines(keepends=True)[:60]
    (tmp_path / "rows.jsonl").write_text("".join(rows), "utf-8")
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path.parent))  # torch may make it

    def run(*argv: str, code: int = 0) -> str:
        where = ["--model", DEMO, "--train_file", "rows.jsonl", "--device", "cpu", "--dtype", "float32"]
        assert cli.main(["tune", *where, *argv]) == code
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["rows.jsonl", "temporary"], "something is left"
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return run


def losses_of(text: str) -> dict[str, float]:
    return {rate: float(loss) for rate, loss in re.findall(r"^ *(\(before\)|[\d.]+e-\d+) +([\d.]+|inf)", text, re.M)}


def test_one_table_one_suggestion_nothing_left(tuned, monkeypatch):
    loaded = []
    load = loading.load_model
    monkeypatch.setattr("minilora.training.setup.load_model", lambda *args: loaded.append(args) or load(*args))
    text = tuned("--steps", "2", "--rates", "1e-2", "1e-4", "1e-3", "1e-3")
    losses = losses_of(text)
    assert list(losses) == ["(before)", "1e-04", "1e-03", "1e-02"]  # all, from the lowest
    assert losses["(before)"] > losses["1e-04"] > losses["1e-03"]
    (suggested,) = re.findall(r"--learning_rate (\S+)", text)
    assert f"{float(suggested):.0e}" in losses
    assert len(loaded) == 1


def test_its_own_rate_is_tried_too(tuned):
    text = tuned("--steps", "1", "--rows", "2", "--learning_rate", "2e-4")
    assert list(losses_of(text))[:4] == ["(before)", "2e-04", "1e-03", "3e-03"]


def test_where_nothing_helps_nothing_is_suggested(tuned):
    text = tuned("--steps", "2", "--rates", "3")
    assert "none: no rate lowered" in text
    assert "--learning_rate" not in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "--steps = 0 must be at least 1"),
        (["--rates", "1e-3", "0"], "--rates 0.0 0.001: a rate must be a finite number above 0"),
        (["--rates", "-1e-3"], "a rate must be a finite number above 0"),
        (["--rates", "nan"], "a rate must be a finite number above 0"),
        (["--rates", "fast"], "--rates = 'fast' is not a number"),
        (["--rates", "1e-3,fast"], "--rates = 'fast' is not a number"),
        (["--rates", "1e-3", "1e-4", "demmo"], "--rates = 'demmo' is not a number"),
        (["--steps", "20"], "rows.jsonl: 60 rows are too few for 20 steps of 8 rows and 8 held-out rows"),
        (["--lora_q", "3"], "--lora_r"),
        (["--target_modules", "qproj"], "match nothing"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tuned, argv, message):
    error = tuned(*argv, code=2)
    assert message in error
    assert error.count("\n") == 1


def test_a_signal_leaves_nothing(tmp_path):
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-m", "minilora", "tune", "demo", "--steps", "50", "--rates", "1e-6", "2e-6", "3e-6"]
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(demo.DEMO_DIR).parent.parent.parent)
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "(before)" in line:
            break
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["temporary"]


# ---------------------------------------------------------------------------------------- whether it is right


def after_one_epoch(config: TrainConfig, rates) -> dict[float, float]:
    """The held-out loss after one epoch at each rate, by the training loop itself."""
    found = {}
    with StopRequest() as stop, ExitStack() as held:
        run = prepare(config, stop, held, header=False)
        start = start_of(run)
        for rate in rates:
            found[rate] = loss_after(run, rate, start, run.data.eval)
    return found


@pytest.mark.soak  # half a minute
def test_on_the_demo_the_suggestion_is_the_best(tmp_path):
    """One epoch of 300 rows, judged by the 55 held out: the rate is the best of the table, and 1e-4 is far from it."""
    source = resolve("demo", {}).train_file
    lines = Path(source).read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(random.Random(0).sample(lines, 300)), "utf-8")
    keys = {"num_train_epochs": 1, "device": "cpu", "output_dir": str(tmp_path / "run")}
    config = dataclasses.replace(resolve("demo", keys), train_file=str(tmp_path / "rows.jsonl"))
    rate = tune.tune(config, Search((), steps=2, rows=8, held_out=8))
    losses = after_one_epoch(config, {rate, 1e-4, 3e-3})
    assert rate > 3e-3
    assert losses[rate] == min(losses.values())
    assert losses[rate] < losses[1e-4] - 1.0
