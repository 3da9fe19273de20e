"""One bit of a checkpoint has flipped: it is refused, and the run goes on from the one before."""

import os
import random
import shutil
from pathlib import Path

import faults
import pytest

from minilora import loop
from minilora.errors import CheckpointError
from minilora.training import checkpoint

FLIPS = 1000
SUBSET = 100
FILES = (checkpoint.WEIGHTS, checkpoint.MOMENTS, checkpoint.STATE, checkpoint.MANIFEST)


@pytest.fixture
def run(make_config, bare_run) -> Path:
    """A run with checkpoints of steps 3 and 4."""
    config = make_config(save_steps=1, lora_r=2)
    loop.train(config)
    return Path(config.output_dir)


def places(sizes: dict[str, int], count: int, seed: int) -> list[tuple[str, int, int]]:
    """(file, byte, bit), seeded: half of them anywhere in all bytes, half equally among the files, ends included."""
    rng = random.Random(seed)
    everywhere = [(name, i) for name in FILES for i in (0, 7, 8, sizes[name] - 1)]
    weighted = rng.choices(FILES, [sizes[name] for name in FILES], k=count // 2)
    chosen = everywhere + [(name, rng.randrange(sizes[name])) for name in weighted]
    while len(chosen) < count:
        name = FILES[len(chosen) % len(FILES)]
        chosen.append((name, rng.randrange(sizes[name])))
    return [(name, place, rng.randrange(8)) for name, place in chosen[:count]]


def flipped(run: Path, count: int, seed: int) -> None:
    newest, before = checkpoint.checkpoints(run)
    checkpoint.validate(newest)
    sizes = {name: (newest / name).stat().st_size for name in FILES}
    unnoticed, wrong = [], []
    for name, place, bit in places(sizes, count, seed):
        file = newest / name
        with open(file, "r+b") as opened:
            opened.seek(place)
            value = opened.read(1)[0]
            opened.seek(place)
            opened.write(bytes([value ^ 1 << bit]))
        try:
            checkpoint.validate(newest)
            unnoticed.append((name, place, bit))
        except CheckpointError as error:
            if str(newest) not in str(error):
                wrong.append(f"{error} does not name {newest}")
        found, refused = checkpoint.newest_valid(run)
        if found != before or len(refused) != 1:
            wrong.append(f"{name} {place} {bit}: {found} was chosen")
        with open(file, "r+b") as opened:
            opened.seek(place)
            opened.write(bytes([value]))
    assert checkpoint.newest_valid(run) == (newest, [])  # all is as it was: each trial flipped one bit only
    print(f"\n{count - len(unnoticed)} of {count} flipped bits detected, the one before used each time")
    assert not unnoticed
    assert not wrong


def test_a_flipped_bit_is_found(run):
    flipped(run, SUBSET, seed=1)


@pytest.mark.soak
def test_a_flipped_bit_is_found_soak(run):
    flipped(run, faults.count("FLIPS", FLIPS), seed=2)


def test_a_run_with_a_flipped_bit_goes_on_from_the_one_before(run, make_config, bare_run, capsys):
    """... says so, and ends where it ended before."""
    newest, before = checkpoint.checkpoints(run)
    adapter = run / "adapter" / "adapter_model.safetensors"
    expected = adapter.read_bytes()
    content = bytearray((newest / checkpoint.WEIGHTS).read_bytes())
    content[len(content) // 2] ^= 4
    (newest / checkpoint.WEIGHTS).write_bytes(content)
    shutil.rmtree(run / "adapter")
    config = make_config(save_steps=1, lora_r=2, resume="auto", train_file=os.fspath(run.parent / "train.jsonl"))
    loop.train(config)
    printed = capsys.readouterr().out
    assert "skipped: " in printed
    assert str(newest / checkpoint.WEIGHTS) in printed
    assert f"resuming from {before}" in printed
    assert adapter.read_bytes() == expected
    assert checkpoint.newest_valid(run) == (newest, [])  # written anew
