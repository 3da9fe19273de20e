"""`minilora report` writes one HTML page about one or more runs; it reads only their folders and trusts none of it."""

import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, starmap
from pathlib import Path
from typing import Any

from minilora.config import FIELDS
from minilora.data.jsonl import read_lines
from minilora.errors import ConfigError
from minilora.training.log import METRICS, SAMPLES, SUMMARY
from minilora.training.rundir import CONFIG
from minilora.utils import files
from minilora.utils.device import gib
from minilora.utils.html import Html, Line, cards, chart, colour, page, section, smoothed, table, tag

REPORT = "report.html"
MAX_NUMBER = 1e100  # larger numbers are ignored: a chart cannot show them, and their sums overflow
SMOOTHED_SHARE = 25  # each point of the smoothed line is the mean over 1/25 of the steps
COMPARED_REMARKS = ("held-out loss", "steps", "peak memory", "trained parameters")  # their remarks differ by run
SHOWN_QUESTIONS, SHOWN_ANSWERS = 20, 20  # of samples.jsonl; answers between the first and the last
SHOWN_CHARACTERS = 300  # of a prompt or a reference; the answers in samples.jsonl are short already
Points = list[tuple[float, float]]  # (step, value)
SampleKey = tuple[str, str]  # (prompt, reference)


@dataclass(frozen=True)
class Record:
    """The content of a run's folder; a part that is missing or malformed is empty."""

    name: str
    folder: Path
    about: dict[str, Any]  # config.json
    summary: dict[str, Any]  # summary.json; empty before the end of the run
    steps: dict[str, Points] = field(default_factory=dict)  # by key of metrics.jsonl
    evaluations: Points = field(default_factory=list)
    last_step: int = 0
    samples: dict[SampleKey, list[tuple[float, str]]] = field(default_factory=dict)  # (step, answer) of samples.jsonl

    @property
    def config(self) -> dict[str, Any]:
        """The resolved settings of the run."""
        return mapping(self.about.get("config"))

    def number(self, key: str) -> float | None:
        """A number of the summary; None where it is missing or malformed."""
        return number(self.summary.get(key))


def write(folders: Sequence[Path], output: Path) -> None:
    """Write a page about these runs. Raises ConfigError for a folder that holds no run, StorageError."""
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):  # runs in different folders may have the same name
        runs = [dataclasses.replace(run, name=str(run.folder)) for run in runs]
    files.replace_file(output, [as_page(runs).encode()])


# ---------------------------------------------------------------------------------------- the files of a run


def read_run(folder: Path) -> Record:
    """Read the files of a run. Raises ConfigError for a folder that holds no run."""
    try:
        about = files.read_json(folder / CONFIG)
    except ValueError as error:
        raise ConfigError(f"{folder} is not a run of minilora: {folder / CONFIG}: {error}") from error
    try:
        summary = files.read_json(folder / SUMMARY)
    except ValueError:
        summary = {}
    name = folder.name or os.path.basename(os.path.abspath(folder))
    record = Record(name, folder, about, summary, samples=read_samples(folder / SAMPLES))
    if not (folder / METRICS).exists():
        return record
    last = 0
    for entry in entries(folder / METRICS):
        step = number(entry.get("step"))
        if step is None:
            continue
        last = max(last, int(step))
        for key in entry.keys() - {"step"}:
            if (value := number(entry[key])) is not None:
                points = record.evaluations if key == "eval_loss" else record.steps.setdefault(key, [])
                points.append((step, value))
    return dataclasses.replace(record, last_step=last)


def read_samples(path: Path) -> dict[SampleKey, list[tuple[float, str]]]:
    """The answers to each question of samples.jsonl; empty where the file does not exist."""
    found: dict[SampleKey, list[tuple[float, str]]] = {}
    for entry in entries(path) if path.exists() else ():
        step = number(entry.get("step"))
        if step is not None and "answer" in entry:
            question = str(entry.get("prompt", "")), str(entry.get("reference", ""))
            found.setdefault(question, []).append((step, str(entry["answer"])))
    return found


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one per line. A line that is not a JSON object is skipped."""
    for _, line in read_lines(path):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            yield entry


def number(value: object) -> float | None:
    """A finite number below MAX_NUMBER in size, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -MAX_NUMBER < value < MAX_NUMBER:
        return None
    return float(value)


def mapping(value: object) -> dict[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def objects(value: object) -> list[dict[str, Any]]:
    """The JSON objects in a list; empty where the value is not a list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


# ---------------------------------------------------------------------------------------- the page


def as_page(runs: Sequence[Record]) -> Html:
    """The page: one run in detail, or several side by side."""
    one = runs[0] if len(runs) == 1 else None
    head = summary_of_one(one) if one else comparison(runs)
    parts = [
        section("Over the steps", tag("div", *charts(runs), class_="charts")),
        section("Before and after", *answers(runs)),
        *([section("Answers over the steps", *samples(runs))] if any(run.samples for run in runs) else []),
        section("Data", data(runs)),
        section("Settings", settings(runs)),
    ]
    if one:
        lines = (tag("pre", line, class_="command") for line in commands(one))
        parts += [section("The result", result(one)), section("Next commands", tag("div", *lines, class_="card"))]
    return page(one.name if one else f"{len(runs)} runs compared", head, *parts)


def summary_of_one(run: Record) -> Html:
    """The outcome of one run: its settings in one line and its totals."""
    model = str(run.config.get("model", "")).rstrip("/")
    setting = f"method {run.config.get('method', '')} on {model}, {run.about.get('device', '')}"
    state = "" if run.summary else tag("p", f"This run has not ended: {run.last_step:,} steps so far.")
    shown = ((name, value, remark) for name, (value, remark) in facts(run).items() if value)
    return tag("div", tag("p", setting, class_="soft"), state, cards(shown))


def comparison(runs: Sequence[Record]) -> Html:
    """The outcome of several runs, one column each."""
    found = [facts(run) for run in runs]

    def cell(name: str, value: str, remark: str) -> Html:
        more = tag("small", " ", remark) if name in COMPARED_REMARKS and remark else ""
        return tag("span", value or "-", more)

    names = [name for name in found[0] if any(each[name][0] for each in found)]
    rows = [(name, *(cell(name, *each[name]) for each in found)) for name in names]
    head = ("", *(tag("span", "■ ", run.name, class_=colour(i)) for i, run in enumerate(runs)))
    return section("Outcome", table(head, rows))


def facts(run: Record) -> dict[str, tuple[str, str]]:
    """(value, remark) by name of the fact; the value is empty where the run did not record it."""
    seconds, tokens = run.number("seconds"), run.number("tokens")
    peak, predicted = run.number("peak_memory_bytes"), run.number("predicted_peak_memory_bytes")
    difference = run.number("verified_max_logit_difference")
    trained, total = run.number("trainable_parameters"), run.number("parameters")
    share = f"{100 * trained / total:.2f} % of {total:,.0f}" if trained is not None and total else ""
    off = f"{100 * (predicted / peak - 1):+.0f} %" if predicted and peak else ""
    best, skipped = run.number("best_eval_loss"), run.number("skipped_steps")
    return {
        "loss": (change(run, "first_loss", "last_loss"), "nats per supervised token, first to last step"),
        "held-out loss": (
            change(run, "first_eval_loss", "last_eval_loss"),
            f"best {best:.4f}" if best is not None else "",
        ),
        "steps": (f"{run.last_step:,}", str(run.summary.get("stop_reason", ""))),
        "time in steps": (f"{seconds:,.0f} s" if seconds is not None else "", f"{tokens or 0:,.0f} tokens"),
        "speed": (f"{run.number('tokens_per_second') or 0:,.0f} tokens/s" if seconds else "", "without padding"),
        "peak memory": (gib(peak) if peak else "", f"predicted {gib(predicted)} ({off})" if predicted and off else ""),
        "trained parameters": (f"{trained:,.0f}" if trained is not None else "", share),
        "skipped steps": (f"{skipped:,.0f}" if skipped else "", "loss or gradient was not finite"),
        "verified": (
            f"{difference:.2g}" if difference is not None else "",
            "largest difference of logits: saved result against trained model",
        ),
    }


def change(run: Record, first: str, last: str) -> str:
    """Two losses of the summary, joined by an arrow; empty where one is missing."""
    before, after = run.number(first), run.number(last)
    return f"{before:.4f} → {after:.4f}" if before is not None and after is not None else ""


# ---------------------------------------------------------------------------------------- charts


def charts(runs: Sequence[Record]) -> list[Html]:
    """The charts over the steps; each run has its colour."""
    alone = len(runs) == 1
    loss, held_out = loss_lines(runs), [named(run, i, run.evaluations, "dots", runs) for i, run in enumerate(runs)]
    unit = "nats per supervised token"
    means = f"{unit}, smoothed (faint: each step)" if any(line.style == "faint" for line in loss) else unit
    if alone:  # one chart holds both, so that they can be compared
        both = [chart("Loss", means, [*loss, Line("held-out", runs[0].evaluations, 1, "dots")])]
    else:
        both = [chart("Training loss", means, loss), chart("Held-out loss", unit, held_out)]
    clip = {number(run.config.get("max_grad_norm")) for run in runs}
    limit = clip.pop() if len(clip) == 1 else None
    norms = of_each(runs, "grad_norm")
    if limit and any(line.points for line in norms):
        norms.append(level("clipped to", runs, limit, 1 if alone else 5))
    memory = [scaled(line, 2**-30) for line in of_each(runs, "peak_memory_bytes")]
    predicted = runs[0].number("predicted_peak_memory_bytes") if alone else None
    if predicted and any(line.points for line in memory):
        memory.append(level("predicted", runs, predicted / 2**30, 1))
    return [
        *both,
        chart("Learning rate", "", of_each(runs, "learning_rate")),
        chart("Gradient norm", "before clipping", norms),
        chart("Speed", "tokens per second", of_each(runs, "tokens_per_second")),
        chart("Peak memory so far", "GiB", memory, from_zero=True),
    ]


def loss_lines(runs: Sequence[Record]) -> list[Line]:
    """The lines of the training loss: a faint one through each step, and their running mean in front of it."""
    lines = []
    for i, run in enumerate(runs):
        points = run.steps.get("loss", [])
        span = len(points) // SMOOTHED_SHARE
        if span > 1:
            lines.append(Line("", points, i, "faint"))
            points = smoothed(points, span)
        lines.append(Line("training" if len(runs) == 1 else run.name, points, i))
    return lines


def of_each(runs: Sequence[Record], key: str) -> list[Line]:
    """The lines of one key of metrics.jsonl, one for each run."""
    return [named(run, i, run.steps.get(key, []), "line", runs) for i, run in enumerate(runs)]


def named(run: Record, place: int, points: Points, style: str, runs: Sequence[Record]) -> Line:
    """The line of a run; it has no label where there is only one run."""
    return Line(run.name if len(runs) > 1 else "", points, place, style)


def level(label: str, runs: Sequence[Record], value: float, place: int) -> Line:
    """A dashed horizontal line at a value."""
    last = float(max(run.last_step for run in runs))
    return Line(label, [(1.0, value), (max(last, 2.0), value)], place, "dashed")


def scaled(line: Line, factor: float) -> Line:
    """A line whose values are multiplied by a factor, to change the unit."""
    return Line(line.label, [(x, y * factor) for x, y in line.points], line.number, line.style)


# ---------------------------------------------------------------------------------------- tables


def answers(runs: Sequence[Record]) -> list[Html]:
    """The answers of base and result to the same prompts; a base that several runs share is shown once."""
    by_prompt: dict[str, dict[str, str]] = {}  # prompt -> model -> answer
    several = len(runs) > 1
    bases: dict[str, str] = {}  # fingerprint -> model
    for run in runs:
        identity = str(run.about.get("base_fingerprint", run.name))
        base = bases.setdefault(identity, f"base of {run.name}" if bases else "base")
        for sample in objects(run.summary.get("answers")):
            for model, key in ((base, "base"), (run.name if several else "tuned", "tuned")):
                by_prompt.setdefault(str(sample.get("prompt", "")), {})[model] = str(sample.get(key, ""))
    if not by_prompt:
        return [tag("p", "There are no answers yet: a run records them at its end.", class_="soft")]
    return [question(prompt, *starmap(answer, answered.items())) for prompt, answered in by_prompt.items()]


def samples(runs: Sequence[Record]) -> Iterator[Html]:
    """The answers to each question of the evaluation set, over the steps."""
    yield tag("p", "Greedy decoding. Only the beginning of each answer is shown.", class_="soft")
    questions = list(dict.fromkeys(asked for run in runs for asked in run.samples))
    for prompt, reference in questions[:SHOWN_QUESTIONS]:
        replies = []
        for i, run in enumerate(runs):
            if given := run.samples.get((prompt, reference)):
                replies += [tag("p", tag("span", "■ ", class_=colour(i)), run.name)] if len(runs) > 1 else []
                replies += over_the_steps(given)
        replies += [answer("in the file", beginning(reference))] if reference else []
        yield question(beginning(prompt), *replies)
    if more := questions[SHOWN_QUESTIONS:]:
        yield tag("p", f"... and {len(more):,} more questions in {SAMPLES}", class_="soft")


def over_the_steps(answers: Sequence[tuple[float, str]]) -> list[Html]:
    """The first and the last answer, with the others folded. Equal answers of successive steps become one."""
    spans = []
    for text, group in groupby(answers, key=lambda pair: pair[1]):
        steps = [f"{step:,.0f}" for step, _ in group]
        spans.append(answer(f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}", text))
    between, most = spans[1:-1], SHOWN_ANSWERS
    if not between:
        return spans
    title = f"{len(between):,} answer{'s' * (len(between) > 1)} between"
    if len(between) > most:
        title = f"{most} of {title}"
        between = [between[round(i * (len(between) - 1) / (most - 1))] for i in range(most)]
    return [spans[0], tag("details", tag("summary", title), *between), spans[-1]]


def question(prompt: str, *replies: Html) -> Html:
    """A prompt and the answers to it."""
    return tag("div", tag("b", prompt, class_="text"), *replies, class_="card row")


def answer(when: str, text: str) -> Html:
    """An answer, and beside it the step or the model that it comes from."""
    return tag("div", tag("span", when, class_="soft"), tag("span", text, class_="text"), class_="reply")


def beginning(text: str) -> str:
    """The first SHOWN_CHARACTERS characters of a text."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."


def data(runs: Sequence[Record]) -> Html:
    """A table of the data files: rows read, kept and dropped, and their tokens."""

    def count(entry: dict[str, Any], key: str) -> float:
        return number(entry.get(key)) or 0

    cells: dict[str, Callable[[dict[str, Any]], str]] = {
        "rows": lambda entry: f"{count(entry, 'rows'):,.0f}",
        "kept": lambda entry: f"{count(entry, 'kept'):,.0f}",
        "bad": lambda entry: f"{count(entry, 'bad'):,.0f}",
        "too long": lambda entry: f"{count(entry, 'dropped_overlong'):,.0f}",
        "nothing supervised": lambda entry: f"{count(entry, 'dropped_unsupervised'):,.0f}",
        "repeats": lambda entry: f"{count(entry, 'dropped_repeats'):,.0f}",
        "cut": lambda entry: f"{count(entry, 'truncated'):,.0f}",
        "tokens per row: p50 / p95 / max": lambda entry: " / ".join(
            f"{count(mapping(entry.get('lengths')), key):,.0f}" for key in ("p50", "p95", "max")
        ),
        "tokens": lambda entry: f"{count(entry, 'tokens'):,.0f}",
        "supervised": lambda entry: f"{100 * count(entry, 'supervised_tokens') / (count(entry, 'tokens') or 1):.0f} %",
    }
    columns: dict[tuple[str, ...], None] = {}  # a file that several runs read has one column
    for run in runs:
        for entry in objects(run.about.get("data")):
            columns[str(entry.get("file", "")), *(cell(entry) for cell in cells.values())] = None
    if not columns:
        return tag("p", "The run did not record its data.", class_="soft")
    head, *rows = zip(("", *cells), *columns, strict=True)
    return table(head, rows)


def settings(runs: Sequence[Record]) -> Html:
    """A table of all settings. First come those that differ between the runs, or from the defaults."""

    def shown(value: object) -> str:
        return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    rows = {key: tuple(shown(run.config.get(key, "")) for run in runs) for key in keys}
    head: tuple[str, ...]
    if len(runs) > 1:
        first = [key for key in keys if len(set(rows[key])) > 1]
        title, head = "settings that differ between the runs", ("", *(run.name for run in runs))
    else:
        first = [key for key in keys if key in FIELDS and rows[key] != (shown(FIELDS[key].default),)]
        title, head = "settings that differ from the defaults", ()
    rest = [(key, *rows[key]) for key in keys if key not in first]
    versions = [mapping(run.about.get("versions")) for run in runs]
    names = dict.fromkeys(name for each in versions for name in each)
    rest += [(f"version of {name}", *(str(each.get(name, "")) for each in versions)) for name in names]
    rest.append(("device", *(f"{run.about.get('device', '')} {run.about.get('dtype', '')}" for run in runs)))
    return tag(
        "div",
        tag("p", title, class_="soft"),
        table(head, [(key, *rows[key]) for key in first] or [("nothing", *("" for _ in runs))]),
        tag("details", tag("summary", "all other settings, and versions"), table(head, rest)),
    )


def result(run: Record) -> Html:
    """A table of the saved result and its verification."""
    difference = run.number("verified_max_logit_difference")
    if difference is None:
        return tag("p", "There is no result yet: a run saves and verifies it at its end.", class_="soft")
    folder = result_folder(run)
    weights = folder / ("adapter_model.safetensors" if folder.name == "adapter" else "model.safetensors")
    size = f"{weights.stat().st_size / 2**20:,.1f} MiB" if weights.is_file() else "missing"
    rows = [
        ("folder", f"{folder} ({weights.name}: {size})"),
        ("verified", "read from the disk into a fresh base, it computes the logits of the model that was trained: "
         f"largest difference {difference:.3g}"),
        ("base", f"{run.config.get('model', '')}, fingerprint {str(run.about.get('base_fingerprint', ''))[:16]}"),
    ]  # fmt: skip
    return table((), rows)


def result_folder(run: Record) -> Path:
    """The folder of the run's adapter or model; the summary cannot name any other folder."""
    return run.folder / ("model" if run.summary.get("result") == "model" else "adapter")


def commands(run: Record) -> list[str]:
    """The commands that use the result, or the one that resumes a run that has not ended."""
    folder = shlex.quote(str(run.folder))
    if not run.summary:
        return [f"python -m minilora train --resume {folder}"]
    adapter = run.summary.get("result") != "model"
    source = f"--{'adapter' if adapter else 'model'} {shlex.quote(str(result_folder(run)))}"
    lines = [f"python -m minilora chat {source}"]
    if held_out := run.config.get("eval_file"):
        lines.append(f"python -m minilora eval {source} --eval_file {shlex.quote(str(held_out))}")
    if adapter:
        lines.append(f"python -m minilora verify {source}")
        lines.append(f"python -m minilora merge {source} --output_dir {shlex.quote(str(run.folder / 'merged'))}")
        lines.append(
            f"python -m minilora export {source} --output_dir {shlex.quote(str(run.folder / 'portable'))} --portable"
        )
    lines.append(f"python -m minilora report {folder} ANOTHER_RUN")
    return lines
