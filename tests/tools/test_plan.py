"""`minilora plan`: by part, by setting, by card; what cannot be read is one line."""

import re
from contextlib import ExitStack

import pytest
import torch
from conftest import write_jsonl

from minilora import cli, demo
from minilora.config import TrainConfig
from minilora.errors import ConfigError
from minilora.tools import plan
from minilora.tools.plan import BUDGETS, CARDS_GIB, VARIANTS, Grid, Place, markdown, on_card, verdict
from minilora.training.memory_estimate import Memory
from minilora.training.setup import prepare
from minilora.training.signals import StopRequest

GIB = 2**30
DEMO = str(demo.DEMO_DIR)


@pytest.fixture
def plan_output(tmp_path, monkeypatch, capsys):
    """A function: what `minilora plan` prints for these arguments, in a folder with 40 rows."""
    write_jsonl(tmp_path / "rows.jsonl", 40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "COUNTED_TOKENS", {"cpu": (256, 512), "cuda": (256, 512)})  # quicker

    def run(*argv: str) -> str:
        assert cli.main(["plan", "--model", DEMO, "--train_file", "rows.jsonl", *argv]) == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"], "a plan leaves nothing behind"
        return capsys.readouterr().out

    return run


def mib(cell: str) -> float:
    number, unit = re.fullmatch(r"\(?\**([\d.]+) (MiB|GiB)\**\)?", cell.strip()).groups()
    return float(number) * {"MiB": 1, "GiB": 1024}[unit]


def rows_below(text: str, head: str) -> list[list[str]]:
    """The cells of the Markdown table whose head begins so."""
    table = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in table]


def test_parts_add_up_and_settings_are_in_order(plan_output, monkeypatch):
    monkeypatch.setattr(plan, "BUDGETS", (512, 1024))
    text = plan_output("--card", "RTX 4080", "--dtype", "float32")
    parts = dict(rows_below(text, "| part"))
    total = mib(parts.pop("**peak**"))
    assert sum(mib(size) for size in parts.values()) == pytest.approx(total, abs=0.1 * len(parts))
    assert mib(parts["base weights"]) == pytest.approx((1_075_200 - 28_672) * 4 / 2**20, abs=0.06)
    for budget, *cells in rows_below(text, "| micro-batch"):
        assert budget.startswith(("512 tokens", "1,024 tokens"))
        lora, lora_again, full, full_again = map(mib, cells)
        assert lora_again < lora < full
        assert full_again < full
    assert "it fits" in text
    assert "not measured" in text


@pytest.fixture
def no_table(monkeypatch):
    """A plan without the table of other settings, which takes most of its time."""
    monkeypatch.setattr(plan, "grid", lambda *_: Grid((), {}))
    monkeypatch.setattr(plan, "settings_table", lambda *_: "")


@pytest.mark.usefixtures("no_table")
def test_keys_that_a_plan_does_not_count_do_not_stop_it(plan_output, tmp_path_factory):
    valid = str(write_jsonl(tmp_path_factory.mktemp("valid") / "valid.jsonl", 4))
    text = plan_output("--card", "24", "--eval_file", valid, "--early_stopping_patience", "2", "--eval_samples", "1")
    assert "torch_compile" not in text
    assert "it fits" in text
    assert "torch_compile is not counted: the figures are those of a run without it" in plan_output("--torch_compile")


@pytest.mark.usefixtures("no_table")
def test_the_interpreter_counts_on_a_cpu(plan_output):
    parts = dict(rows_below(plan_output("--device", "cpu"), "| part"))
    assert mib(parts["interpreter, libraries, rows (in use now)"]) > 200


@pytest.mark.usefixtures("no_table")
def test_without_rows_all_are_as_long_as_allowed(plan_output):
    text = plan_output(
        "--train_file", "none.jsonl", "--max_length", "300", "--card", "24", "--max_tokens_per_micro_batch", "900"
    )
    assert "there is no none.jsonl: every row is assumed to have 300 tokens" in text
    assert "the largest has 897 tokens of 3 examples" in text
    assert "a card of 24 GiB: not measured" in text


@pytest.mark.usefixtures("no_table")
def test_figures_in_words(plan_output, capsys):
    """The middle of an even number of lengths is the one that training and preview name."""
    text = plan_output("--max_tokens_per_micro_batch", "30")
    assert "the largest has 66 tokens of 1 example\n" in text
    assert cli.main(["preview", "rows.jsonl", "--model", DEMO, "--rows", "0"]) == 0
    median = re.search(r"p95 / max: \d+ / (\d+) / ", capsys.readouterr().out)[1]
    assert f"rows.jsonl: 40; tokens per row: median {median}, " in text


@pytest.mark.usefixtures("no_table")
def test_the_setting_is_the_one_that_a_run_would_have(plan_output, tmp_path_factory):
    """Its room for a shared prefix comes to the budget; one example a micro-batch has none."""
    keys = {"system_prompt": "水" * 220, "device": "cpu", "dtype": "float32"}
    files = {"model": DEMO, "train_file": "rows.jsonl", "output_dir": str(tmp_path_factory.mktemp("runs") / "run")}
    with StopRequest() as stop, ExitStack() as held:
        most = prepare(cli.config_of("lora", keys | files), stop, held).state.max_tokens
    assert most > 960 + 3 * 192
    flags = [word for key, value in keys.items() for word in (f"--{key}", value)]
    assert f"method lora, micro-batches of up to {most:,} tokens\n" in plan_output(*flags)
    assert "method lora, one example a micro-batch\n" in plan_output(*flags, "--packing", "false")


def test_the_columns_of_a_table_stand_below_each_other():
    table = markdown([("part", "memory"), ("a", "1.0 MiB"), ("b and c", "22.0 MiB")])
    assert table.splitlines() == [
        "| part    |   memory |",
        "| :------ | -------: |",
        "| a       |  1.0 MiB |",
        "| b and c | 22.0 MiB |",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--card", "RTX 4o80"], "--card 'RTX 4o80' is not known. .* Did you mean RTX 4080?"),
        (["--card", "0"], "Give the memory of the card in GiB"),
        (["--fsdp"], "plan predicts one device"),
        (["--card", "-3"], "--card '-3' is not known"),
        (["--lora_q", "3"], "--lora_r"),
        (["--device", "cuda:9"], "this machine shows"),
        (["--model", "./nowhere"], "no such folder"),
        (["--target_modules", "qproj"], "match nothing"),
        (["lorra"], "Did you mean lora?"),
    ],
)
def test_mistakes_are_one_line(plan_output, capsys, argv, message):
    assert cli.main(["plan", "--model", DEMO, "--train_file", "rows.jsonl", *argv]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1


def test_bad_rows_are_told_as_training_tells_them(plan_output, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert cli.main(["plan", "--model", DEMO, "--train_file", "rows.jsonl"]) == 2
    assert "rows.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("name", CARDS_GIB)
def test_cards_by_name_in_any_case(name):
    assert on_card(TrainConfig(), name.lower()).usable == CARDS_GIB[name][0] * GIB * 0.9


@pytest.mark.parametrize(
    ("given", "name", "size"),
    [
        ("4090", "RTX 4090", 24),
        ("rtx4090", "RTX 4090", 24),
        ("RTX-4090", "RTX 4090", 24),
        ("NVIDIA GeForce RTX 4080", "RTX 4080", 16),
        ("RTX 4060", "RTX 4060", 8),
        ("4060ti", "RTX 4060 Ti", 8),
        ("RTX 4060 Ti 16GB", "RTX 4060 Ti", 16),
        ("4060 ti 16g", "RTX 4060 Ti", 16),
        ("RTX 4070 Laptop", "RTX 4070 Laptop", 8),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "RTX 4070 Laptop", 8),
        ("4070 mobile", "RTX 4070 Laptop", 8),
        ("NVIDIA GeForce RTX 2080 with Max-Q Design", "RTX 2080 Laptop", 8),
        ("GeForce GTX 1660 SUPER", "GTX 1660 Super", 6),
        ("1080 Ti", "GTX 1080 Ti", 11),
        ("RTX 4090D", "RTX 4090 D", 24),
        ("NVIDIA A100-SXM4-80GB", "A100", 80),
        ("NVIDIA A100-PCIE-40GB", "A100", 40),
        ("a100 40", "A100", 40),
        ("NVIDIA H100 80GB HBM3", "H100", 80),
        ("NVIDIA H100 PCIe", "H100", 80),
        ("Tesla V100-SXM2-32GB", "V100", 32),
        ("Tesla T4", "T4", 16),
        ("NVIDIA L40S", "L40S", 48),
        ("NVIDIA RTX A6000", "RTX A6000", 48),
        ("A6000", "RTX A6000", 48),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", 48),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000", 96),
        ("Quadro RTX 8000", "Quadro RTX 8000", 48),
        ("NVIDIA H200", "H200", 141),
    ],
)
def test_cards_as_people_and_drivers_write_them(given, name, size):
    place = on_card(TrainConfig(), given)
    assert place.usable == size * GIB * 0.9
    assert place.name.startswith(f"{name} ({size} GiB")


def test_a_card_of_two_sizes_is_named_with_both():
    assert on_card(TrainConfig(), "RTX 3060").name == "RTX 3060 (12 GiB; with 8: --card 'RTX 3060 8GB'): not measured"
    assert on_card(TrainConfig(), "RTX 3060 8 GB").name == "RTX 3060 (8 GiB): not measured"


@pytest.mark.parametrize(("given", "size"), [("24", 24), ("24GB", 24), ("11 GiB", 11), ("23.5", 23.5), ("1.5g", 1.5)])
def test_numbers_are_gib(given, size):
    place = on_card(TrainConfig(), given)
    assert place.usable == size * GIB * 0.9
    assert place.name == f"a card of {size:g} GiB: not measured"


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        *(
            (number, "in GiB, 1 to 300 (--card 24), or a name")
            for number in ("99999", "0", "4065", "24564", "500 GB", "-3")
        ),
        ("RTX 4065", "or a name such as RTX 4060 or A100 40GB. Did you mean RTX 4060?"),
        ("RX 7900 XTX", "Give the memory of the card in GiB"),
        ("RTX 4080 48GB", "RTX 4080 has 16 GiB. For another size, give only the number of GiB: --card 48."),
        ("A100 64GB", "A100 has 80 or 40 GiB. For another size"),
        ("", "Give the memory of the card in GiB"),
    ],
)
def test_a_card_that_is_not_known_is_asked_about_in_one_line(given, answer):
    with pytest.raises(ConfigError) as caught:
        on_card(TrainConfig(), given)
    text = str(caught.value)
    assert text.startswith(f"--card {given!r} is not known. ")
    assert answer in text
    assert "\n" not in text
    assert len(text) < 200


@pytest.mark.parametrize(("card", "dtype"), [("2080", torch.float32), ("T4", torch.float32), ("3060", torch.bfloat16)])
def test_the_dtype_is_the_one_that_a_run_on_the_card_picks(card, dtype):
    assert on_card(TrainConfig(), card).dtype == dtype
    assert on_card(TrainConfig(dtype="bfloat16"), card).dtype == torch.bfloat16
    assert on_card(TrainConfig(dtype="float32"), card).dtype == torch.float32


def test_every_card_of_the_table_is_its_own():
    keys = {plan.card_key(name) for name in CARDS_GIB}
    assert len(keys) == len(CARDS_GIB)
    short = [key.removeprefix("gtx").removeprefix("rtx") for key in keys]
    assert len(set(short)) == len(short)
    assert all(2 <= size <= 300 for sizes in CARDS_GIB.values() for size in sizes)


def memory(total: float) -> Memory:
    return Memory(total, 0.0, 0.0, 0.0, 0.0, (0.0,) * 5)


@pytest.mark.parametrize(
    ("usable", "variant", "budget", "expected"),
    [
        (40, ("lora", False), 2048, "it fits"),
        (39, ("lora", False), 2048, "that fits: --max_tokens_per_micro_batch 1024$"),
        (9, ("lora", False), 2048, "--max_tokens_per_micro_batch 2048 --gradient_checkpointing$"),
        (9, ("lora", True), 4096, "--max_tokens_per_micro_batch 2048$"),
        (79, ("full", True), 2048, "--max_tokens_per_micro_batch 1024$"),
        (50, ("full", True), 512, "--max_tokens_per_micro_batch 2048 --method lora$"),
        (1, ("lora", False), 512, "No setting in the table fits"),
    ],
)
def test_the_cheapest_change_that_fits(usable, variant, budget, expected):
    """Bytes for 512, 1,024 and 2,048 tokens."""
    sizes = {("lora", False): (10, 20, 40), ("lora", True): (2, 4, 8)}
    sizes |= {("full", False): (100, 200, 400), ("full", True): (60, 70, 80)}
    assert tuple(sizes) == VARIANTS
    memories = {kind: tuple(memory(size) for size in of) for kind, of in sizes.items()}
    own = memory(sizes[variant][BUDGETS.index(budget)] if budget < 4096 else 16)
    place = Place("somewhere", "cuda", None, 0.0, usable)
    assert re.search(expected, verdict(own, variant, budget, Grid(BUDGETS[:3], memories), place))
