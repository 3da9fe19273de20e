"""`minilora doctor`: a machine on which all is well, then one planted fault after the other, each named and mended."""

import ctypes
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from minilora import cli
from minilora.errors import ModelError
from minilora.tools import doctor
from minilora.tools.doctor import Asked, declared, examine, incomplete, lacking, numbers, project
from minilora.utils import device as devices
from minilora.utils.device import driver_cuda, why_cpu

UNREAD = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "XDG_", "TORCH", "CUDA_")  # what the machine of a test does not set
PAD_LINE = '"pad_token": "<|endoftext|>"'


@pytest.fixture
def machine(tmp_path, tiny_folder, monkeypatch):
    """A machine without a card, with a whole model, an empty cache and a hub that answers; as a namespace to spoil."""
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    (tmp_path / "cache").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(UNREAD)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("minilora.models.load.hub_answers", lambda name: "")
    monkeypatch.setattr("minilora.models.load.cached_model", lambda name: None)
    monkeypatch.setattr(devices, "driver_cuda", lambda: None)
    monkeypatch.setattr(devices, "KERNEL_DRIVER", tmp_path / "no driver")
    monkeypatch.setattr(torch.version, "cuda", None)
    write(model / "generation_config.json", eos_token_id=end_of(model))

    def findings(model=str(model), output_dir="runs"):
        return {finding.name: finding for finding in examine(Asked(model, output_dir))}

    return types.SimpleNamespace(model=model, folder=tmp_path, patch=monkeypatch, findings=findings)


def write(path: Path, **keys) -> None:
    """A JSON file with some keys changed; those of value None removed."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in (old | keys).items() if value is not None}))


def end_of(model: Path) -> int:
    (end,) = [
        token["id"]
        for token in json.loads((model / "tokenizer.json").read_text())["added_tokens"]
        if token["content"] == "<|im_end|>"
    ]
    return end


def versions(machine, **changed):
    """Installed versions, some of them other than they are; None: not installed."""
    really = importlib.metadata.version

    def version(name):
        if name in changed and changed[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return changed.get(name) or really(name)

    machine.patch.setattr(importlib.metadata, "version", version)


def test_all_is_well(machine, capsys):
    before = sorted(machine.folder.rglob("*"))
    assert cli.main(["doctor", "--model", str(machine.model)]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("\nAll checks passed.\n")
    assert "FAIL" not in printed
    names = {line[6:23].strip() for line in printed.splitlines()}
    assert names >= {"python", "torch", "device", "arithmetic", "output folder", "cache", "hub", "pad token", "weights"}
    assert sorted(machine.folder.rglob("*")) == before, "it leaves nothing behind"


# ---------------------------------------------------------------------------------------- planted faults


def no_cuda_build(machine):
    machine.patch.setattr(devices, "driver_cuda", lambda: (12, 2))


def driver_too_old(machine):
    machine.patch.setattr(devices, "driver_cuda", lambda: (12, 2))
    machine.patch.setattr(torch.version, "cuda", "13.0")


def hidden_card(machine):
    machine.patch.setattr(devices, "driver_cuda", lambda: (12, 8))
    machine.patch.setattr(torch.version, "cuda", "12.6")
    machine.patch.setattr(torch.cuda, "is_available", lambda: False)
    machine.patch.setenv("CUDA_VISIBLE_DEVICES", "")


def container_without_card(machine):
    (machine.folder / "no driver").write_text("NVRM version: 535")


def wrong_pad_token(machine):
    write(machine.model / "tokenizer_config.json", pad_token="<|im_end|>")


def added_pad_token(machine):
    """A word that the tokenizer has no token for: it gets a new one, which the model has no embedding for."""
    write(machine.model / "tokenizer_config.json", pad_token="[PAD]")


def no_end_token(machine):
    write(machine.model / "generation_config.json", eos_token_id=0)


def unwritable_cache(machine):
    (machine.folder / "cache").rmdir()
    (machine.folder / "cache").write_text("a file")


def unwritable_output(machine):
    def temporary(dir):
        raise PermissionError(13, "Permission denied")

    machine.patch.setattr(doctor.tempfile, "TemporaryFile", temporary)


def full_disk(machine):
    machine.patch.setattr(doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**27))


def old_transformers(machine):
    versions(machine, transformers="4.41.2")


def missing_package(machine):
    versions(machine, safetensors=None)


def missing_extra(machine):
    versions(machine, peft=None)


def bitsandbytes_at(machine, spec):
    really = doctor.importlib.util.find_spec
    machine.patch.setattr(
        doctor.importlib.util, "find_spec", lambda name: spec if name == "bitsandbytes" else really(name)
    )


def missing_bitsandbytes(machine):
    bitsandbytes_at(machine, None)


def bitsandbytes_for_another_cuda(machine):
    folder = machine.folder / "bitsandbytes"
    folder.mkdir()
    (folder / "libbitsandbytes_cuda118.so").write_text("")
    spec = types.SimpleNamespace(submodule_search_locations=[str(folder)])
    bitsandbytes_at(machine, spec)
    machine.patch.setattr(torch.version, "cuda", "12.6")
    versions(machine, bitsandbytes="0.45.0")


def missing_tokenizer(machine):
    (machine.model / "tokenizer.json").unlink()


def no_chatml(machine):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = machine.model / name
        path.write_text(path.read_text().replace("<|im_end|>", "<|done|>"))


def added_end_token(machine):
    """A tokenizer without <|im_end|>, whose settings ask for one: it gets a new token, which has no embedding."""
    path = machine.model / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_end|>", "<|done|>"))
    write(machine.model / "tokenizer_config.json", added_tokens_decoder=None, additional_special_tokens=None)


def sharded(machine):
    """The weights in two files, as larger models have them."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(machine.model)
    (machine.model / "model.safetensors").unlink()
    loaded.save_pretrained(machine.model, max_shard_size="300KB")
    return sorted(machine.model.glob("model-*.safetensors"))


def missing_shard(machine):
    sharded(machine)[-1].unlink()


def truncated_shard(machine):
    path = sharded(machine)[0]
    os.truncate(path, path.stat().st_size - 100)


def another_shard(machine):
    shards = sharded(machine)
    shutil.copy(shards[0], shards[1])


def only_pickles(machine):
    (machine.model / "model.safetensors").rename(machine.model / "pytorch_model.bin")


def broken_header(machine):
    (machine.model / "model.safetensors").write_bytes(b"\xff" * 64)


def other_attention(machine):
    write(machine.model / "config.json", attention_dropout=0.1)


def composite_model(machine):
    """What Qwen3.5 and the vision models have: the text model's settings stand inside."""
    config = json.loads((machine.model / "config.json").read_text())
    (machine.model / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": config}))


def no_pad_that_it_has(machine):
    """A ChatML tokenizer that pads with the end token and has no <|endoftext|>."""
    path = machine.model / "tokenizer.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "<|vision_pad|>"))
    keys = {"additional_special_tokens": None, "extra_special_tokens": None, "added_tokens_decoder": None}
    write(machine.model / "tokenizer_config.json", pad_token="<|im_end|>", **keys)


def unwritable_compile_cache(machine):
    (machine.folder / "file").write_text("")
    machine.patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(machine.folder / "file" / "cache"))


def adapter_folder(machine):
    for file in machine.model.iterdir():
        file.unlink()
    write(machine.model / "adapter_config.json")


def run_folder(machine):
    (machine.model / "metrics.jsonl").touch()
    (machine.model / "adapter").mkdir()


FAULTS = [
    (no_cuda_build, "FAIL", "device", "runs CUDA 12.2, but torch", "torch's build for CUDA 12"),
    (driver_too_old, "FAIL", "device", "CUDA 13.0, but the NVIDIA driver runs CUDA 12.2 at most", "update the driver"),
    (hidden_card, "FAIL", "device", "torch finds no card", "CUDA_VISIBLE_DEVICES is '': unset it"),
    (container_without_card, "FAIL", "device", "libcuda.so.1 is not found", "--gpus all"),
    (wrong_pad_token, "note", "pad token", "<|im_end|> in the files; minilora pads with <|endoftext|>", PAD_LINE),
    (added_pad_token, "note", "pad token", "[PAD] in the files; minilora pads with <|endoftext|>", PAD_LINE),
    (no_end_token, "note", "end token", "does not name <|im_end|>", '"eos_token_id": ['),
    (unwritable_output, "FAIL", "output folder", "runs cannot be written", "--output_dir DIR"),
    (full_disk, "FAIL", "output folder", "0.12 GiB free, 1 GiB needed", "free some space"),
    (old_transformers, "FAIL", "transformers", "4.41.2 is older than 5.", 'pip install -U "transformers>=5.'),
    (missing_package, "FAIL", "safetensors", "is not installed", 'pip install -U "safetensors>='),
    (missing_extra, "note", "extra bench", "peft is not installed", 'pip install -U "peft>='),
    (missing_bitsandbytes, "note", "bitsandbytes", "not installed", "pip install -U bitsandbytes"),
    (bitsandbytes_for_another_cuda, "note", "bitsandbytes", "no library for torch's CUDA 12.6", "pip install -U"),
    (missing_tokenizer, "FAIL", "tokenizer", "copy tokenizer.json there", "hf download"),
    (no_chatml, "FAIL", "tokenizer", "it is not a ChatML (Qwen) tokenizer", "hf download"),
    (added_end_token, "FAIL", "end token", "<|im_end|> has id", "hf download"),
    (missing_shard, "FAIL", "weights", ".safetensors: missing", "hf download"),
    (truncated_shard, "FAIL", "weights", " bytes of ", "hf download"),
    (another_shard, "FAIL", "weights", " is missing", "hf download"),
    (only_pickles, "FAIL", "weights", "model.safetensors: missing", "only .bin files are there"),
    (broken_header, "FAIL", "weights", "not readable", "hf download"),
    (other_attention, "FAIL", "weights", "attention_dropout is set", ""),
    (composite_model, "FAIL", "weights", "model type qwen3_5 is not supported", "give another --model, for example"),
    (no_pad_that_it_has, "note", "pad token", "minilora pads with <|vision_pad|>", '"pad_token": "<|vision_pad|>"'),
    (unwritable_compile_cache, "FAIL", "compile cache", "TORCHINDUCTOR_CACHE_DIR", "unset TORCHINDUCTOR_CACHE_DIR"),
    (adapter_folder, "FAIL", "model", "is no model folder", "it holds an adapter"),
    (run_folder, "FAIL", "model", "is no model folder", "it is a run: give --adapter "),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0].__name__)
def test_a_planted_fault_is_named_with_its_fix(fault, machine, capsys):
    plant, state, name, text, fix = fault
    plant(machine)
    assert cli.main(["doctor", "--model", str(machine.model)]) == (state == "FAIL")
    printed = capsys.readouterr().out
    assert "a mistake of ours" not in printed
    (found,) = re.findall(rf"^{state:<5} {name:<17} (.*)\n {{6}}  fix {{13}}(.*)$", printed, re.M)
    assert text in found[0]
    assert fix in found[1]


def test_a_driver_runs_all_minor_versions_of_its_cuda(machine):
    """CUDA's minor version compatibility: torch for 12.6 runs on a driver for 12.2."""
    machine.patch.setattr(devices, "driver_cuda", lambda: (12, 2))
    machine.patch.setattr(torch.version, "cuda", "12.6")
    machine.patch.setattr(torch.cuda, "is_available", lambda: True)
    machine.patch.setattr(torch.cuda, "device_count", lambda: 1)
    card = types.SimpleNamespace(name="RTX 4080", total_memory=16 * 2**30)
    machine.patch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    (found,) = doctor.device(Asked(None, "runs"))
    assert (found.state, found.text) == ("ok", "RTX 4080 (16 GiB); torch for CUDA 12.6, driver for 12.2")


@pytest.mark.parametrize("plant", [no_cuda_build, driver_too_old, hidden_card, container_without_card])
def test_a_run_can_say_why_it_takes_the_cpu(machine, plant):
    """`train` says the same as `doctor`, in one line; where nothing is odd it says nothing."""
    assert why_cpu() == ""
    plant(machine)
    (found,) = doctor.device(Asked(None, "runs"))
    assert found.state == "FAIL"
    assert why_cpu() == f"{found.text}; {found.fix}"


# ---------------------------------------------------------------------------------------- where the hub is needed


def test_a_cache_is_needed_where_the_model_has_to_be_downloaded(machine):
    name = "Qwen/Qwen2-0.5B-Instruct"
    assert machine.findings(name)["cache"].state == machine.findings(name)["hub"].state == "ok"
    assert "the first run downloads" in machine.findings(name)["hub"].text
    unwritable_cache(machine)
    assert machine.findings(name)["cache"].state == "FAIL"
    assert "export HF_HOME=" in machine.findings(name)["cache"].fix
    assert machine.findings()["cache"].state == "note", "a model in a folder needs none"
    machine.patch.setattr("minilora.models.load.cached_model", lambda name: machine.model)
    found = machine.findings(name)
    assert (found["cache"].state, found["hub"].state, found["weights"].state) == ("note", "ok", "ok")


def test_a_hub_that_does_not_answer(machine):
    machine.patch.setattr("minilora.models.load.hub_answers", lambda name: "the hub cannot be reached (ConnectError)")
    found = machine.findings("Qwen/Qwen2-0.5B-Instruct")["hub"]
    assert found.state == "FAIL"
    assert "--model FOLDER" in found.fix
    assert "HF_ENDPOINT" in found.fix
    assert machine.findings(None)["hub"].state == "note", "the demo needs none"
    assert machine.findings()["hub"].state == "ok"
    machine.patch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in machine.findings("Qwen/Qwen2-0.5B-Instruct")["hub"].fix


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/x", "a/b/c"])
def test_no_model_of_that_name(machine, name, capsys):
    assert cli.main(["doctor", "--model", name]) == ModelError.exit_code
    assert capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------------------------------- the checks themselves


def test_a_check_that_breaks_is_a_finding(machine, capsys):
    machine.patch.setattr(doctor, "CHECKS", (doctor.python, broken_check, missing_import))
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  broken_check      the check raised ZeroDivisionError" in printed
    assert "FAIL  missing_import    no_such_package cannot be imported" in printed
    assert "2 of 3 checks failed." in printed


def broken_check(asked):
    yield 1 / 0


def missing_import(asked):
    import no_such_package

    yield no_such_package


def test_requirements_are_those_of_the_project():
    python, needed = declared()
    assert python.startswith(">=3.")
    assert {"torch", "transformers"} <= {requirement.partition(">=")[0] for requirement in needed[""]}
    for requirements in needed.values():
        for requirement in requirements:
            name, least = requirement.split(">=")
            assert name.replace("-", "").isalnum()
            assert doctor.numbers(least), requirement


def test_no_floor_is_below_what_transformers_asks_for():
    """A floor below it claims a version with which nothing was ever run."""
    asked = {project(line): line for line in importlib.metadata.requires("transformers") if "extra" not in line}
    shared = [requirement for requirement in declared()[1][""] if project(requirement) in asked]
    assert {project(requirement) for requirement in shared} >= {"safetensors", "tokenizers", "numpy"}
    for requirement in shared:
        least = re.search(r">=([\d.]+)", asked[project(requirement)])
        assert numbers(requirement.partition(">=")[2]) >= numbers(least[1]), requirement


def test_requirements_of_an_installed_package(tmp_path, monkeypatch):
    lines = ["Requires-Python: >=3.11", "Requires-Dist: torch>=2.11", 'Requires-Dist: peft>=0.19; extra == "bench"']
    about = tmp_path / "minilora-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: minilora\nVersion: 1\n" + "\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "minilora" / "tools" / "doctor.py"))
    assert declared() == (">=3.11", {"": ["torch>=2.11"], "bench": ["peft>=0.19"]})
    (about / "METADATA").unlink()
    about.rmdir()
    assert declared() == ("", {})  # copied from somewhere
    (found,) = doctor.packages(Asked(None, "runs"))
    assert (found.state, found.name) == ("note", "packages")
    assert next(doctor.python(Asked(None, "runs"))).state == "ok"


@pytest.mark.parametrize(
    ("installed", "least", "good"),
    [
        ("2.13.0+cpu", "2.11", True),
        ("2.9.1", "2.11", False),
        ("5.17.0.dev0", "5.17", True),
        ("5.17", "5.17.1", False),
        ("5.17", "5.17.0", True),
    ],
)
def test_versions_are_compared_as_numbers(installed, least, good, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    assert (lacking(f"x>={least}") == "") == good


def test_the_driver_is_asked(monkeypatch):
    class Library:
        @staticmethod
        def cuDriverGetVersion(pointer):
            pointer._obj.value = 12080
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    assert driver_cuda() == (12, 8)

    def nothing(name):
        raise OSError("no such file")

    monkeypatch.setattr(ctypes, "CDLL", nothing)
    assert driver_cuda() is None


def test_a_complete_file_is_complete(tiny_folder, tmp_path):
    path = tiny_folder / "model.safetensors"
    assert incomplete(path) == ""
    for content in (b"", b"\0" * 8, (2).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"):
        (tmp_path / "x.safetensors").write_bytes(content)
        assert incomplete(tmp_path / "x.safetensors"), content


def test_it_runs_where_nothing_can_be_imported(tmp_path):
    """What is missing is what it is to find: it must not need it itself."""
    for name in ("torch", "transformers", "numpy", "huggingface_hub", "tokenizers", "safetensors"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('broken', name='{name}')\n")
    done = subprocess.run(
        [sys.executable, "-m", "minilora", "doctor"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(doctor.__file__).parent.parent.parent}"},
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "torch cannot be imported" in done.stdout
    assert "pip install -U torch" in done.stdout
