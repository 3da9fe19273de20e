"""Every command of the README does what it says, in the order in which it stands there."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
DEMO = str(ROOT / "minilora" / "demo" / "model")
HUB_NAME = "Qwen/Qwen2-0.5B-Instruct"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def for_the_test(command: str) -> str | None:
    """The command as a machine without network can run it in seconds; None where another test or .ci/run holds it.

    The hub's model becomes the demo's, a run becomes two steps; nothing else changes.
    """
    if "pytest" in command or "benchmarks/" in command:
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


@pytest.mark.timeout(900)  # a dozen programs one after the other, on a machine that may be busy
def test_the_commands_of_the_readme(tmp_path):
    for name in ("train.py", "data", "minilora"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    assert len(commands) >= 8
    for command in commands:
        changed = for_the_test(command)
        if changed is None:
            continue
        done = subprocess.run(
            ["bash", "-ec", changed],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, f"{command}\n{changed}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        if "generate" in command or "chat" in command:
            assert len(done.stdout.strip()) > 1, command


def test_the_run_folder_is_as_the_readme_shows_it(tmp_path):
    (shown,) = [block for block in blocks("text") if "runs/mine/config.json" in block]
    names = re.findall(r"^(?:runs/mine/|\s+)([\w.]+/?)\s", shown, re.M)
    assert {"config.json", "metrics.jsonl", "adapter/", "best/", "checkpoints/", "summary.json"} <= set(names)
    flags = ["--max_steps", "1", "--eval_samples", "1", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "demo", *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for name in names:
        path = tmp_path / "run" / name
        assert path.is_dir() if name.endswith("/") else path.is_file(), name


def test_peft_loads_it_as_the_readme_shows(tmp_path, monkeypatch):
    (code,) = [block for block in blocks("python") if "PeftModel" in block]
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "train.py"),
            "demo",
            "--max_steps",
            "1",
            "--output_dir",
            str(tmp_path / "runs/mine"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code.replace(HUB_NAME, DEMO), names)  # the README's own lines
    assert type(names["model"]).__name__.startswith("PeftModel")


def test_the_step_in_the_readme_is_the_one_in_the_code():
    """The README shows code; code that has moved on would make it a lie."""
    source = (ROOT / "minilora" / "loop.py").read_text("utf-8")
    (function,) = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "gradients"]
    assert ast.get_source_segment(source, function) + "\n" in blocks("python")


def test_the_file_tree_is_the_one_on_the_disk():
    """Each room stands in the tree with its purpose, and nothing stands there that is not on the disk."""
    (tree,) = [block for block in blocks("text") if "minilora/" in block and "loop.py" in block]
    named = set(re.findall(r"^\s*([\w.]+\.py)\s", tree, re.M))
    rooms = {path.name for path in (ROOT / "minilora").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert named == rooms | {"train.py"}


def test_each_cell_about_a_peer_has_its_source():
    """What the README says of the others is what docs/peers.md shows; both leave open what nobody looked at."""

    def cells(text: str, columns: int) -> list[list[str]]:
        rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in re.findall(r"^\|.*\|$", text, re.M)]
        return [row for row in rows if len(row) == columns]

    (section,) = re.findall(r"^What each can do.*?(?=^## )", README, re.M | re.S)
    (_, *names), _, *rows = cells(section, 9)
    said = {(feature, who, cell) for feature, *line in rows for who, cell in zip(names, line, strict=True)}
    assert {cell for *_, cell in said} == {"yes", "no", "partly", "-"}
    _, _, *rows = cells((ROOT / "docs" / "peers.md").read_text("utf-8").split("## Cell by cell")[1], 5)
    assert all(where for *_, where in rows)
    assert {(feature, who, verdict) for feature, who, verdict, _, _ in rows} == {row for row in said if row[2] != "-"}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)", README))))
def test_links_resolve(target):
    assert (ROOT / target).exists()


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"\b(DEMO_OUTPUT|BENCH_TABLE|STEP_CODE|FILE_TREE)\b", README)
    assert shutil.which("bash")
