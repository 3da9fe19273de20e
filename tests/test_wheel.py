"""What is released: the wheel holds everything a run needs, and trains the demo where there is nothing else."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import minilora

ROOT = Path(minilora.__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "minilora")


def run(*command: object, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def package_files() -> set[str]:
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "minilora").rglob("*") if path.is_file()}
    return {name for name in there if "__pycache__" not in name}


def test_files_that_are_not_code_are_packaged():
    """A preset that is not in the list works in a clone, and is missing for everybody else."""
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["minilora"]
    data = {name.removeprefix("minilora/") for name in package_files() if not name.endswith(".py")}
    assert {"py.typed", "presets/lora.toml", "demo/train.jsonl", "demo/model/model.safetensors"} <= data
    left_out = [name for name in data if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    assert not left_out


def test_the_version_stands_in_one_place():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "minilora.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+(rc\d+|\.dev\d+)?", minilora.__version__)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel as `python -m build` makes it: from the source distribution, which is made from the clone."""
    clone, dist = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, clone / name)
    build = "import sys, setuptools.build_meta as meta; meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, dist, cwd=clone)
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(dist, filter="data")
    (unpacked,) = (path for path in dist.iterdir() if path.is_dir())
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", dist)
    run(*pip, unpacked, cwd=dist)
    (found,) = dist.glob("*.whl")
    return found


@pytest.mark.soak
def test_the_wheel_says_what_it_is(wheel):
    assert wheel.name == f"minilora-{minilora.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        (about,) = (file.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
        (entries,) = (file.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert "minilora = minilora.cli:main" in entries
    assert f"\nVersion: {minilora.__version__}\n" in about
    for field in ("Summary", "License-Expression", "License-File", "Requires-Python", "Author", "Keywords"):
        assert re.search(rf"^{field}: \S", about, re.M), field
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", about, re.M)
    assert sorted(required) == sorted(re.match(r"[\w-]+", line)[0] for line in PROJECT["project"]["dependencies"])
    packaged = {name for name in names if name.startswith("minilora/")}
    assert packaged == package_files()


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_wheel_trains_the_demo_from_an_empty_folder(wheel, tmp_path):
    """In a fresh environment, which sees this one's torch and the rest but not this clone."""
    fresh, empty = tmp_path / "fresh", tmp_path / "empty"
    run(sys.executable, "-m", "venv", "--without-pip", fresh, cwd=tmp_path)
    python = fresh / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (site,) = fresh.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])  # after the fresh one's own packages
    empty.mkdir()
    where = run(python, "-c", "import minilora; print(minilora.__file__)", cwd=empty).strip()
    assert Path(where).parent == site / "minilora"
    assert run(fresh / "bin" / "minilora", "--version", cwd=empty).strip() == f"minilora {minilora.__version__}"

    printed = run(fresh / "bin" / "minilora", "train", "demo", cwd=empty)
    summary = json.loads((empty / "runs" / "lora-demo-train" / "summary.json").read_text("utf-8"))
    assert "verified     runs/lora-demo-train/adapter" in printed
    assert summary["best_eval_loss"] < 0.3 < 2 < summary["first_eval_loss"]
    assert "小洛" in summary["answers"][0]["tuned"]
    ask = ("generate", "--adapter", "runs/lora-demo-train/adapter", "你是谁？")
    assert "小洛" in run(fresh / "bin" / "minilora", *ask, cwd=empty)
