"""benchmarks/vram.py: what it refuses, and its tables; the measuring itself takes minutes and is not run here."""

import json

import pytest

from benchmarks import vram


@pytest.mark.parametrize(
    "argv",
    [
        ["--tokens", "0"],
        ["--tokens", "512,many"],
        ["--methods", "lora,lore"],
        ["--checkpointing", "maybe"],
        ["--steps", "1"],
        ["--examples", "0"],
        ["--dtype", "float16"],
        ["--model", "nowhere"],
        ["--train_file", "nowhere.jsonl"],
        ["--flags", "[]"],
        ["--out", "nowhere/vram.json"],
        ["--nonsense"],
    ],
)
def test_bad_arguments_are_one_line(argv, capsys):
    with pytest.raises(SystemExit) as refused:
        vram.main(argv)
    assert refused.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_setting_that_fails_stops_no_other_and_is_told(tmp_path, monkeypatch, capsys):
    good = {"largest_tokens": 508, "predicted_peak_bytes": 2**30, "peak_bytes": 2**31, "tokens_per_second": 100.0}
    good |= {
        "dtype": "float32",
        "base_dtype": "bfloat16",
        "trainable_parameters": 10,
        "parameters": 1000,
        "result_bytes": 3_000_000,
    }
    monkeypatch.setattr(vram, "measure", lambda keys: good if keys["method"] == "lora" else {"failed": "no | room"})
    out = tmp_path / "vram.json"
    assert vram.main(["--tokens", "512", "--checkpointing", "on", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "| lora | float32 (bfloat16) | on | 512 | 508 | 1.00 | 2.00 | 2.00 | 100 |" in printed
    assert "| full | auto | on | 512 | failed: no / room |" in printed
    assert "| lora | 10 | 1.00 % | 2.00 | 100 | 3.0 |" in printed
    results = json.loads(out.read_text())["results"]
    assert [result["keys"]["method"] for result in results] == ["lora", "full"]
