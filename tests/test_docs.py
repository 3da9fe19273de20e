"""What the documents say: their commands run, their code is the package's, their links and names lead somewhere."""

import contextlib
import inspect
import itertools
import os
import re
import socket
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, first_step, flat, randomize_lora, relative_error, trained
from test_readme import DEMO, told_by
from test_rooms import MAX_STEP_LINES
from torch.nn.attention.varlen import varlen_attn

import minilora
from benchmarks import scaling
from minilora import cli, loop
from minilora.batching import collate
from minilora.config import FIELDS
from minilora.data import formats, rows
from minilora.errors import DataError
from minilora.loss import plain_nats
from minilora.objectives.sft import SFT
from minilora.training import setup
from minilora.training.memory_estimate import USABLE

DOCUMENTS = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]
OTHER_FLAGS = {"max", "nproc", "repeat"}  # how those of vllm, torchrun and the benchmarks begin


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path) -> list[tuple[str, str]]:
    """(info string, content) of each fenced block."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", path.read_text("utf-8"), re.M | re.S)


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.M | re.S)


# ---------------------------------------------------------------------------------------- commands


def told_by_all(block: str) -> str:
    """What the commands of a block print, run one after the other."""
    return "".join(map(told_by, filter(None, map(str.strip, block.splitlines()))))


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """(its folder, what is shown and what was told) of the walkthrough's commands, in the order of the document."""
    folder, shown, printed = tmp_path_factory.mktemp("clone"), [], ""
    for name in ("train.py", "data", "minilora"):
        (folder / name).symlink_to(ROOT / name)
    with contextlib.chdir(folder):
        for language, content in blocks(ROOT / "docs" / "walkthrough.md"):
            if language == "bash":
                printed = told_by_all(content)
            elif language == "text":
                shown.append((content, printed))
    return folder, shown


def measured(line: str) -> str:
    """A line without the digits of what is computed in floating point, whose last ones are each machine's own."""
    return re.sub(r"-?\d+\.\d+", "#", line).rstrip()


def test_the_commands_of_the_walkthrough_print_what_it_shows(walked):
    assert len(walked[1]) >= 3
    for content, printed in walked[1]:
        lines = {measured(line) for line in printed.splitlines()}
        missing = [line for line in content.splitlines() if measured(line) not in lines]
        assert not missing, f"{missing}\nnot in\n{printed}"


def test_the_commands_of_the_questions_run(walked):
    content = [content for language, content in blocks(ROOT / "docs" / "faq.md") if language == "bash"]
    assert content
    with contextlib.chdir(walked[0]):
        for block in content:
            told_by_all(block)


# ---------------------------------------------------------------------------------------- code and names

QUOTED = [
    pytest.param(path, language.split()[1], content, id=f"{named(path)}:{content.split()[0]}")
    for path in DOCUMENTS
    for language, content in blocks(path)
    if language.startswith("python ")
]


@pytest.mark.parametrize(("path", "file", "content"), QUOTED)
def test_quoted_code_is_the_code(path, file, content):
    """The lines stand in the file as they are quoted, one after the other; only the indentation of all is left out."""
    source, wanted = (ROOT / file).read_text("utf-8").splitlines(), content.splitlines()
    found = [
        at
        for at in range(len(source))
        if textwrap.dedent("\n".join(source[at : at + len(wanted)])).splitlines() == wanted
    ]
    assert found, f"{named(path)} quotes what is not in {file}:\n{content}"
    assert file in prose(path), f"{named(path)} does not say where this stands: {file}"


def test_the_walkthrough_quotes_the_whole_story():
    files = {file for path, file, _ in (param.values for param in QUOTED) if path.name == "walkthrough.md"}
    modules = (
        *(
            "data/formats",
            "data/markup",
            "data/dataset",
            "data/sampler",
            "batching",
            "loop",
            "objectives/sft",
            "decoder",
            "attention",
            "lora",
            "lora_variants",
            "matmul",
            "loss",
            "optim",
        ),
        *("adapters/format", "training/finish"),
    )
    assert files == {f"minilora/{module}.py" for module in modules}


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_lead_somewhere(path):
    headings = {}
    for target in DOCUMENTS:
        titles = re.findall(r"^#+ (.*)$", prose(target), re.M)
        headings[target] = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", prose(path)):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in headings[target], link


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_tests_that_are_named_are_there(path):
    file = ""
    for name, test in re.findall(r"`(?:(tests/[\w/]+\.py))?(?:::(test_\w+\*?))?`", path.read_text("utf-8")):
        file = name or file
        if not test:
            continue
        defined = re.findall(r"^def (\w+)", (ROOT / file).read_text("utf-8"), re.M)
        assert [each for each in defined if re.fullmatch(test.replace("*", ".*"), each)], f"{file}::{test}"


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name != "peers.md"], ids=named)
def test_flags_and_verbs_that_are_named_are_there(path):
    known = {*FIELDS, *OTHER_FLAGS, "help", *re.findall(r'"--(\w+)"', Path(cli.__file__).read_text("utf-8"))}
    text = path.read_text("utf-8")
    spans = re.findall(r"`([^`\n]+)`", text)
    for flag in re.findall(r"(?<![\w-])--([a-z]\w*)", " ".join(spans)):
        assert flag in known, f"--{flag}"
    for verb in re.findall(r"`(?:python -m )?minilora ([a-z]+)\b", text):
        assert verb in cli.VERBS, verb


# ---------------------------------------------------------------------------------------- two languages

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
CELLS = {"有": "yes", "无": "no", "部分": "partly"}


def tables(path: Path) -> list[list[str]]:
    """The cells of each row of all tables, without its first one, which is in words."""
    rows = re.findall(r"^\|.*\|$", prose(path), re.M)
    return [[CELLS.get(cell.strip(), cell.strip()) for cell in row.strip("|").split("|")[1:]] for row in rows]


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:[.,]\d+)*", text)


def test_both_languages_show_the_same_code():
    """To the letter; of a list of files the names, as what stands beside them is translated."""
    for (language, english), (too, chinese) in zip(blocks(ENGLISH), blocks(CHINESE), strict=True):
        assert language == too
        if language == "text" and english != chinese:
            first_words = [re.findall(r"^ *\S*", block, re.M) for block in (english, chinese)]
            assert first_words[0] == first_words[1]
        else:
            assert english == chinese


def test_both_languages_have_the_same_tables():
    """Cell by cell where a row has numbers or yes and no; a row in words, or of columns' names, is translated."""
    for english, chinese in zip(tables(ENGLISH), tables(CHINESE), strict=True):
        if numbers(" ".join(english)) or set(english) <= {*CELLS.values(), "-", "---"}:
            assert english == chinese
        else:
            assert len(english) == len(chinese)
            parts = [re.findall(r"`([^`]+)`", " ".join(row)) for row in (english, chinese)]
            assert parts[0] == parts[1]
    names = [re.findall(r"^\| (`[^`]+`) \|", prose(path), re.M) for path in (ENGLISH, CHINESE)]
    assert names[0] == names[1]  # of the commands


def test_both_languages_say_the_same():
    """As far as it can be seen without reading: sections, names in code, numbers, links."""
    english, chinese = (re.sub(r"^\|.*\|$", "", prose(path), flags=re.M) for path in (ENGLISH, CHINESE))
    assert re.findall(r"^#+ ", english, re.M) == re.findall(r"^#+ ", chinese, re.M)
    for what in (r"`([^`]+)`", r"\]\(((?!README)[^)]+)\)"):
        found_texts = [{" ".join(found.split()) for found in re.findall(what, text)} for text in (english, chinese)]
        assert found_texts[0] == found_texts[1], found_texts[0] ^ found_texts[1]
    assert set(numbers(english)) == set(numbers(chinese)), set(numbers(english)) ^ set(numbers(chinese))


# ---------------------------------------------------------------------------------------- scaling

SCALING = ROOT / "docs" / "scaling.md"
SCRIPTS = [content for language, content in blocks(SCALING) if language == "bash"]
YAMLS = [
    document for language, content in blocks(SCALING) if language == "yaml" for document in yaml.safe_load_all(content)
]


def scaling_tables() -> list[dict[str, list[str]]]:
    """The cells of each model, of each table."""
    found = re.findall(r"^\| Qwen2.5 .*\n\| ---.*\n((?:\|.*\n)+)", prose(SCALING), re.M)
    rows = [[[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()] for table in found]
    return [{name: cells for name, *cells in table} for table in rows]


@pytest.mark.skipif(
    "enable_gqa" not in inspect.signature(varlen_attn).parameters,
    reason="the document has the figures of a torch whose varlen_attn needs no copies of key heads",
)
def test_the_figures_of_scaling_are_those_that_its_command_prints(capsys, monkeypatch):
    """Of the smallest model on 64 cards."""
    monkeypatch.setattr(sys, "argv", ["scaling", "--models", "0.5B", "--cards", "64"])
    scaling.main()
    printed = [line.strip("| ").split(" | ")[1:] for line in capsys.readouterr().out.splitlines() if "| 0.5B |" in line]
    shown = {cell for table in scaling_tables() for cell in table["0.5B"]}
    assert len(printed) == 10
    for cells in printed:
        assert set(cells) <= shown, cells


def test_what_fits_follows_from_the_memory_of_a_card():
    *memory, _, fits, _ = scaling_tables()  # of LoRA
    for model, cells in fits.items():
        for cell, (table, card_gib) in zip(cells, itertools.product(memory, (16, 24, 80)), strict=True):
            peaks = [[float(peak.replace(",", "")) for peak in each.split(" / ")] for each in table[model]]
            (whole, checkpointed), shards = peaks[0], [with_checkpointing for _, with_checkpointing in peaks[1:]]
            ways = {"replicas": whole, "again": checkpointed}
            ways |= dict(zip(("8 cards", "64 cards", "512 cards"), shards, strict=True)) | {"no": 0.0}
            usable = card_gib * 2**30 * USABLE / 1e9
            assert cell == next(setting for setting, peak in ways.items() if peak <= usable), (model, card_gib)


def test_what_other_launchers_take_can_be_read():
    """YAML parses, bash accepts what it would run; nothing is launched."""
    task, service, job = YAMLS
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    for script in [*SCRIPTS, task["setup"], task["run"], *container["args"]]:
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, f"{script}\n{done.stderr}"
        for flag in re.findall(r"(?<= --)\w+", script.partition("train.py")[2]):
            assert flag in FIELDS, flag


STAND_INS = {  # both tasks of a job on this machine
    "srun": 'shift\nSLURM_NODEID=0 "$@" & first=$!\nSLURM_NODEID=1 "$@" & second=$!\nwait $first && wait $second',
    "scontrol": "echo 127.0.0.1",
}
SLURM = {"SLURM_JOB_NODELIST": "here", "SLURM_CPUS_PER_TASK": "1", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}


@pytest.mark.soak
@pytest.mark.parametrize("script", [each for each in SCRIPTS if "nnodes" in each], ids=["torchrun", "slurm"])
def test_two_machines_that_are_one(script, tmp_path):
    for name in ("train.py", "data", "minilora"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, content in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{content}\n")
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        script = script.replace("29500", str(free.getsockname()[1]))
    script = script.replace("torchrun", f"{sys.executable} -m torch.distributed.run")
    script = re.sub(r"/shared/\S*Instruct", DEMO, script).replace("/shared/", "")
    script = script.replace("--resume auto", "--resume auto --max_steps 2 --device cpu")
    environment = os.environ | SLURM | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "processes    2," in done.stdout
    assert "verified" in done.stdout


# ---------------------------------------------------------------------------------------- extending

EXTENDING = ROOT / "docs" / "extending.md"
OBJECTIVE, READER = (content for language, content in blocks(EXTENDING) if language == "python")


def defined_by(source: str, name: str) -> Any:
    """A class or a function that lines of code define."""
    names: dict[str, Any] = {}
    exec(source, names)
    return names[name]


def changed(source: str, difference: str) -> str:
    """A source after a difference of one place: its lines begin with a space, - or +."""
    lines = difference.splitlines(keepends=True)
    old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
    assert source.count(old) == 1, f"this is not one place of the file:\n{old}"
    return source.replace(old, new)


@pytest.mark.parametrize("budget", [40, 96, 4096])
def test_the_objective_of_the_document_is_its_plain_formula(budget, start):
    """Its loss and its gradient, however the step is cut; and with weight 1 it is SFT."""
    run = start(share_prefix="on")
    randomize_lora(run.model)
    end, weight = run.markup.end, 3
    examples = first_step(run)[0]
    run.state.max_tokens = budget

    def gradient_of_the_step() -> torch.Tensor:
        return flat({name: param.grad.clone() for name, param in trained(run.model).items()})

    found = {}
    for objective in (SFT(), *(defined_by(OBJECTIVE, "EndWeighted")(end, each) for each in (1, weight))):
        run.optimizer.zero_grad()
        run.objective = objective
        loss = loop.gradients(run, examples, objective.count(examples))
        found[objective] = float(loss), gradient_of_the_step()
    (plain, plain_gradient), (same, same_gradient), (loss, gradient) = found.values()
    assert same == plain
    assert torch.equal(same_gradient, plain_gradient)

    run.optimizer.zero_grad()
    total, units = torch.zeros(()), 0
    for example in examples:
        batch = collate([example])
        nats = plain_nats(run.decoder(batch), run.decoder.head_weight, batch.targets)
        weights = 1 + (weight - 1) * (batch.targets == end)
        total, units = total + (weights * nats).sum(), units + int(weights.sum())
    (total / units).backward()
    assert loss == pytest.approx(float(total.detach()) / units, rel=1e-5)
    assert abs(loss - plain) > 1e-4
    assert relative_error(gradient, gradient_of_the_step()) < 1e-5


def test_a_run_with_the_objective_of_the_document(make_config, monkeypatch):
    monkeypatch.setattr(setup, "SFT", lambda: defined_by(OBJECTIVE, "EndWeighted")(2014, 3))
    summary = loop.train(make_config(val_size=0.2, num_train_epochs=2), quiet=True)
    assert summary.last_loss < summary.first_loss


def test_the_row_format_of_the_document(monkeypatch):
    source = Path(formats.__file__).read_text("utf-8")
    for language, content in blocks(EXTENDING):
        if language == "diff minilora/data/formats.py":
            source = changed(source, content)
    row = {"question": "1 + 1?", "answer": "2"}
    with pytest.raises(ValueError, match="the needed fields are"):
        formats.detect_format(row)
    module = types.ModuleType("changed_formats")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # a dataclass looks its module up
    exec(source, module.__dict__)
    assert module.detect_format(row) == "question/answer"
    turns = module.to_turns(row, "question/answer")
    assert [(turn.role, turn.content) for turn in turns] == [("user", "1 + 1?"), ("assistant", "2")]


def test_the_reader_of_the_document(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "read_lines", defined_by(READER, "read_csv"))
    path = tmp_path / "rows.csv"
    path.write_text('instruction,output\n"1 + 1, please",2\n"two\nlines",ok\n', "utf-8")
    found, reading = rows.read_rows(path)
    assert [(row.line, [turn.content for turn in row.turns]) for row in found] == [
        (2, ["1 + 1, please", "2"]),
        (4, ["two\nlines", "ok"]),
    ]
    assert reading.format == "instruction/output"
    path.write_text("instruction,output\nempty,\n\nwhole,ok\n", "utf-8")
    with pytest.raises(DataError, match=r"rows\.csv:2: 'output' is empty"):
        rows.read_rows(path)


# ---------------------------------------------------------------------------------------- the rest of the documents


def test_the_change_log_begins_with_this_version():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert versions[0] == minilora.__version__


def test_the_limits_that_contributors_are_told_are_those_that_hold():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    for number, words in ((MAX_STEP_LINES, "lines"),):
        assert re.search(rf"\b{number} {words}", text), number


def test_contributors_run_what_the_checks_run():
    checks = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    (commands,) = [content for language, content in blocks(ROOT / "CONTRIBUTING.md") if language == "bash"]
    assert set(commands.splitlines()) <= set(checks)
