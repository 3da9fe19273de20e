"""What a new user who tried to break it found: one test a story, each first seen failing."""

import dataclasses
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import ROOT, bare_runs, small_config, write_jsonl

from minilora import cli, loop
from minilora.config import TARGET_GROUPS, TrainConfig, resolve
from minilora.data.jsonl import MAX_LINE_BYTES, read_lines
from minilora.data.rows import read_rows
from minilora.errors import CheckpointError, ConfigError, DataError, DivergedError, StoppedError
from minilora.training import checkpoint, rundir
from minilora.training.setup import prepare
from minilora.training.signals import StopRequest

pytestmark = pytest.mark.usefixtures("bare_run")
LONG = "x" * 300


def mistake(capsys, *argv) -> str:
    """What a command that cannot be obeyed says: exit code 2, one message, no traceback."""
    code = cli.main([str(word) for word in argv])
    message = capsys.readouterr().err
    assert code == 2, message
    assert message.startswith("minilora: ")
    assert "Traceback" not in message
    return message.removeprefix("minilora: ").rstrip("\n")


@pytest.fixture
def flags(tiny_folder, tmp_path):
    """The command line of a run of two steps."""
    rows = write_jsonl(tmp_path / "rows.jsonl", 8)
    small = "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --num_train_epochs 1 --dtype float32"
    return ["train", "--model", str(tiny_folder), "--train_file", str(rows), *small.split(), "--device", "cpu"]


def rows_of(path, *rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def steps_in(folder) -> list[int]:
    return sorted(int(path.name[5:]) for path in checkpoint.checkpoints(Path(folder)))


# ---------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("key", ["output_dir", "resume", "train_file"])
def test_a_name_of_300_letters_is_the_users_mistake(key, flags, capsys):
    """An output_dir of 300 letters once ended with exit code 1, as a mistake of ours."""
    assert "x" * 99 in mistake(capsys, *flags, f"--{key}", LONG)


def test_a_train_file_with_a_very_long_name_gets_a_run_folder_of_a_name_that_fits():
    """The default run folder is named after model and file, and two names of 200 letters once made one of 400."""
    stem = rundir._stem(TrainConfig(model="界" * 80, train_file="火" * 80 + ".jsonl"))
    assert len(f"{stem.name}-1000".encode()) <= 255


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
@pytest.mark.parametrize("key", ["num_train_epochs", "learning_rate", "val_size"])
def test_numbers_that_are_not_finite_are_called_that(key, value, capsys):
    """`--num_train_epochs inf` was once answered with "inf must be more than 0"."""
    message = mistake(capsys, "train", f"--{key}={value}")
    assert message == f"{key} = {value} must be a finite number."


@pytest.mark.parametrize("names", [["q_proj, v_proj"], ["q_proj,", " v_proj "], ["q_proj ,v_proj,"]])
def test_spaces_around_target_modules_are_no_part_of_them(names):
    """`--target_modules "q_proj, v_proj"` once looked for a layer named " v_proj"."""
    assert resolve(None, {"target_modules": names}).target_modules == ("q_proj", "v_proj")
    assert resolve(None, {"target_modules": " mlp "}).target_modules == TARGET_GROUPS["mlp"]


@pytest.mark.parametrize("key", ["output_dir", "train_file", "eval_file", "model", "resume"])
def test_a_tilde_means_the_home_folder(key, monkeypatch, tmp_path):
    """The shell leaves `--train_file=~/rows.jsonl` as it is, and a folder named "~" was once made or looked for."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert getattr(resolve(None, {key: "~/x"}), key) == str(tmp_path / "x")


def test_resume_of_a_run_under_a_tilde(monkeypatch, tmp_path, capsys):
    """`--resume=~/run` once looked for its settings in a folder named "~"."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(tmp_path / "run" / "config.json") in mistake(capsys, "train", "--resume=~/run")


@pytest.mark.parametrize("value", ["", " ", "a\0b"])
@pytest.mark.parametrize("key", ["output_dir", "train_file", "eval_file", "model", "resume"])
def test_paths_that_name_nothing_are_refused_by_name(key, value, capsys, tmp_path):
    """`--output_dir "$OUT"` with OUT unset once meant the default, and an empty train_file "No such file"."""
    (tmp_path / "c.toml").write_text(f"{key} = {json.dumps(value)}")
    assert f"{key} = {value!r} names nothing" in mistake(capsys, "train", tmp_path / "c.toml")
    if key != "resume" and "\0" not in value:
        assert f"{key} = {value!r} names nothing" in mistake(capsys, "train", f"--{key}", value)


@pytest.mark.parametrize("before", [[], ["lora"]])
@pytest.mark.parametrize("value", ["1e-4", "-1"])
def test_an_unknown_flag_with_a_value_is_one_mistake(before, value, capsys):
    """`lora --lerning_rate 1e-4` once also said that '1e-4' is an unknown argument."""
    message = mistake(capsys, "train", *before, "--lerning_rate", value)
    assert message == "unknown argument '--lerning_rate'. Did you mean --learning_rate? See minilora train --help"


def test_a_toml_file_with_a_byte_order_mark(tmp_path):
    """Notepad begins a UTF-8 file with one, and it was once "not valid TOML"."""
    (tmp_path / "c.toml").write_text("lora_r = 4", "utf-8-sig")
    assert resolve(str(tmp_path / "c.toml"), {}).lora_r == 4


def test_help_says_what_zero_means(capsys):
    """A number that may be 0 means "never", "all" or "chosen" there, and nobody can guess which."""
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for key in (
        "max_grad_norm",
        "max_steps",
        "early_stopping_patience",
        "eval_steps",
        "save_steps",
        "save_total_limit",
    ):
        text = re.search(rf"--{key} {key.upper()} (.*?)\(default", printed.partition("options:")[2])[1]
        assert "; 0: " in text, key


# ---------------------------------------------------------------------------------------- data

A_ROW = {"instruction": "红", "output": "大 stone"}


def test_fields_that_are_not_read_are_told_once(tmp_path, start, capsys):
    """A misspelt "sytem" and a column of ids were once dropped without a word."""
    rows = [{**A_ROW, "id": 7, "input": "", "system": "s"}, {**A_ROW, "id": 8, "sytem": "s"}, A_ROW]
    start(train_file=str(rows_of(tmp_path / "rows.jsonl", *rows)))
    assert capsys.readouterr().out.count("fields not read: id (2 rows), sytem (1 row)\n") == 1
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [], "name": "x"}]
    _, report = read_rows(rows_of(tmp_path / "m.jsonl", *[{"messages": turns}] * 2))
    assert report.unread == {"messages: name": 2, "messages: tool_calls": 2}


@pytest.mark.parametrize("overlong", ["truncate", "error"])
def test_max_length_beyond_the_models_positions(overlong, tmp_path, start, capsys, monkeypatch):
    """max_length 1,024 on a model of 512 positions once trained on positions that the model has never seen."""
    file = rows_of(tmp_path / "rows.jsonl", {"instruction": "a", "output": "red stone " * 400})
    if overlong == "error":
        monkeypatch.setattr("minilora.training.setup.load_model", lambda *_: pytest.fail("the model was loaded"))
        with pytest.raises(DataError, match="more than max_length 512"):
            start(train_file=str(file), overlong=overlong)
    else:
        assert start(train_file=str(file)).data.train.lengths.tolist() == [512]
        assert "max_length 1,024: this model has 512 positions, so 512 holds" in capsys.readouterr().out


TWO_ROWS = [A_ROW, {"instruction": "天气，好", "output": "水 火"}]
WHOLE_FILES = {
    "array": ("[" + ",\n ".join(json.dumps(row, ensure_ascii=False) for row in TWO_ROWS) + "]", "utf-8", "JSON array"),
    "array in lines": (json.dumps(TWO_ROWS, indent=1), "utf-8", "JSON array"),
    "array in one line": (json.dumps(TWO_ROWS), "utf-8-sig", "JSON array"),
    "CSV": ('instruction,output\n红,大 stone\n"天气，好","水 火"\n', "utf-8-sig", "CSV"),
    "CSV from Excel": ("instruction,output\n红,大 stone\n天气，好,水 火\n", "gb18030", "CSV"),
    "tabs": ("instruction\toutput\n红\t大 stone\n天气，好\t水 火\n", "utf-8", "CSV"),
    "GBK": ("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TWO_ROWS), "gbk", "GBK"),
    "UTF-16": ("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TWO_ROWS), "utf-16", "UTF-16"),
    "UTF-16LE": ("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TWO_ROWS), "utf-16-le", "UTF-16"),
    "objects over lines": ("\n".join(json.dumps(row, indent=1) for row in TWO_ROWS), "utf-8", "several lines"),
}


@pytest.mark.parametrize("on_bad_rows", ["error", "skip"])
@pytest.mark.parametrize("name", WHOLE_FILES)
def test_a_file_that_is_wrong_as_a_whole_gets_one_line_and_a_command_that_mends_it(name, on_bad_rows, tmp_path):
    """A JSON array, a CSV or a GBK file once got thousands of bad lines and the advice to skip all of them."""
    content, encoding, word = WHOLE_FILES[name]
    file = tmp_path / "my rows.jsonl"
    file.write_bytes(content.encode(encoding))
    with pytest.raises(DataError) as caught:
        read_rows(file, on_bad_rows)
    message = str(caught.value)
    assert word in message
    assert "\n" not in message
    assert "skip" not in message
    command = re.search(r": ((?:python|iconv|jq) .*) converts it", message)[1]
    if not shutil.which(command.split()[0]) and not command.startswith("python"):
        pytest.skip(f"{command.split()[0]} is not installed")
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, env=os.environ | {"PATH": path})
    rows, _ = read_rows(tmp_path / "new.jsonl")
    assert [[turn.content for turn in row.turns] for row in rows] == [list(row.values()) for row in TWO_ROWS]


def test_nobody_is_told_to_leave_out_all_rows(tmp_path):
    """ "Leave them out: --on_bad_rows skip" was once said of a file without a single good row."""
    with pytest.raises(DataError) as caught:
        read_rows(rows_of(tmp_path / "rows.jsonl", 1, 2))
    assert "all 2 rows are bad" in str(caught.value)
    assert "skip" not in str(caught.value)


def test_a_row_of_another_format_is_told_which_line_fixed_the_format(tmp_path):
    """ "the field 'instruction' is missing" says little to someone who wrote prompt and completion."""
    file = rows_of(tmp_path / "rows.jsonl", 5, A_ROW, A_ROW, {"prompt": "a", "completion": "b"})
    with pytest.raises(DataError, match=r"line 2 decided that .* is instruction/output; this row is prompt/comple"):
        read_rows(file)


def test_rows_that_are_dropped_are_not_counted_as_truncated_too(tmp_path, start, capsys):
    """A row whose answer lies beyond max_length was once both "truncated" and "dropped: nothing supervised"."""
    rows = [A_ROW, {"instruction": "red stone " * 100, "output": "b"}]
    start(train_file=str(rows_of(tmp_path / "rows.jsonl", *rows)), max_length=40)
    printed = capsys.readouterr().out
    assert "dropped: 1 nothing supervised" in printed
    assert "truncated" not in printed


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path):
    """A line was once read whole before its length was looked at: 20 GB of zeros took 20 GB."""
    file = tmp_path / "rows.jsonl"
    with open(file, "wb") as opened:
        opened.write(b'{"a": 1}\n')
        opened.seek(5 * MAX_LINE_BYTES)
        opened.write(b"\n{}\n" + b"x" * MAX_LINE_BYTES)
    found = list(read_lines(file))
    assert [(number, len(line)) for number, line in found] == [
        (1, 9),
        (2, MAX_LINE_BYTES + 1),
        (3, 3),
        (4, MAX_LINE_BYTES),
    ]
    with pytest.raises(DataError, match=f":2: the line has more than {MAX_LINE_BYTES:,} bytes"):
        read_rows(file)


@pytest.mark.parametrize("blank", ["", " ", "\n\t", "\u3000", None])
def test_a_blank_input_or_system_is_none(blank, tmp_path):
    """An "input" of one space once made a row bad, though a missing and an empty one are fine."""
    rows, _ = read_rows(rows_of(tmp_path / "rows.jsonl", {**A_ROW, "input": blank, "system": blank}))
    assert [turn.content for turn in rows[0].turns] == list(A_ROW.values())


def test_a_model_folder_without_tokenizer_says_which_files_are_missing(flags, tiny_folder, tmp_path, capsys):
    """It was once "not a ChatML (Qwen) tokenizer", which nobody takes for a file that was not copied."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "base").mkdir(exist_ok=True)
        shutil.copy(tiny_folder / name, tmp_path / "base")
    message = mistake(capsys, *flags, "--output_dir", tmp_path / "run", "--model", tmp_path / "base")
    assert "tokenizer.json" in message
    assert "tokenizer_config.json" in message
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------- going on


@pytest.fixture(scope="module")
def _four_steps(tiny_folder, tmp_path_factory):
    config = small_config(tiny_folder, tmp_path_factory.mktemp("four_steps"), save_steps=1, save_total_limit=0)
    with bare_runs():
        loop.train(config)
    return config


@pytest.fixture
def four_steps(_four_steps, tmp_path):
    """The settings of a finished run that kept the checkpoints of its four steps; the folder is the test's own."""
    shutil.copytree(_four_steps.output_dir, tmp_path / "run")
    return dataclasses.replace(_four_steps, output_dir=str(tmp_path / "run"))


def test_going_back_keeps_the_later_checkpoints_until_a_new_one_is_saved(four_steps, capsys):
    """--resume RUN/checkpoints/step-2 once deleted steps 3 and 4 at once and without a word."""
    folder = Path(four_steps.output_dir)
    back = dataclasses.replace(
        four_steps, resume=str(checkpoint.checkpoint_path(folder, 2)), num_train_epochs=2, save_steps=3
    )
    capsys.readouterr()
    with ExitStack() as held:
        prepare(back, StopRequest(), held)
    assert "step-000004, step-000003: saved after this checkpoint" in capsys.readouterr().out
    assert steps_in(folder) == [1, 2, 3, 4]
    assert checkpoint.newest_valid(folder)[0] == checkpoint.checkpoint_path(folder, 4)  # nothing new: nothing lost
    loop.train(dataclasses.replace(back, max_steps=3))
    assert steps_in(folder) == [1, 2, 3]


def test_going_back_to_the_end_is_the_end(four_steps):
    """A run taken back to step 2 and ended there has step 2 as its result, so --resume auto must not go on from 4."""
    folder = Path(four_steps.output_dir)
    two = checkpoint.checkpoint_path(folder, 2)
    loop.train(dataclasses.replace(four_steps, resume=str(two), max_steps=2))
    assert checkpoint.newest_valid(folder)[0] == two


def test_a_checkpoint_of_the_other_way_is_not_taken_for_the_new_ones(four_steps):
    """A later checkpoint that is still there has the name of the one to be saved, and other weights."""
    folder = Path(four_steps.output_dir)
    three = checkpoint.checkpoint_path(folder, 3) / checkpoint.WEIGHTS
    before = three.read_bytes()
    back = dataclasses.replace(four_steps, resume=str(checkpoint.checkpoint_path(folder, 2)), num_train_epochs=2)
    loop.train(dataclasses.replace(back, max_steps=3))
    assert three.read_bytes() != before


def test_a_run_started_with_relative_paths_goes_on_from_another_folder(flags, tiny_folder, tmp_path, monkeypatch):
    """config.json once kept "rows.jsonl" as it was typed, and --resume looked for it where the user was now."""
    shutil.copytree(tiny_folder, tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    relative = ["--model", "base", "--train_file", "rows.jsonl", "--eval_file", "rows.jsonl", "--output_dir", "run"]
    assert cli.main([*flags, *relative]) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(["train", "--resume", "../run", "--num_train_epochs", "2"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4


def test_hashes_in_the_message_about_changed_data_are_short(four_steps, tmp_path):
    """Two hashes of 64 to 128 digits once hid that the message is about the data."""
    other = write_jsonl(tmp_path / "other.jsonl", 32, seed=5)
    with pytest.raises(CheckpointError) as caught:
        loop.train(dataclasses.replace(four_steps, train_file=str(other), resume="auto"))
    assert re.search(
        r"the training data has changed: fingerprint was [0-9a-f]{12}…, is now [0-9a-f]{12}…\n", str(caught.value)
    )


def test_an_evaluation_file_that_is_missing_is_seen_in_the_message(make_config, tmp_path):
    """Its hash stands behind that of the rows, and once was cut off: "fingerprint was X, is now X"."""
    config = make_config(eval_file=str(write_jsonl(tmp_path / "held_out.jsonl", 4)), max_steps=1)
    loop.train(config)
    with pytest.raises(CheckpointError, match=r"fingerprint was [0-9a-f]{12}…, is now none…"):
        loop.train(dataclasses.replace(config, eval_file=None, resume="auto", max_steps=2))


def test_one_file_by_two_names_is_one_file():
    """It once trained, and could not go on: config.json has absolute paths, and there it was named twice."""
    with pytest.raises(ConfigError, match=r"names a\.jsonl twice"):
        resolve("lora", {"train_file": "a.jsonl,./a.jsonl"})


def test_a_shell_that_spread_a_pattern_is_explained(capsys):
    assert "a pattern in quotes" in mistake(capsys, "train", "--train_file", "a.jsonl", "b.jsonl")


def test_two_starts_at_once_take_two_folders(flags, make_config, tmp_path, monkeypatch):
    """Both once chose the same free name before either had locked it, and one of them was refused."""
    monkeypatch.chdir(tmp_path)
    config = make_config(output_dir=None)
    real, others = rundir.RunLock, []

    def lock(run):
        if not others:  # the other start comes first by a hair
            others.append(real(run))
        return real(run)

    monkeypatch.setattr(rundir, "RunLock", lock)
    with ExitStack() as held:
        folder, found, _ = rundir.lock_run_dir(config, held)
        assert (folder, found) == (Path(f"{rundir._stem(config)}-2"), None)
    others[0].__exit__()


def test_a_run_that_was_made_between_choice_and_lock_is_not_overwritten(make_config, monkeypatch):
    """Another start may begin, end and free the folder between our look at it and our lock."""
    config = make_config()
    real = rundir.RunLock

    def lock(run):
        run.mkdir(exist_ok=True)
        (run / "config.json").write_text("{}")
        return real(run)

    monkeypatch.setattr(rundir, "RunLock", lock)
    with ExitStack() as held, pytest.raises(ConfigError, match="holds a run"):
        rundir.lock_run_dir(config, held)


@pytest.mark.parametrize("there", [False, True])
def test_a_start_that_failed_leaves_no_folder(there, make_config, tmp_path):
    """runs/ once filled with folders that held nothing but a .lock, and the next start was named -2."""
    config = make_config(target_modules=("nothing",))
    folder = Path(config.output_dir)
    if there:
        folder.mkdir()
    with pytest.raises(ConfigError, match="match nothing"):
        loop.train(config)
    assert [path.name for path in tmp_path.iterdir()].count("run") == there
    assert not (there and list(folder.iterdir()))


def test_a_lock_on_a_folder_that_was_removed_meanwhile_is_not_taken_for_one(tmp_path, monkeypatch):
    """Who opened .lock just before a failed start removed it would hold a lock that nobody else sees."""
    real = os.open
    removed = []

    def opened(path, *args, **more):
        descriptor = real(path, *args, **more)
        if path == tmp_path / "run" / ".lock" and not removed:
            removed.append(path)
            shutil.rmtree(path.parent)
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    with rundir.RunLock(tmp_path / "run"), pytest.raises(ConfigError, match="is being written"):
        rundir.RunLock(tmp_path / "run")


# ---------------------------------------------------------------------------------------- what is said


def test_one_example_a_micro_batch_is_called_that(start, capsys):
    """--packing false once said "in micro-batches of up to 1 tokens"."""
    start(packing=False)
    printed = capsys.readouterr().out
    assert "one example a micro-batch" in printed
    assert "1 tokens" not in printed


def test_commands_to_copy_survive_spaces_in_paths(flags, tmp_path, capsys):
    """The printed `next` lines once broke in two at the space of "my runs"."""
    run = tmp_path / "my runs" / "it's"
    assert cli.main([*flags, "--output_dir", str(run)]) == 0
    commands = re.findall(r"python -m minilora .*", capsys.readouterr().out)
    assert len(commands) == 2
    for command in commands:
        assert str(run / "adapter") in shlex.split(command)


def test_the_resume_command_survives_spaces_in_paths(make_config, tmp_path, monkeypatch):
    """The printed resume command once broke in two at the space of "my run"."""
    real = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda run: (real(run), os.kill(os.getpid(), signal.SIGTERM))[0])
    run = tmp_path / "my run"
    with pytest.raises(StoppedError) as stopped:
        loop.train(make_config(output_dir=str(run)))
    command = str(stopped.value).partition("Go on with: ")[2]
    assert shlex.split(command) == ["python", "-m", "minilora", "train", "--resume", str(run)]


def test_no_best_is_explained(make_config, monkeypatch, capsys, tmp_path):
    """Where every evaluation was worse than the untrained base, best/ is absent, and once nobody said why."""
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(loop, "evaluate", lambda run, dataset: next(losses))
    config = make_config(eval_file=str(write_jsonl(tmp_path / "valid.jsonl", 4, seed=3)))
    loop.train(config)
    assert "no evaluation was better than the untrained base: there is no best/" in capsys.readouterr().out
    assert not (Path(config.output_dir) / "best").exists()


# ---------------------------------------------------------------------------------------- how runs end


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("keys", [{"weight_decay": 1e300}, {"weight_decay": 1e30}, {"weight_decay": 1e22}], ids=str)
def test_weights_that_a_step_spoilt_are_a_divergence(method, keys, make_config):
    """weight_decay 1e30 makes the weights infinite with finite gradients; saving them once failed with code 1 or 2."""
    config = make_config(method=method, max_steps=2, **keys)
    with pytest.raises(DivergedError) as caught:
        loop.train(config)
    assert caught.value.exit_code == 3
    assert "weight_decay" in str(caught.value)


@pytest.fixture
def not_under_nohup():
    """The tests themselves may run under nohup, which a run obeys, and so does a process that it starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_saves(make_config, monkeypatch, not_under_nohup):
    """SIGHUP once ended the process in the middle of a step with nothing saved."""
    before = signal.getsignal(signal.SIGHUP)
    real = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda run: (real(run), os.kill(os.getpid(), signal.SIGHUP))[0])
    config = make_config()
    with pytest.raises(StoppedError, match="stopped by SIGHUP; saved") as stopped:
        loop.train(config)
    assert stopped.value.exit_code == 129
    assert steps_in(config.output_dir) == [1]
    assert signal.getsignal(signal.SIGHUP) == before


def test_nohup_is_obeyed():
    """Under nohup SIGHUP is ignored, and a run must go on when the terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, before)


HUNG_UP = """
import sys, time
from minilora.errors import StoppedError
from minilora.training.signals import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    try:
        while True:
            time.sleep(0.01)
            stop.check()
    except StoppedError as error:
        print("saved", flush=True)
        print("saved", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
"""


def test_what_is_said_after_the_terminal_is_gone_harms_nobody(not_under_nohup):
    """A line printed to a closed terminal is an OSError, which must not come between the signal and the saving."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", HUNG_UP], os.environ | {"PYTHONPATH": str(ROOT)})
    assert b"ready" in os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
