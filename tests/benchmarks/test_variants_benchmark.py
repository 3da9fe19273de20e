"""benchmarks/variants.py: what it refuses, its table, and one variant through its two jobs."""

import json

import pytest
from conftest import write_jsonl

from benchmarks import variants
from minilora.lora import LoRALinear


@pytest.mark.parametrize(
    "argv",
    [
        ["--variants", "lora,lore"],
        ["--steps", "0"],
        ["--held_out", "0"],
        ["--examples", "many"],
        ["--model", "nowhere"],
        ["--train_file", "nowhere.jsonl"],
        ["--flags", "[]"],
        ["--out", "nowhere/variants.json"],
        ["--held_out", "100000"],
        ["--nonsense"],
    ],
)
def test_bad_arguments_are_one_line(argv, capsys):
    with pytest.raises(SystemExit) as refused:
        variants.main(argv)
    assert refused.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_variant_is_trained_and_compared_with_peft(tiny_folder, tmp_path, monkeypatch, capsys):
    """Both jobs, here in one process; an adapter that one of the two does not apply would be noticed."""
    without = []

    def here(job, keys):
        if job == "compare":
            with monkeypatch.context() as patch:
                patch.setattr(LoRALinear, "forward", lambda self, x: self.base_layer(x))
                without.append(variants.compare_one(keys)["max_logit_difference"])
        return variants.JOBS[job](keys)

    monkeypatch.setattr(variants, "in_a_process", here)
    rows = write_jsonl(tmp_path / "rows.jsonl", 12)
    out = tmp_path / "variants.json"
    argv = ["--model", str(tiny_folder), "--train_file", str(rows), "--variants", "pissa", "--steps", "2"]
    argv += ["--examples", "4", "--held_out", "3", "--out", str(out), "--device", "cpu"]
    assert variants.main([*argv, "--flags", '{"dtype": "float32", "learning_rate": 0.01}']) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())["results"]["pissa"]
    assert result["last_eval_loss"] < result["first_eval_loss"]
    assert result["max_logit_difference"] < 1e-4 < 0.01 < without[0]
    assert result["steps"] == 2
    assert printed.splitlines()[-1].startswith(f"| pissa | {result['first_loss']:.4f} | {result['last_loss']:.4f} | ")


def test_what_fails_stops_no_other_and_is_told(tmp_path, monkeypatch, capsys):
    good = {"first_loss": 2.0, "last_loss": 1.5, "first_eval_loss": 2.1, "last_eval_loss": 1.6}
    good |= {"peak_memory_bytes": 2**31, "tokens_per_second": 150.0, "trainable_parameters": 10, "result_bytes": 2e6}
    of = {
        "lora": good | {"max_logit_difference": 2e-5},
        "dora": good | {"max_logit_difference": 2e-3},
        "pissa": good | {"failed_in_peft": "no | such key"},
        "qlora": {"failed": "no | room"},
        "full": good,
    }
    monkeypatch.setattr(variants.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(variants, "measure", lambda keys: of[keys["output_dir"].rpartition("/")[2]])
    argv = ["--variants", ",".join(of), "--out", str(tmp_path / "x.json")]
    assert variants.main(argv) == 1
    printed = capsys.readouterr().out
    assert "| lora | 2.0000 | 1.5000 | 2.1000 | 1.6000 | 2.00 | 150.0 | 10 | 2.0 | 2.0e-05 |" in printed
    assert "| 2.0 | failed: no / such key |" in printed
    assert "| qlora | failed: no / room |" in printed
    assert "| full | 2.0000 | 1.5000 | 2.1000 | 1.6000 | 2.00 | 150.0 | 10 | 2.0 | no adapter |" in printed
    assert [name for name, result in of.items() if not variants.is_good(result)] == ["dora", "pissa", "qlora"]
