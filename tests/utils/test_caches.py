"""The sizes that follow from a CPU's caches: read from the system, and the same as the tuned ones on that machine."""

import pytest
import torch

from minilora.utils import device as devices
from minilora.utils.device import block_rows, cache_bytes, micro_batch_tokens, wide_rows

KIB, MIB = 2**10, 2**20


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """A function: the machine's caches as (type, level, size) in words."""

    def plant(*found):
        for number, values in enumerate(found):
            folder = tmp_path / f"index{number}"
            folder.mkdir()
            for name, value in zip(("type", "level", "size"), values, strict=True):
                (folder / name).write_text(f"{value}\n")
        cache_bytes.cache_clear()

    monkeypatch.setattr(devices, "CACHES", tmp_path)
    cache_bytes.cache_clear()
    yield plant
    cache_bytes.cache_clear()


def test_the_system_says_the_sizes(caches):
    caches(("Instruction", 1, "32K"), ("Data", 1, "64K"), ("Unified", 2, "2048K"), ("Unified", 3, "16M"))
    assert [cache_bytes(level) for level in (1, 2, 3)] == [64 * KIB, 2 * MIB, 16 * MIB]


@pytest.mark.parametrize("size", ["", "unknown", "0K"])
def test_usual_sizes_where_the_system_does_not_say(caches, size):
    caches(("Unified", 2, size))
    assert [cache_bytes(level) for level in (1, 2, 3)] == [48 * KIB, MIB, 32 * MIB]


def test_the_sizes_of_the_machine_that_was_tuned(caches):
    """1 MiB of L2 a core, 32 MiB of L3, a 0.5B Qwen: as measured in benchmarks/README.md."""
    assert (block_rows(14), wide_rows(151936), micro_batch_tokens(4864, torch.bfloat16)) == (96, 8, 960)


def test_the_sizes_follow_the_caches_and_the_model(caches):
    caches(("Unified", 2, "4096K"), ("Unified", 3, "64M"))
    assert (block_rows(14), wide_rows(151936), micro_batch_tokens(4864, torch.bfloat16)) == (192, 16, 1920)
    assert (block_rows(56), wide_rows(2 * 151936), micro_batch_tokens(4864, torch.float32)) == (96, 8, 960)
    assert micro_batch_tokens(2 * 4864, torch.bfloat16) == 960


@pytest.mark.parametrize("size", ["64K", "1024M"])
def test_no_size_is_out_of_bounds(caches, size):
    caches(("Unified", 2, size), ("Unified", 3, size))
    assert block_rows(64) >= 16
    assert 1 <= wide_rows(151936) <= 256
    assert 256 <= micro_batch_tokens(4864, torch.bfloat16) <= 1920
