"""What minilora 0.1 wrote can be read: an adapter, a run folder and a checkpoint (tests/v0_1/README.md)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minilora import cli, demo, loop
from minilora.config import TrainConfig
from minilora.tools.verify import verify
from minilora.training import checkpoint
from minilora.training.rundir import saved_config

V0_1 = Path(__file__).parent / "v0_1"
HERE = {  # the places of 0.1's machine; a checkpoint compares what these files hold
    "model": str(demo.DEMO_DIR),
    "train_file": str(V0_1 / "train.jsonl"),
    "eval_file": str(V0_1 / "valid.jsonl"),
}


@pytest.fixture
def run(tmp_path):
    """A copy of the run folder."""
    return Path(shutil.copytree(V0_1 / "run", tmp_path / "run"))


def test_the_adapter_is_verified_on_its_base(run):
    """Its base's fingerprint, computed by 0.1, is the one that is computed now."""
    verdict = verify(run / "adapter", str(demo.DEMO_DIR), "cpu")
    assert verdict.same_base
    assert verdict.config.rank == 2
    assert verdict.largest_effect > 1


def test_the_adapter_goes_on_training(run, tmp_path):
    config = TrainConfig(
        **HERE | {"eval_file": None}, adapter=str(run / "adapter"), lora_r=2, target_modules=("q_proj", "down_proj"),
        max_steps=1, device="cpu", dtype="float32", output_dir=str(tmp_path / "further"),
    )  # fmt: skip
    assert loop.train(config).steps == 1


def test_the_checkpoint_is_whole(run):
    found, refused = checkpoint.newest_valid(run)
    assert found == run / "checkpoints" / "step-000002"
    assert not refused


@pytest.mark.usefixtures("bare_run")
def test_the_run_is_resumed(run, capsys):
    """Steps 3 and 4 give 0.1's own result: bit for bit on the processor that wrote it, within rounding on others."""
    before = load_file(run / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(run / "adapter")
    flags = [word for key, value in HERE.items() for word in (f"--{key}", value)]
    assert cli.main(["train", "--resume", str(run), *flags]) == 0
    assert "resuming from" in capsys.readouterr().out
    after = load_file(run / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.allclose(tensor, after[name], rtol=1e-4, atol=1e-5), name
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ours = [line["loss"] for line in steps if "loss" in line]
    theirs = [json.loads(line) for line in (V0_1 / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ours == pytest.approx([line["loss"] for line in theirs if "loss" in line], rel=1e-4)


def test_other_settings_are_refused_with_the_reason(run, capsys):
    flags = [word for key, value in HERE.items() for word in (f"--{key}", value)]
    assert cli.main(["train", "--resume", str(run), *flags, "--lora_r", "4"]) == 2
    assert "lora_r: was 2, is 4" in capsys.readouterr().err


def test_every_saved_key_is_known(run):
    assert saved_config(run).keys() <= set(TrainConfig.__dataclass_fields__)
