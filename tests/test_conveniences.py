"""What people expect around the training step: noise, several files, repeats, answers on the way, TensorBoard."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, ROOT, first_step, gradients_of, randomize_lora, relative_error, trained, write_jsonl
from safetensors.torch import load_file

from minilora import cli, loop, lora
from minilora.adapters import format as adapter_format
from minilora.attention import Layout
from minilora.batching import common_prefix, pack
from minilora.config import TrainConfig, resolve
from minilora.data.build import make_sets, read_sources
from minilora.data.dataset import make_columns
from minilora.data.formats import Question, Turn
from minilora.data.markup import ChatMarkup
from minilora.data.sampler import Part, Schedule, make_schedule, mixed
from minilora.decoder import embedding_noise
from minilora.errors import CheckpointError, ConfigError, DataError
from minilora.inference import generate
from minilora.inference.generate import ChatModel, Sampling
from minilora.models import fingerprint
from minilora.models import load as loading
from minilora.objectives import sft
from minilora.training import checkpoint, rundir, saving
from minilora.training import log as run_log
from minilora.utils import device, terminal

pytestmark = pytest.mark.usefixtures("bare_run")
WHOLE_STEP = 10**6


def same(found, expected):
    return all(torch.equal(found[name], expected[name]) for name in expected)


def adapter_of(config):
    return (Path(config.output_dir) / "adapter" / "adapter_model.safetensors").read_bytes()


def rows_of(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def mistake(capsys, *argv):
    """What the command says on stderr, one line or more, with exit code 2."""
    assert cli.main([str(word) for word in argv]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message.removeprefix("minilora: ").strip()


# ---------------------------------------------------------------------------------------- noise on the embeddings

ALPHA = 5.0


def neftune_gradients(oracle, run, share):
    """The paper's formula, each example by itself: embedding + alpha / sqrt(L d) u, u drawn as one run of uniforms."""
    examples, supervised = first_step(run)
    shared = common_prefix(examples) if share else 0
    (order,) = pack([len(example.input_ids) - 1 - shared for example in examples], WHOLE_STEP)
    width = oracle.config.hidden_size
    lengths = [len(examples[i].input_ids) - 1 for i in order]
    tokens = shared + sum(length - shared for length in lengths)
    torch.manual_seed(loop.step_seed(run.config.seed, run.state.step))
    uniform = torch.empty(1, tokens, width).uniform_(-1, 1).double()
    begin = uniform[:, :shared] * ALPHA * math.sqrt(sum(1 / length for length in lengths) / len(lengths) / width)
    total, place = torch.zeros((), dtype=torch.float64), shared
    for i, length in zip(order, lengths, strict=True):
        own = uniform[:, place : place + length - shared] * ALPHA / math.sqrt(length * width)
        place += length - shared
        ids, labels = (torch.from_numpy(a).long() for a in (examples[i].input_ids, examples[i].labels))
        embedded = oracle.get_input_embeddings()(ids[None, :-1]) + torch.cat([begin, own], 1)
        logits = oracle(inputs_embeds=embedded).logits[0]
        total = total + F.cross_entropy(logits, labels[1:], reduction="sum")
    (total / supervised).backward()
    return {name: param.grad for name, param in trained(oracle).items()}


@pytest.mark.parametrize(("method", "share"), [("lora", False), ("lora", True), ("full", False)])
def test_the_noise_is_the_papers_for_each_example_of_a_packed_step(start, load_tiny, method, share, monkeypatch):
    run = start(
        method=method,
        neftune_noise_alpha=ALPHA,
        share_prefix="on" if share else "off",
        max_tokens_per_micro_batch=WHOLE_STEP,
    )
    randomize_lora(run.model, std=0.05)
    assert not share or common_prefix(first_step(run)[0]) > 5
    found = gradients_of(run)
    oracle = load_tiny()
    if method == "lora":
        lora.inject(oracle, run.config.target_modules, run.config.lora_r, run.config.lora_alpha)
        randomize_lora(oracle, std=0.05)
        monkeypatch.setattr(lora, "lora_linear", lora.plain_lora_linear)
    else:
        oracle.requires_grad_(True)
    expected = neftune_gradients(oracle.double(), run, share)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert relative_error(found[name], grad) < 1e-5, name
    run.decoder.noise_alpha = 0.0
    quiet = gradients_of(run)
    assert min(relative_error(quiet[name], grad) for name, grad in expected.items()) > 1e-3


def test_the_noise_fills_its_bounds_and_no_more():
    layout, width = Layout((4, 40), prefix=10, padding=2), 512
    torch.manual_seed(0)
    noise = embedding_noise(torch.zeros(56, width, dtype=torch.bfloat16), layout, 3.0)
    assert noise.dtype == torch.bfloat16
    assert not noise[54:].any()
    most = {length: 3.0 / math.sqrt(length * width) for length in (14, 50)}
    most[10] = 3.0 * math.sqrt((1 / 14 + 1 / 50) / 2 / width)  # the prefix: between those of its examples
    for part, length in ((slice(0, 10), 10), (slice(10, 14), 14), (slice(14, 54), 50)):
        found = noise[part].float()
        assert float(found.abs().max()) <= most[length] * 1.005  # rounded to bf16
        assert float(found.abs().max()) > 0.99 * most[length]
        assert float(found.std()) == pytest.approx(most[length] / math.sqrt(3), rel=0.05)
        assert abs(float(found.mean())) < 0.1 * most[length]


def test_the_noise_is_a_function_of_seed_and_step_and_there_in_training_only(start, tmp_path):
    run = start(neftune_noise_alpha=ALPHA, val_size=0.2)
    randomize_lora(run.model, std=0.05)
    one = gradients_of(run)
    torch.manual_seed(99)
    assert same(gradients_of(run), one)
    examples = first_step(run)
    run.state.step = 1
    run.optimizer.zero_grad(set_to_none=True)
    loop.gradients(run, *examples)
    assert not same({name: param.grad for name, param in trained(run.model).items()}, one)

    noisy = loop.evaluate(run, run.data.eval)
    run.decoder.noise_alpha = 0.0
    assert loop.evaluate(run, run.data.eval) == noisy


def resumed(config, folder, after):
    """The run of `config`, copied, cut back to its checkpoint after this step, and gone on with."""
    shutil.copytree(config.output_dir, folder)
    for path in checkpoint.checkpoints(folder):
        if int(path.name[5:]) > after:
            shutil.rmtree(path)
    config = dataclasses.replace(config, output_dir=str(folder), resume="auto")
    loop.train(config)
    return config


def test_a_run_with_noise_resumes_to_the_bit(make_config, tmp_path):
    config = make_config(neftune_noise_alpha=ALPHA, lora_dropout=0.1, save_steps=1, save_total_limit=0)
    loop.train(config)
    assert adapter_of(resumed(config, tmp_path / "again", 2)) == adapter_of(config)


# ---------------------------------------------------------------------------------------- several files


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a.jsonl", "a.jsonl"),
        (["a.jsonl"], "a.jsonl"),
        ("a.jsonl,b.jsonl", ("a.jsonl", "b.jsonl")),
        ("a.jsonl, b.jsonl", ("a.jsonl", "b.jsonl")),
        (["a.jsonl", "b, c.jsonl"], ("a.jsonl", "b, c.jsonl")),
    ],
)
def test_one_path_or_several(given, expected):
    config = resolve(None, {"train_file": given})
    assert config.train_file == expected
    assert config.train_files == ((expected,) if isinstance(expected, str) else expected)


def test_a_file_with_a_comma_in_its_name_is_one(tmp_path):
    file = rows_of(tmp_path / "a,b.jsonl", {"prompt": "a", "completion": "b"})
    assert resolve(None, {"train_file": str(file)}).train_file == str(file)


@pytest.mark.parametrize("given", ["2,0.5", " 2, 0.5 ", [2, 0.5], ["2", "0.5"], (2.0, 0.5)])
def test_weights_in_every_form(given, tmp_path):
    assert resolve(None, {"train_file": "a,b", "train_weights": given}).train_weights == (2.0, 0.5)
    assert resolve(None, {"train_file": "a,b", "train_weights": ""}).train_weights == ()
    assert resolve(None, {"train_weights": 0.5}).train_weights == (0.5,)
    (tmp_path / "c.toml").write_text('train_file = ["a", "b"]\ntrain_weights = [2, 0.5]\n')
    config = resolve(str(tmp_path / "c.toml"), {})
    assert (config.train_files, config.train_weights) == (("a", "b"), (2.0, 0.5))
    with pytest.raises(ConfigError, match="train_weights has 2 numbers"):
        resolve(str(tmp_path / "c.toml"), {"train_file": "x,y,z"})


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"train_file": "a,b,a"}, "train_file names a twice: give it a weight of 2, see train_weights."),
        ({"train_file": "a,b", "train_weights": "1"}, "train_weights has 1 number (1.0), but train_file names 2:"),
        ({"train_weights": "1,2"}, "train_weights has 2 numbers (1.0, 2.0), but train_file names 1: give one"),
        ({"train_weights": "0"}, "train_weights = (0.0,) must be more than 0."),
        ({"train_weights": "nan"}, "train_weights = (nan,) must be more than 0."),
        ({"train_weights": "inf"}, "train_weights = (inf,) must be at most 1000."),
        ({"train_weights": "a"}, "train_weights = 'a' is not a number."),
        ({"train_weights": [True]}, "train_weights = [True] is not a number."),
        ({"train_file": "a,,b"}, "train_file = '' names nothing"),
        ({"train_file": []}, "train_file = [] is not a text."),
        ({"train_file": ["a", 7]}, "train_file = ['a', 7] is not a text."),
        ({"eval_samples": 2}, "eval_samples needs evaluations: give eval_file or val_size."),
    ],
)
def test_mistakes_are_told_in_a_line(keys, expected):
    with pytest.raises(ConfigError) as caught:
        resolve(None, keys)
    assert expected in str(caught.value).splitlines()[0]


def test_an_epoch_takes_of_each_file_what_its_weight_says():
    """2: each of the 10 rows twice; 1: each once; 0.25: a quarter, every row once in four epochs."""
    parts = (Part(0, 10, 20), Part(10, 7, 7), Part(17, 12, 3))
    epochs = [mixed(parts, 5, epoch) for epoch in range(8)]
    for number, epoch in enumerate(epochs):
        counts = np.bincount(epoch, minlength=29)
        assert counts[:10].tolist() == [2] * 10
        assert counts[10:17].tolist() == [1] * 7
        assert counts[17:].sum() == 3
        so_far = np.bincount(np.concatenate(epochs[: number + 1]), minlength=29)[17:]
        assert so_far.max() - so_far.min() <= 1
        assert (mixed(parts, 5, number) == epoch).all()
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert (mixed(parts, 6, 0) != epochs[0]).any()


@pytest.mark.parametrize(("rows", "taken"), list(itertools.product([1, 2, 5, 9], [1, 3, 5, 13])))
def test_no_row_is_ahead_of_another_by_more_than_one(rows, taken):
    found = np.concatenate([mixed((Part(0, rows, taken),), 1, epoch) for epoch in range(12)])
    counts = np.bincount(found, minlength=rows)
    assert len(found) == 12 * taken
    assert counts.max() - counts.min() <= 1


def test_the_steps_of_an_epoch_are_the_mixture_in_an_order_of_its_own():
    parts = (Part(0, 10, 20), Part(10, 7, 7), Part(17, 12, 3))
    schedule = make_schedule(29, 4, 3, 0, 5, parts)
    assert (schedule.num_examples, schedule.steps_per_epoch, schedule.num_steps) == (30, 8, 24)
    for epoch in range(3):
        taken = np.concatenate([schedule.examples_of(8 * epoch + step) for step in range(8)])
        assert sorted(taken) == sorted(mixed(parts, 5, epoch))
        assert (taken != mixed(parts, 5, epoch)).any()  # shuffled: not one file after the other
    with_one = Schedule(29, 4, 24, seed=5)
    expected = np.random.default_rng([5, 1]).permutation(29)
    assert (np.concatenate([with_one.examples_of(step) for step in range(8, 16)]) == expected).all()


@pytest.fixture
def two_files(tmp_path):
    return write_jsonl(tmp_path / "a.jsonl", 12, seed=1), write_jsonl(tmp_path / "b.jsonl", 6, seed=2)


def test_two_files_are_one_that_holds_the_rows_of_both(make_config, two_files, tmp_path):
    both = tmp_path / "both.jsonl"
    both.write_bytes(b"".join(file.read_bytes() for file in two_files))
    configs = []
    for name, given in (("two", tuple(map(str, two_files))), ("one", str(both))):
        configs.append(make_config(train_file=given, val_size=0.2, output_dir=str(tmp_path / name)))
        loop.train(configs[-1])
    assert adapter_of(configs[0]) == adapter_of(configs[1])


def test_a_run_of_two_files_says_what_it_takes_of_each(start, two_files, capsys, monkeypatch):
    run = start(train_file=tuple(map(str, two_files)), train_weights=(2.0, 0.5))
    printed = capsys.readouterr().out
    for file, count, taken in ((two_files[0], 12, 24), (two_files[1], 6, 3)):
        assert f"{file}: {count} of {count} rows kept" in printed
        assert f"an epoch takes {taken} of its {count} rows, because of its weight" in printed
    assert run.schedule.num_examples == 27
    epoch = np.concatenate([run.schedule.examples_of(step) for step in range(run.schedule.steps_per_epoch)])
    assert np.bincount(run.data.train.sources[epoch]).tolist() == [24, 3]

    monkeypatch.setattr(sft, "token_nats", lambda hidden, *_: hidden.sum() * math.nan)
    loop.train_step(run)
    note = next(line for line in capsys.readouterr().out.splitlines() if "skipped" in line)
    lines = json.loads("[" + note.partition(f"rows at {two_files[0]}, lines [")[2].partition("]")[0] + "]")
    taken = run.schedule.examples_of(0)
    assert lines == sorted(run.data.train.lines[taken][run.data.train.sources[taken] == 0])


def test_the_problems_of_all_files_are_told_at_once(make_config, tmp_path, two_files):
    good = {"prompt": "a", "completion": "b"}
    bad = [rows_of(tmp_path / f"bad{i}.jsonl", good, {"prompt": "", "completion": "b"}, good) for i in (1, 2)]
    config = make_config(train_file=(str(bad[0]), str(two_files[0])), eval_file=str(bad[1]))
    with pytest.raises(DataError) as caught:
        loop.train(config)
    assert [f"{file}:2: 'prompt' is empty" in str(caught.value) for file in bad] == [True, True]
    long = make_config(train_file=tuple(map(str, two_files)), overlong="error", max_length=45)
    with pytest.raises(DataError) as caught:
        loop.train(long)
    assert all(str(file) in str(caught.value) for file in two_files)


def test_a_weighted_run_resumes_to_the_bit_and_only_as_it_was(make_config, two_files, tmp_path):
    config = make_config(
        train_file=tuple(map(str, two_files)),
        train_weights=(0.5, 3.0),
        num_train_epochs=3,
        lora_dropout=0.1,
        save_steps=1,
        save_total_limit=0,
    )
    assert loop.train(config).steps == 9  # 6 + 18 rows an epoch, 8 a step
    assert adapter_of(resumed(config, tmp_path / "again", 4)) == adapter_of(config)

    settings = rundir.saved_config(Path(config.output_dir))
    resolved = resolve(None, {"resume": config.output_dir}, settings)
    assert (resolved.train_file, resolved.train_weights) == (config.train_file, config.train_weights)
    two_files[1].write_bytes(two_files[1].read_bytes().replace(b"stone", b"river"))
    with pytest.raises(CheckpointError) as refused:
        loop.train(dataclasses.replace(config, resume="auto", train_weights=(0.5, 2.0), neftune_noise_alpha=1.0))
    assert "train_weights: was [0.5, 3.0], is [0.5, 2.0]" in str(refused.value)
    assert "neftune_noise_alpha: was 0.0, is 1.0" in str(refused.value)
    assert "the training data has changed" in str(refused.value)


def test_two_training_files_are_not_taken_for_one_and_an_evaluation_file(make_config, two_files):
    a, b = map(str, two_files)
    ways = [(a, None), (b, None), (a, b), (b, a), ((a, b), None), ((b, a), None)]
    found = {read_sources(make_config(train_file=train, eval_file=valid)).sha256 for train, valid in ways}
    assert len(found) == len(ways)


def test_a_run_from_before_a_key_can_be_gone_on_with(make_config):
    """Its manifest does not name the key, which was at its default then."""
    config = make_config()
    identity = checkpoint.Identity(rundir.lasting_settings(config), "x", "y", {})
    before = {"base_fingerprint": "x", "dataset_sha256": "y", "config": rundir.lasting_settings(config)}
    for key in ("neftune_noise_alpha", "train_weights", "deduplicate", "train_file"):
        del before["config"][key]
    assert identity.differences(before) == []
    changed = dataclasses.replace(config, deduplicate=True, train_weights=(0.5,))
    identity = dataclasses.replace(identity, config=rundir.lasting_settings(changed))
    assert len(identity.differences(before)) == 2


# ---------------------------------------------------------------------------------------- repeats

A, B, C, D = ({"instruction": f"say {word}", "output": word} for word in ("red", "blue", "cold", "warm"))


def data_lines(capsys):
    return [line[4:].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("data")]


def test_repeats_are_counted_and_left_out_where_that_is_asked_for(start, tmp_path, capsys):
    """The same to the token: a blank at an empty input is no difference."""
    first = rows_of(tmp_path / "a.jsonl", A, B, {**A, "input": " "}, A)
    second = rows_of(tmp_path / "b.jsonl", {**B, "system": "Be brief."}, B, C)
    files = (str(first), str(second))
    run = start(train_file=files, output_dir=str(tmp_path / "kept"))
    assert len(run.data.train) == 7
    printed = data_lines(capsys)
    assert printed.count("rows with the same tokens as an earlier row: 2") == 1
    assert printed.count("rows with the same tokens as an earlier row: 1") == 1

    run = start(train_file=files, deduplicate=True, output_dir=str(tmp_path / "removed"))
    assert run.data.train.places(np.arange(4)) == f"{first}, lines [1, 2]; {second}, lines [1, 3]"
    printed = data_lines(capsys)
    assert f"{first}: 2 of 4 rows kept; dropped: 2 the same as an earlier one" in printed
    assert f"{second}: 2 of 3 rows kept; dropped: 1 the same as an earlier one" in printed
    assert not any("repeats of" in line for line in printed)


def test_examples_are_the_same_only_with_the_same_tokens_and_the_same_mask():
    ids, others = np.arange(6, dtype=np.int32), np.arange(1, 7, dtype=np.int32)
    masks = [np.arange(6) >= start for start in (2, 3)]
    tokens, supervised = [ids, ids, others, ids, ids[:5]], [masks[0], masks[1], masks[0], masks[0], masks[0][:5]]
    lengths = np.array([6, 6, 6, 6, 5])
    keys = make_columns(np.concatenate(tokens), np.concatenate(supervised), lengths, np.ones(5)).keys[:].tolist()
    assert keys[0] == keys[3]
    assert len(set(keys)) == 4


def test_a_run_without_repeats_is_the_run_of_a_file_that_has_none(make_config, tmp_path):
    rows = [json.loads(line) for line in write_jsonl(tmp_path / "rows.jsonl", 12).read_text().splitlines()]
    clean, dirty = rows_of(tmp_path / "clean.jsonl", *rows), rows_of(tmp_path / "dirty.jsonl", *rows[:9], *rows)
    configs = [
        make_config(train_file=str(clean), output_dir=str(tmp_path / "c")),
        make_config(train_file=str(dirty), output_dir=str(tmp_path / "d"), deduplicate=True),
    ]
    for config in configs:
        loop.train(config)
    assert adapter_of(configs[0]) == adapter_of(configs[1])


def test_rows_of_the_evaluation_set_among_those_of_training_are_told(make_config, tiny_folder, tmp_path):
    markup = ChatMarkup(loading.load_tokenizer(tiny_folder))

    def sets_of(**keys):
        config = make_config(**keys)
        sets = make_sets(config, read_sources(config), markup, 512)
        return sets, [list(report.notes) for report in sets.reports]

    train = rows_of(tmp_path / "a.jsonl", A, B, C, A)
    valid = rows_of(tmp_path / "v.jsonl", A, D, D)
    _, notes = sets_of(train_file=str(train), eval_file=str(valid))
    assert "rows with the same tokens as a row of the evaluation set: 2; its loss is too low" in notes[0]
    assert notes[1] == ["rows with the same tokens as an earlier row: 1"]  # the evaluation file's own

    twice = rows_of(tmp_path / "t.jsonl", *[row for row in (A, B, C, D) for _ in range(2)])
    keys = {"train_file": str(twice), "val_size": 0.4, "seed": 3}
    sets, notes = sets_of(**keys)
    held_out = set(sets.eval.keys.tolist())
    shared = sum(key in held_out for key in sets.train.keys.tolist())
    assert shared > 0
    assert f"rows with the same tokens as a row of the evaluation set: {shared}; its loss is too low" in notes[0]
    assert sets_of(**keys, deduplicate=True)[1] == [[]]


def test_nothing_is_said_of_rows_that_are_all_different(start, capsys):
    start(val_size=0.2)
    assert len(data_lines(capsys)) == 2


# ---------------------------------------------------------------------------------------- answers on the way


def samples_in(folder):
    return [json.loads(line) for line in (Path(folder) / "samples.jsonl").read_text("utf-8").splitlines()]


def test_the_first_questions_are_answered_at_each_evaluation(make_config, tmp_path, load_tiny, capsys, monkeypatch):
    monkeypatch.setattr(generate, "SAMPLE_TOKENS", 6)
    valid = write_jsonl(tmp_path / "valid.jsonl", 5, seed=9)
    config = make_config(eval_file=str(valid), eval_samples=3, eval_steps=2, save_steps=1, save_total_limit=0)
    loop.train(config)
    found = samples_in(config.output_dir)
    assert [record["step"] for record in found] == [0] * 3 + [2] * 3 + [4] * 3
    rows = [json.loads(line) for line in valid.read_text("utf-8").splitlines()][:3]
    assert [(record["prompt"], record["reference"]) for record in found] == 3 * [
        (row["instruction"], row["output"]) for row in rows
    ]
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sample")]
    assert len(printed) == 9
    assert all(
        line.split(None, 1)[1].startswith(record["prompt"][:20]) for line, record in zip(printed, found, strict=True)
    )

    tiny = load_tiny()
    adapter_format.load(tiny, Path(config.output_dir) / "adapter", fingerprint.fingerprint(tiny))
    tokenizer = loading.load_tokenizer(Path(config.model))
    chat_model = ChatModel(tiny.eval(), tokenizer, ChatMarkup(tokenizer), config.system_prompt)
    turns = [[Turn("user", row["instruction"])] for row in rows]
    expected = generate.answer(chat_model, turns, Sampling(max_new_tokens=6))
    assert [record["answer"] for record in found[-3:]] == expected
    assert any(old["answer"] != new["answer"] for old, new in zip(found[:3], found[-3:], strict=True))


def test_answers_change_nothing_of_what_is_trained_and_a_resumed_run_gives_them_once(
    make_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(generate, "SAMPLE_TOKENS", 3)
    keys = {"val_size": 0.3, "eval_steps": 1, "lora_dropout": 0.2, "save_steps": 2, "save_total_limit": 0}
    found = {}
    for count in (0, 2):
        found[count] = make_config(**keys, eval_samples=count, output_dir=str(tmp_path / str(count)))
        loop.train(found[count])
    assert adapter_of(found[0]) == adapter_of(found[2])
    assert not (tmp_path / "0" / "samples.jsonl").exists()
    resumed(found[2], tmp_path / "again", 2)
    assert samples_in(tmp_path / "again") == samples_in(tmp_path / "2")
    assert adapter_of(found[0]) == (tmp_path / "again/adapter/adapter_model.safetensors").read_bytes()


def test_questions_are_those_of_the_held_out_rows_of_their_files(start, two_files):
    run = start(train_file=tuple(map(str, two_files)), val_size=0.5, eval_samples=100)
    texts = [[json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in two_files]
    held_out = zip(run.data.eval.sources, run.data.eval.lines, strict=True)
    expected = [texts[source][line - 1] for source, line in held_out]
    assert len({*run.data.eval.sources.tolist()}) == 2
    assert [(question.turns[-1].content, question.reference) for question in run.data.questions] == [
        (row["instruction"], row["output"]) for row in expected
    ]


def test_questions_that_leave_no_room_or_are_none_are_passed_over(start, tmp_path):
    valid = rows_of(
        tmp_path / "v.jsonl",
        {"messages": [{"role": "assistant", "content": "unasked"}]},
        {"messages": [{"role": "user", "content": "大" * 700}, {"role": "assistant", "content": "long"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    )
    run = start(eval_file=str(valid), eval_samples=2, train_on_prompt=True)
    assert run.data.questions == [Question((Turn("user", "a"),), "b")]


def test_a_prompt_that_just_fits_is_answered_with_what_is_left(start, tmp_path):
    run = start(val_size=0.2, eval_samples=1)
    room = run.model.config.max_position_embeddings - 2
    turns = (Turn("user", ""),)
    while len(run.markup.prompt_ids(turns, run.config.system_prompt)) < room:
        turns = (Turn("user", turns[0].content + " red"),)
    chat_model = ChatModel(run.model.eval(), run.tokenizer, run.markup, run.config.system_prompt)
    (text,) = generate.short_answers(chat_model, [turns])
    assert len(run.tokenizer(text)["input_ids"]) <= 2


def test_too_little_memory_for_answers_ends_no_run(make_config, monkeypatch, capsys):
    def answer(*_):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(generate, "answer", answer)
    config = make_config(val_size=0.2, eval_samples=2)
    assert loop.train(config).steps == 4
    assert "out of memory: 0 of 2 samples answered" in capsys.readouterr().out


def test_what_training_has_freed_is_given_back_before_answers_are_computed(start, monkeypatch):
    """On a real 0.5B model the peak once rose by 0.46 GiB: the heap's holes and the answers' memory at once."""
    done = []
    monkeypatch.setattr(saving, "trim_heap", lambda device: done.append("given back"))
    monkeypatch.setattr(saving, "short_answers", lambda *_: done.append("answered") or ["x"])
    run = start(val_size=0.2, eval_samples=1)
    saving.answer_questions(run)
    assert done == ["given back", "answered"]
    run.data = dataclasses.replace(run.data, questions=[])
    saving.answer_questions(run)
    assert len(done) == 2


@pytest.mark.parametrize("own", [None, "7"])
@pytest.mark.parametrize("name", device.PRODUCT_CACHES)
def test_few_products_are_kept_unless_told_otherwise(name, own, tiny_folder, monkeypatch):
    monkeypatch.setenv(name, "")  # put back after the test
    monkeypatch.delenv(name)
    if own:
        monkeypatch.setenv(name, own)
    loading.load_model(tiny_folder, torch.float32, CPU)
    assert os.environ[name] == (own or str(device.PRODUCTS_KEPT))


MANY_PRODUCTS = """
import torch
from faults import memory_now
from minilora.utils.device import keep_few_products

keep_few_products()
weight = torch.ones(256, 256, dtype=torch.bfloat16)
for rows in range(8, 408):
    torch.ones(rows, 256, dtype=torch.bfloat16) @ weight
    if rows == 107:
        before = memory_now()[0]
print((memory_now()[0] - before) / 2**20)
"""


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="bf16 products are not oneDNN's here")
def test_products_of_many_sizes_do_not_pile_up():
    """300 sizes more once took 180 MiB: a long run over rows of many lengths grew by as much."""
    folder = str(ROOT / "tests")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r}){MANY_PRODUCTS}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 40


def test_a_sample_is_one_line_whatever_it_holds():
    assert terminal.one_line("a\nb\t c  \x1b[31m") == "a b c \\x1b[31m"
    assert terminal.one_line("x" * 70) == "x" * 57 + "..."


def test_a_sample_that_ends_within_a_character_ends_before_it(start, monkeypatch):
    monkeypatch.setattr(generate, "answer", lambda *_: ["一座城\ufffd\ufffd", "a city"])
    run = start()
    chat_model = ChatModel(run.model.eval(), run.tokenizer, run.markup, "")
    assert generate.short_answers(chat_model, [(Turn("user", "a"),)] * 2) == ["一座城", "a city"]


def test_the_time_that_is_left_does_not_count_the_first_evaluation(tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(run_log.time, "monotonic", lambda: clock[0])
    log = run_log.RunLog(tmp_path, 0, -1, 5, 10)
    clock[0] = 100.0
    log.evaluation({"step": 0, "eval_loss": 2.0}, None)
    clock[0] = 110.0
    figures = {"loss": 1.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1.0, "peak_memory_bytes": 1}
    log.step({"step": 1, "epoch": 0.2, **figures})
    log.close()
    assert capsys.readouterr().out.rstrip().endswith("left 40 s")


# ---------------------------------------------------------------------------------------- TensorBoard


def test_without_the_package_it_is_said_before_anything_is_read(tiny_folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    flags = ["--model", tiny_folder, "--train_file", tmp_path / "none.jsonl", "--output_dir", tmp_path / "run"]
    message = mistake(capsys, "train", *flags, "--report_to", "tensorboard")
    assert message.startswith("report_to = 'tensorboard' needs the package tensorboard (")
    assert message.endswith("): pip install tensorboard, or leave it out")
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    assert "none.jsonl cannot be read" in mistake(capsys, "train", *flags)


def curves(folder):
    """{tag: [(step, value), ...]} as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_the_curves_are_those_of_the_metrics_also_of_a_resumed_run(make_config, tmp_path):
    pytest.importorskip("tensorboard")
    config = make_config(
        val_size=0.2, report_to="tensorboard", eval_steps=2, save_steps=2, save_total_limit=0, num_train_epochs=2
    )
    loop.train(config)
    other = resumed(config, tmp_path / "again", 4)
    for each in (config, other):
        folder = Path(each.output_dir)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found = curves(folder / "tensorboard")
        assert found.keys() == {"eval/loss", *(f"train/{key}" for key in run_log.BOARD_KEYS)}
        for tag, points in found.items():
            key = "eval_loss" if tag == "eval/loss" else tag.removeprefix("train/")
            expected = [(record["step"], record[key]) for record in records if key in record]
            assert [step for step, _ in points] == [step for step, _ in expected], tag
            assert [value for _, value in points] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert adapter_of(other) == adapter_of(config)


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    pytest.importorskip("tensorboard")
    board = run_log.Board(tmp_path / "b", 0)
    board.scalars(1, {"train/loss": 2.0, "eval/loss": None})
    board.close()
    assert curves(tmp_path / "b") == {"train/loss": [(1, 2.0)]}


# ---------------------------------------------------------------------------------------- defaults


def test_all_of_it_is_off_by_default():
    config = TrainConfig()
    assert (config.neftune_noise_alpha, config.train_weights, config.deduplicate) == (0.0, (), False)
    assert (config.eval_samples, config.report_to) == (0, "none")


def test_weights_of_the_adapter_are_those_of_the_last_checkpoint_with_all_of_it_on(make_config, two_files, monkeypatch):
    monkeypatch.setattr(generate, "SAMPLE_TOKENS", 3)
    config = make_config(
        train_file=tuple(map(str, two_files)),
        train_weights=(1.0, 2.0),
        deduplicate=True,
        neftune_noise_alpha=ALPHA,
        val_size=0.2,
        eval_samples=1,
        num_train_epochs=4,
    )
    summary = loop.train(config)
    assert summary.last_loss < summary.first_loss - 0.5
    weights = load_file(checkpoint.checkpoint_path(Path(config.output_dir), summary.steps) / checkpoint.WEIGHTS)
    saved = load_file(Path(config.output_dir) / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(weights[name[17:].removesuffix(".weight")], tensor) for name, tensor in saved.items())
