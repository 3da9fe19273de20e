"""`dtype auto` on a CPU: rates decide, a run keeps what it began with, and a dtype by name measures nothing."""

import dataclasses
import json
import re
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from minilora import cli, loop
from minilora.models.load import file_dtype, weight_shapes
from minilora.tools import plan
from minilora.tools.doctor import Asked, examine
from minilora.training import arithmetic
from minilora.training.arithmetic import CANDIDATES, EXAMPLE_SHAPES, Arithmetic, Candidate, choose, chosen, measure
from minilora.training.setup import prepare
from minilora.training.signals import StopRequest
from minilora.utils import device as devices

BF16, FP32 = torch.bfloat16, torch.float32
BF16_FASTER = {"bfloat16": 931.0, "float32": 215.0, "float32 from bfloat16": 210.0}
FP32_FASTER = {"bfloat16": 182.0, "float32": 331.0, "float32 from bfloat16": 310.0}
MOST_SECONDS = 3  # the aim is one second; other programs may run


@pytest.fixture
def rates(monkeypatch):
    """A function that plants the measured rates, and returns a list with an entry for each measurement."""
    measured = []

    def plant(planted):
        def instead(shapes, candidates=CANDIDATES):
            measured.append(dict(shapes))
            return {name: planted[name] for name in candidates}

        measured.clear()
        monkeypatch.setattr(arithmetic, "measure", instead)
        return measured

    return plant


def never():
    raise AssertionError("the memory is predicted only where it decides")


# ---------------------------------------------------------------------------------------- the decision


@pytest.mark.parametrize(
    ("bfloat16", "float32", "converted", "fits", "expected"),
    [
        (931, 215, 210, never, (BF16, BF16)),
        (182, 331, 310, never, (FP32, BF16)),  # the conversion takes 7 %
        (182, 331, 340, never, (FP32, BF16)),  # noise
        (182, 331, 295, lambda: True, (FP32, FP32)),  # it takes 12 %
        (182, 331, 295, lambda: False, (FP32, BF16)),
        (182, 331, 100, lambda: False, (BF16, BF16)),
        (200, 200, 200, never, (BF16, BF16)),
    ],
)
def test_rates_decide(bfloat16, float32, converted, fits, expected):
    found = chosen({"bfloat16": bfloat16, "float32": float32, "float32 from bfloat16": converted}, fits)
    assert (found.dtype, found.base_dtype) == expected


def test_a_further_candidate_needs_only_its_row(monkeypatch):
    """As integer products will be: another dtype, its own product, the fastest of all."""
    calls = []

    def product(rows, weight, backward):
        calls.append((tuple(rows.shape), tuple(weight.shape), backward))

    table = CANDIDATES | {"int8": Candidate(torch.int8, torch.int8, product)}
    monkeypatch.setattr(arithmetic, "CANDIDATES", table)
    found = chosen(measure({(192, 128): 1}, table), never)
    assert (found.dtype, found.base_dtype) == (torch.int8, torch.int8)
    assert {call[1:] for call in calls} == {((192, 128), False), ((192, 128), True)}
    assert {call[0][1] for call in calls if call[2]} == {192}, "dy has as many columns as the weight has rows"


def test_the_choice_in_words():
    words = "matrix products in bfloat16: 931 GFLOP/s measured, float32 215, float32 from bfloat16 210"
    assert chosen(BF16_FASTER, never).in_words == words
    words = "matrix products in float32, the base in bfloat16: 310 GFLOP/s measured, bfloat16 182, float32 331"
    assert chosen(FP32_FASTER, never).in_words == words
    assert Arithmetic(FP32, FP32).in_words == "matrix products in float32"


# ---------------------------------------------------------------------------------------- the measurement


def test_a_model_of_half_a_billion_is_measured_in_a_second():
    before, start = torch.get_rng_state(), time.perf_counter()
    found = measure(EXAMPLE_SHAPES)
    assert time.perf_counter() - start < MOST_SECONDS
    assert found.keys() == CANDIDATES.keys()
    assert all(rate > 0 for rate in found.values())
    assert torch.equal(torch.get_rng_state(), before), "a run draws its own numbers"


def test_a_small_model_takes_no_time_and_a_large_one_no_more(tiny_folder):
    for shapes, most in ((weight_shapes(tiny_folder), 0.3), ({(8192, 8192): 80, (29568, 8192): 160}, MOST_SECONDS)):
        start = time.perf_counter()
        measure(shapes)
        assert time.perf_counter() - start < most


def test_a_very_slow_candidate_is_given_up(monkeypatch):
    """bf16 on a CPU without it: some GFLOP/s, so that all shapes would take many seconds."""
    calls = []

    def slow(rows, weight, backward):
        calls.append(weight.shape)
        time.sleep(0.05)

    found = measure(EXAMPLE_SHAPES, CANDIDATES | {"slow": Candidate(BF16, BF16, slow)})
    assert found["slow"] == min(found.values())
    assert set(calls) == {(128, 896)}


def test_rates_are_those_of_the_model_not_of_the_slices(monkeypatch):
    """A weight counts with its real size and number: 1 GFLOP/s in one shape, 3 in another."""
    rate = {(2048, 1024): 1e9, (1024, 1024): 3e9}

    def best(candidates, shape, backward, budget_s):
        return dict.fromkeys(candidates, 2 * arithmetic.ROWS * shape[0] * shape[1] / rate[shape])

    monkeypatch.setattr(arithmetic, "_best_seconds", best)
    found = measure({(8192, 1024): 1, (1024, 1024): 16})
    assert found["float32"] == pytest.approx(24 / (8 / 1 + 16 / 3))


def test_the_shapes_are_those_of_the_loaded_model(tiny_folder, load_tiny):
    layers = [module for module in load_tiny().modules() if isinstance(module, torch.nn.Linear)]
    expected = {}
    for layer in layers:
        expected[tuple(layer.weight.shape)] = expected.get(tuple(layer.weight.shape), 0) + 1
    assert weight_shapes(tiny_folder) == expected


# ---------------------------------------------------------------------------------------- a run


def about(folder) -> dict:
    return json.loads((Path(folder) / "config.json").read_text())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_dtype_by_name_measures_nothing(start, rates, dtype):
    measured = rates(FP32_FASTER)
    run = start(dtype=dtype)
    assert not measured
    assert run.arithmetic == Arithmetic(getattr(torch, dtype), getattr(torch, dtype))
    assert next(run.model.parameters()).dtype == run.dtype


def test_a_card_is_not_measured(make_config, tiny_folder, rates, monkeypatch):
    measured = rates(FP32_FASTER)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    config = make_config(dtype="auto")
    assert choose(config, tiny_folder, torch.device("cuda"), never) == Arithmetic(BF16, BF16)
    assert not measured


def test_a_run_takes_what_is_faster_and_says_so(start, rates, tiny_folder, capsys):
    measured = rates(FP32_FASTER)
    run = start(dtype="auto")
    assert measured == [weight_shapes(tiny_folder)]
    assert (run.dtype, run.model.get_input_embeddings().weight.dtype) == (FP32, BF16)
    header = capsys.readouterr().out
    assert re.search(r"device .*, matrix products in float32, the base in bfloat16: 310 GFLOP/s measured", header)
    assert (about(run.folder)["dtype"], about(run.folder)["base_dtype"]) == ("torch.float32", "torch.bfloat16")


@pytest.mark.parametrize(("free", "expected"), [(2**40, FP32), (2**20, BF16)])
def test_a_base_is_held_in_float32_where_the_memory_suffices(start, rates, monkeypatch, free, expected):
    rates(FP32_FASTER | {"float32 from bfloat16": 200.0})
    monkeypatch.setattr("minilora.training.setup.free_bytes", lambda device: free)
    run = start(dtype="auto")
    assert (run.dtype, run.model.get_input_embeddings().weight.dtype) == (FP32, expected)


@pytest.mark.parametrize(("began", "later"), [(BF16_FASTER, FP32_FASTER), (FP32_FASTER, BF16_FASTER)])
def test_a_resumed_run_keeps_its_arithmetic(make_config, rates, began, later, capsys):
    """The result is that of the run in one go, though the machine would now choose otherwise."""
    rates(began)
    config = make_config(dtype="auto", save_steps=2)
    loop.train(config)
    kept, folder = about(config.output_dir), Path(config.output_dir)
    whole = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    shutil.rmtree(folder / "adapter")
    measured = rates(later)
    capsys.readouterr()
    loop.train(dataclasses.replace(config, resume="auto"))
    assert not measured
    assert "as when the run began" in capsys.readouterr().out
    assert {key: about(folder)[key] for key in ("dtype", "base_dtype")} == {
        key: kept[key] for key in ("dtype", "base_dtype")
    }
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == whole


def test_a_run_of_0_1_goes_on_with_the_base_in_the_dtype_of_its_products(make_config, rates, tmp_path):
    rates(FP32_FASTER)
    (tmp_path / "config.json").write_text('{"dtype": "torch.bfloat16"}')
    found = choose(make_config(dtype="auto"), tmp_path, torch.device("cpu"), never, tmp_path)
    assert (found.dtype, found.base_dtype) == (BF16, BF16)
    full = make_config(dtype="auto", method="full")
    assert choose(full, tmp_path, torch.device("cpu"), never, tmp_path).base_dtype == FP32


@pytest.mark.parametrize("text", [None, "{", "{}", '{"dtype": "torch.float16"}', '{"dtype": 5}'])
def test_a_run_that_does_not_say_is_measured(make_config, tiny_folder, rates, tmp_path, text):
    measured = rates(BF16_FASTER)
    folder = tmp_path / "before"
    folder.mkdir()
    if text is not None:
        (folder / "config.json").write_text(text)
    choose(make_config(dtype="auto"), tiny_folder, torch.device("cpu"), never, folder)
    assert len(measured) == 1


@pytest.mark.parametrize("planted", [BF16_FASTER, FP32_FASTER])
def test_speed_does_not_change_the_file_of_a_full_model(make_config, tiny_folder, rates, planted):
    """The masters are fp32, only the products differ; the model is written in the dtype of its base."""
    rates(planted)
    config = make_config(dtype="auto", method="full", learning_rate=1e-4)
    with ExitStack() as held:
        prepared = dataclasses.replace(config, output_dir=f"{config.output_dir}-prepared")
        run = prepare(prepared, StopRequest(), held, header=False)
        assert run.arithmetic.base_dtype == next(run.model.parameters()).dtype == FP32
        assert run.dtype == (BF16 if planted is BF16_FASTER else FP32)
    loop.train(config)
    assert file_dtype(Path(config.output_dir) / "model") == file_dtype(tiny_folder)


def test_all_processes_take_what_the_first_one_measures(make_config, world, rates):
    config = make_config(dtype="auto")

    def work(rank):
        rates(BF16_FASTER if rank == 0 else FP32_FASTER)
        with ExitStack() as held:
            return str(prepare(config, StopRequest(), held, header=False).dtype)

    assert world(2, work) == [(0, "torch.bfloat16")] * 2


# ---------------------------------------------------------------------------------------- doctor and plan


def test_doctor_shows_the_rates(rates, monkeypatch):
    measured = rates(FP32_FASTER)
    monkeypatch.setattr(devices, "pick_device", lambda name: torch.device("cpu"))
    (found,) = [finding for finding in examine(Asked(None, "runs")) if finding.name == "arithmetic"]
    assert measured == [EXAMPLE_SHAPES]
    assert found.state == "ok"
    assert found.text == f"dtype auto takes {chosen(FP32_FASTER, never).in_words}"


def test_plan_shows_the_rates_and_counts_the_base_as_it_is_held(make_config, rates, monkeypatch, capsys):
    monkeypatch.setattr(plan, "VARIANTS", (("lora", False),))  # the other columns of its table take long
    config = make_config()
    command = ["plan", "--model", config.model, "--train_file", config.train_file, "--device", "cpu"]
    shown = []
    for planted in (FP32_FASTER, FP32_FASTER | {"float32 from bfloat16": 200.0}):
        measured = rates(planted)
        assert cli.main(command) == 0
        printed = capsys.readouterr().out
        assert chosen(planted, lambda: True).in_words in printed
        shown.append(float(re.search(r"base weights +\| +([\d.]+) MiB", printed)[1]))
    assert shown[1] > 1.5 * shown[0]
    assert cli.main([*command, "--card", "24"]) == 0
    assert "GFLOP/s" not in capsys.readouterr().out
    assert len(measured) == 1, "a card is not measured"
