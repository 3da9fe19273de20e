"""benchmarks/compare.py: the dtypes of the contenders; the measuring itself takes minutes and is not run here."""

import json
import sys

import pytest

from benchmarks import compare
from benchmarks.common import FailedError

SPEEDS = {  # tokens/s; None: the contender fails
    ("minilora", "auto"): 200.0,
    ("seed", "bfloat16"): 20.0,
    ("seed", "float32"): 30.0,
    ("trl", "bfloat16"): 80.0,
    ("trl", "float32"): None,
    ("trl-1", "bfloat16"): None,
    ("trl-1", "float32"): None,
}


def compared(monkeypatch, out, *words):
    """(exit code, the calls (name, dtype, rows, check) of the contenders)"""
    calls = []

    def written(script, name, *words):
        dtype, rows = (words[words.index(flag) + 1] for flag in ("--dtype", "--rows"))
        calls.append((name, dtype, int(rows), "--check" in words))
        speed = SPEEDS.get((name, dtype), 80.0)
        if speed is None:
            raise FailedError("no room")
        figures = {"tokens_per_second": speed, "supervised_tokens_per_second": speed, "peak_bytes": 2**30}
        figures |= {"seconds_to_first_step": 1.0, "first_step_loss": 2.0, "first_grad_norm": 1.0, "dtype": dtype}
        return figures | {"start_completion_loss": 2.0}

    monkeypatch.setattr(compare, "written_by", written)
    monkeypatch.setattr(sys, "argv", ["compare", "--repeat", "1", "--out", str(out), *words])
    return compare.main(), calls


def test_each_peer_is_measured_in_its_faster_dtype(tmp_path, monkeypatch, capsys):
    out = tmp_path / "compare.json"
    words = ["--contenders", "minilora,seed,trl,trl-1", "--best_dtype"]
    code, calls = compared(monkeypatch, out, *words)
    assert code == 1  # trl-1 failed
    trials = [(name, dtype, 32, False) for dtype in compare.DTYPES for name in ("seed", "trl", "trl-1")]
    assert calls[:6] == trials
    taken = [("minilora", "auto"), ("seed", "float32"), ("trl", "bfloat16")]
    assert calls[6:] == [(*each, 64, check) for check in (True, False) for each in taken]
    printed = capsys.readouterr().out
    assert "| seed | 20.0 (1.00) | 30.0 (1.00) | float32 |" in printed
    assert "| trl | 80.0 (1.00) | failed: no room | bfloat16 |" in printed
    assert "| trl-1 | failed: no room | failed: no room | none |" in printed
    assert "| seed | float32 | 30.0 (30.0 - 30.0) | 30.0 | 0.15 x |" in printed
    assert json.loads(out.read_text())["trials"]["seed"]["float32"]["tokens_per_second"] == 30.0


def test_without_best_dtype_all_take_auto(tmp_path, monkeypatch):
    code, calls = compared(monkeypatch, tmp_path / "compare.json", "--contenders", "minilora,trl")
    assert (code, {dtype for _, dtype, _, _ in calls}, len(calls)) == (0, {"auto"}, 4)


@pytest.mark.parametrize("words", [["--rows", "33"], ["--trial_rows", "8"], ["--contenders", "trl,trll"]])
def test_bad_arguments_are_one_line(words, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as refused:
        compared(monkeypatch, tmp_path / "compare.json", *words)
    assert refused.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
