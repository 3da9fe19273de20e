"""Every command of README and usage page does what it says, in the order in which it stands there."""

import ast
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, bare_runs

from minilora import cli

README = (ROOT / "README.md").read_text("utf-8")
USAGE = (ROOT / "docs" / "usage.md").read_text("utf-8")
MAX_README_LINES = 170
DEMO = str(ROOT / "minilora" / "demo" / "model")
HUB_NAME = "Qwen/Qwen2-0.5B-Instruct"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README + USAGE, re.M | re.S)


def for_the_test(command: str) -> str | None:
    """The command as a machine without network can run it in seconds; None where another test or .ci/run holds it.

    The hub's model becomes the demo's, a run becomes two steps; nothing else changes.
    """
    if "pytest" in command or "-m benchmarks." in command:
        return None
    command = command.removeprefix("pip install -r requirements.txt && ")  # .ci/run installs
    command = re.sub(r"\bpython\b", sys.executable, command).replace(HUB_NAME, DEMO)
    command = re.sub(r"\btorchrun\b", f"{sys.executable} -m torch.distributed.run", command)
    if "train.py lora" in command or "train.py full" in command:
        command += f" --model {DEMO} --output_dir runs/preset"
    command = command.replace("runs/lora-qwen2-0.5b-instruct-train", "runs/preset")
    if "train.py" in command and "--resume" not in command:
        command = re.sub(r" --num_train_epochs \d+", "", command) + " --max_steps 2 --eval_steps 2"
    return command


def told_by(command: str) -> str:
    """What a command prints: the demo and torchrun started as a user starts them, the others in this process."""
    changed = for_the_test(command)
    assert changed is not None, f"no test runs this: {command}"
    if "torchrun" in command or command.endswith("train.py demo"):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(["bash", "-ec", changed], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{command}\n{changed}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout
    asked, piped, changed = changed.rpartition(" | ")
    typed = shlex.split(asked)[1] + "\n" if piped else ""  # echo "..." | python -m minilora chat
    words = shlex.split(changed)[1:]
    argv = ["train", *words[1:]] if words[0] == "train.py" else words[2:]
    assert words[0] == "train.py" or words[:2] == ["-m", "minilora"], command
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(typed))
        code = cli.main(argv)
    assert code == 0, f"{command}\n{changed}\n{errors.getvalue()[-2000:]}"
    return printed.getvalue()


@pytest.mark.timeout(900)  # two dozen commands one after the other, on a machine that may be busy
def test_the_commands_of_the_readme(tmp_path, monkeypatch):
    for name in ("train.py", "data", "minilora"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # torchrun leaves folders there
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    for command in dict.fromkeys(lines):  # README shows some of the commands of the usage page
        if for_the_test(command) is None:
            continue
        printed = told_by(command)
        if "generate" in command or "chat" in command:
            assert len(printed.strip()) > 1, command


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The folder in which runs/mine is a run of one step."""
    folder = tmp_path_factory.mktemp("short")
    flags = ["--max_steps", "1", "--eval_samples", "1", "--output_dir", str(folder / "runs" / "mine")]
    with bare_runs():
        assert cli.main(["train", "demo", *flags]) == 0
    return folder


def test_the_run_folder_is_as_the_readme_shows_it(short_run):
    (shown,) = [block for block in blocks("text") if "runs/mine/config.json" in block]
    names = re.findall(r"^(?:runs/mine/|\s+)([\w.]+/?)\s", shown, re.M)
    assert {"config.json", "metrics.jsonl", "adapter/", "best/", "checkpoints/", "summary.json"} <= set(names)
    for name in names:
        path = short_run / "runs" / "mine" / name
        assert path.is_dir() if name.endswith("/") else path.is_file(), name


def test_peft_loads_it_as_the_readme_shows(short_run, monkeypatch):
    (code,) = [block for block in blocks("python") if "PeftModel" in block]
    monkeypatch.chdir(short_run)
    names: dict[str, object] = {}
    exec(code.replace(HUB_NAME, DEMO), names)  # the README's own lines
    assert type(names["model"]).__name__.startswith("PeftModel")


def test_the_step_in_the_readme_is_the_one_in_the_code():
    """The README shows code; code that has moved on would make it a lie."""
    source = (ROOT / "minilora" / "loop.py").read_text("utf-8")
    (function,) = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "gradients"]
    assert ast.get_source_segment(source, function) + "\n" in blocks("python")


def test_the_file_tree_is_the_one_on_the_disk():
    """Each file and folder stands in the tree with its purpose, and nothing stands there that is not on the disk."""
    (tree,) = [block for block in blocks("text") if "minilora/" in block and "loop.py" in block]
    _, _, inside = tree.partition("minilora/\n")
    inside = inside[: inside.index("\ndata/")]
    named = [word for line in inside.splitlines() for word in re.findall(r"^  ([\w.]+/?(?: demo/)?)", line)[0].split()]
    package = ROOT / "minilora"
    there = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    there |= {f"{path.name}/" for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(named) == there
    assert len(named) == len(there)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= MAX_README_LINES


def test_each_cell_about_a_peer_has_its_source():
    """What the README says of the others is what docs/peers.md shows; both leave open what nobody looked at."""

    def cells(text: str, columns: int) -> list[list[str]]:
        rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in re.findall(r"^\|.*\|$", text, re.M)]
        return [row for row in rows if len(row) == columns]

    (section,) = re.findall(r"^This table shows what each.*\Z", README, re.M | re.S)
    (_, *names), _, *rows = cells(section, 9)
    table = {(feature, who, cell) for feature, *line in rows for who, cell in zip(names, line, strict=True)}
    assert {cell for *_, cell in table} == {"yes", "no", "partly", "-"}
    _, _, *rows = cells((ROOT / "docs" / "peers.md").read_text("utf-8").split("## Cell by cell")[1], 5)
    assert all(where for *_, where in rows)
    assert {(feature, who, verdict) for feature, who, verdict, _, _ in rows} == {row for row in table if row[2] != "-"}
