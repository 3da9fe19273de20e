"""The command line: quick help, one clear message and the right exit code for every mistake, signals, chat."""

import io
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import write_jsonl

import minilora
from minilora import cli, demo, errors
from minilora.data.formats import Turn
from minilora.inference import generate
from minilora.models import load as loading
from minilora.utils import arguments, terminal

ROOT = Path(minilora.__file__).parent.parent
TRAIN = [sys.executable, str(ROOT / "train.py")]
MODULE = [sys.executable, "-m", "minilora"]
HUB_SETTINGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")


@pytest.fixture
def environment(tmp_path):
    """One thread, an empty hub cache, nothing that says offline."""
    kept = {key: value for key, value in os.environ.items() if key not in HUB_SETTINGS}
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hub"), "PYTHONUNBUFFERED": "1"}
    return kept | fixed


@pytest.fixture
def shell(environment, tmp_path):
    """A function that runs a command in an empty folder."""

    def run(command, **keys):
        return subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, **keys
        )

    return run


def mistake(capsys, *argv, code=2):
    """What `minilora ARGUMENTS` says of a mistake: one message on stderr, no traceback, the exit code."""
    assert cli.main(list(map(str, argv))) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("minilora: ")
    assert captured.err.count("minilora: ") == 1
    assert "Traceback" not in captured.err
    assert "a mistake of ours" not in captured.err
    return captured.err


@pytest.fixture
def no_model(monkeypatch):
    """Nothing may be loaded: the mistake has to be found before."""

    def load(*args, **keys):
        raise AssertionError("a model was loaded before the mistake was found")

    for place in (
        "minilora.training.setup.load_model",
        "minilora.models.load.load_model",
        "minilora.inference.generate.load_chat_model",
    ):
        monkeypatch.setattr(place, load)


# --------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("verb", ["", *cli.VERBS])
def test_help_comes_within_a_second(verb, shell):
    seconds = []
    while len(seconds) < 4 and min(seconds, default=9) > 1:  # a busy machine may need a second try
        started = time.perf_counter()
        done = shell([*MODULE, *([verb] if verb else []), "--help"])
        seconds.append(time.perf_counter() - started)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"usage: python -m minilora {verb or 'VERB'}")
    assert min(seconds) < 1


def test_help_of_train_py_is_that_of_train(shell):
    def text(command):
        return " ".join(shell([*command, "--help"]).stdout.split())

    assert text(TRAIN) == text([*MODULE, "train"]).replace("python -m minilora train", "python train.py")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (TRAIN, "python train.py"),
        ([*MODULE, "train"], "python -m minilora train"),
        (["minilora", "train"], "minilora train"),
    ],
)
def test_messages_name_the_command_that_was_started(command, name, shell, tmp_path):
    """They once named `minilora`, a command that the installation of the README does not give."""
    script = tmp_path / "minilora"  # as pip writes it
    script.write_text("import sys; from minilora.cli import main; sys.exit(main())")
    command = [sys.executable, script, *command[1:]] if command[0] == "minilora" else command
    assert f"See {name} --help" in shell([*command, "--lora_q", "1"]).stderr
    assert f"{name} demo" in shell([*command, "--preset", "demo"]).stderr
    assert shell([*command, "--help"]).stdout.startswith(f"usage: {name} ")


def test_help_and_mistakes_load_neither_torch_nor_transformers(shell):
    script = (
        "import sys; from minilora import cli\n"
        "for argv in [*([verb, '--help'] for verb in cli.VERBS), ['--help'], ['--version'], [], ['tran'],\n"
        "             ['train', '--lora_q', '1'], ['train', 'lorra'], ['train', '--lora_r', '0'],\n"
        "             ['generate', '--model', 'x', '--top_p', '0', 'hello']]:\n"
        "    try: cli.main(argv)\n"
        "    except SystemExit as left: assert left.code == 0, argv\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'tokenizers', 'huggingface_hub'} & set(sys.modules)\n"
        "    assert not heavy, (argv, heavy)\n"
    )
    done = shell([sys.executable, "-c", script])
    assert done.returncode == 0, done.stderr


def test_the_verbs_are_listed(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {verb} +\w", text, re.M) for verb in cli.VERBS)
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
    assert minilora.__version__ in capsys.readouterr().out


# --------------------------------------------------------------------------------------- mistakes of users


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ([*TRAIN, "--learning_rat", "1"], "unknown argument '--learning_rat'. Did you mean --learning_rate?"),
        (
            [*TRAIN, "lorra"],
            "'lorra' is no preset (demo, full, lora, qlora, quick) and no .toml file. Did you mean lora?",
        ),
        ([*TRAIN, "--lora_r", "0"], "lora_r = 0 must be at least 1."),
        ([*MODULE, "tran"], "there is no verb 'tran'"),
    ],
    ids=["flag", "preset", "limit", "verb"],
)
def test_a_mistake_is_one_message_and_code_2(command, answer, shell):
    done = shell(command)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"minilora: {answer}")
    assert len(done.stderr.splitlines()) == 1


def test_debug_shows_the_traceback(shell):
    done = shell([*TRAIN, "--debug", "lorra"])
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "minilora.errors.ConfigError: 'lorra' is no preset" in done.stderr


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["tran"], "Did you mean train?"),
        (["demo"], "Did you mean minilora train demo?"),
        (["train", "--lora_r"], "--lora_r: expected one argument"),
        (["train", "lora", "full"], "'lora' and 'full': give only one preset or TOML file."),
        (["train", "--use_dora", "maybe"], "use_dora = 'maybe' is not true or false."),
        (["train", "--use_dora", "demo", "demo"], "'demo' and 'demo': give only one preset or TOML file."),
        (["train", "--learning_rate", "-1e-4"], "learning_rate = -0.0001 must be at least 0."),
        (["preview", "--train_on_prompt", "none.jsonl", "--rows", "-1"], "--rows = -1 must be at least 0"),
        (["train", "--target_modules", "--seed", "1"], "--target_modules: expected at least one argument"),
        (["generate", "--model", "x"], "PROMPT"),
        (["generate", "--modle", "x", "hello"], "Did you mean --model?"),
        (["generate", "--model", "x", "--dtype", "float16", "hello"], "--dtype"),
        (["merge"], "--adapter, --output_dir"),
        (["chat", "--topk", "5"], "Did you mean --top_k?"),
    ],
)
def test_mistakes_in_the_arguments(argv, answer, no_model, capsys):
    assert answer in mistake(capsys, *argv)


@pytest.mark.parametrize(
    "flags",
    [
        *(["--max_new_tokens", value] for value in ("0", "-1", "x", "1.5")),
        *(["--temperature", value] for value in ("-1", "nan", "warm")),
        *(["--top_p", value] for value in ("0", "1.01", "-0.1", "nan")),
        *(["--top_k", value] for value in ("-1", "0.5")),
        *(["--seed", value] for value in ("x", "99999999999999999999999")),
    ],
    ids=" ".join,
)
def test_numbers_that_cannot_be_sampled_with(flags, no_model, capsys):
    message = mistake(capsys, "generate", "--model", "x", *flags, "hello")
    assert re.findall(r"--[a-z_]+", message.removesuffix(" See minilora generate --help\n")) == [flags[0]]
    assert flags[1].removesuffix(".") in message


def test_bad_data_is_found_before_the_model_is_loaded(no_model, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("minilora.training.setup.find_base", lambda *names: pytest.fail("the model was looked for"))
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\nnonsense\n{"instruction": "a"}\n')
    for flags in (["--train_file", path], ["--train_file", write_jsonl(tmp_path / "t.jsonl", 3), "--eval_file", path]):
        lines = mistake(capsys, "train", *flags, "--output_dir", tmp_path / "run").splitlines()
        assert [re.search(r"rows\.jsonl:(\d+): ", line)[1] for line in lines[:2]] == ["2", "3"]
        assert "2 of 3 rows are bad" in lines[2]
    assert "cannot be read: No such file" in mistake(capsys, "train", "--train_file", tmp_path / "none.jsonl")
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_had(shell, tmp_path):
    """No traceback, no minutes of retries: what was tried, and what to do, within 15 seconds."""
    rows = write_jsonl(tmp_path / "rows.jsonl", 4)
    name = "no-such-owner-of-models/no-such-model"
    seconds = []
    while len(seconds) < 3 and min(seconds, default=99) > 15:  # a busy machine may need another try
        started = time.perf_counter()
        done = shell([*TRAIN, "--model", name, "--train_file", rows])
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith(f"minilora: model {name!r} is not available: ")
        assert "no folder of that name" in done.stderr
        assert "the hub" in done.stderr
        assert "--model FOLDER" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert min(seconds) < 15
    assert not (tmp_path / "runs").exists()


def test_models_that_are_no_models(capsys, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", 4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "ended" / "model").mkdir(parents=True)
    (tmp_path / "ended" / "config.json").write_text("{}")
    (tmp_path / "ended" / "metrics.jsonl").touch()
    for name, answer in {
        tmp_path / "empty": "it has no config.json.\n",
        tmp_path / "adapter": "is no model folder: it holds an adapter: give that as --adapter.\n",
        tmp_path / "ended": f"is no model folder: it is a run: give --model {tmp_path / 'ended' / 'model'}.\n",
        tmp_path / "none": "there is no such folder",
        "./none": "there is no such folder",
        "none": "there is no such folder, and it is no hub name",
        "a/b/c": "there is no such folder",
        rows: "there is no such folder",
        "bad owner/bad name": "bad owner/bad name",
    }.items():
        out = ["--train_file", rows, "--output_dir", tmp_path / "run"]
        assert answer in mistake(capsys, "train", "--model", name, *out)
        assert answer in mistake(capsys, "generate", "--model", name, "hello")
    assert not (tmp_path / "run").exists()


def test_an_offline_hub_is_not_asked(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(loading, "hub_answers", lambda name: pytest.fail("the hub was asked"))
    assert "HF_HUB_OFFLINE is set" in mistake(capsys, "generate", "--model", "no-such-owner/no-such-model", "hello")


def test_adapters_that_are_none(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        message = mistake(capsys, "generate", "--adapter", tmp_path / name, "hello")
        assert f"{tmp_path / name} is no adapter: adapter_config.json: No such file" in message
        assert "is no adapter" in mistake(capsys, "chat", "--adapter", tmp_path / name)
        message = mistake(capsys, "merge", "--adapter", tmp_path / name, "--output_dir", tmp_path / "out")
        assert "is no adapter" in message
    message = mistake(capsys, "generate", "--adapter", demo.DEMO_DIR, "hello")
    assert "is no adapter" in message
    assert "It holds a model: train, generate, chat, eval and inspect take it as --model.\n" in message
    ended = tmp_path / "ended"  # a run of method full
    (ended / "model").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        (ended / name).write_text("{}")
    message = mistake(capsys, "generate", "--adapter", ended, "hello")
    assert f"But it is a run: give --model {ended / 'model'}.\n" in message
    assert "give --adapter DIR, or --model NAME" in mistake(capsys, "generate", "hello")
    assert not (tmp_path / "out").exists()


def test_an_existing_run_is_not_overwritten(make_config, no_model, capsys):
    config = make_config()
    run = Path(config.output_dir)
    run.mkdir()
    (run / "config.json").write_text("{}")
    flags = ["--model", config.model, "--train_file", config.train_file, "--output_dir", run]
    message = mistake(capsys, "train", *flags)
    assert f"{run} holds a run: --resume auto continues it, another --output_dir starts a new one." in message
    assert [path.name for path in run.iterdir()] == ["config.json"]


def test_a_default_train_file_that_is_missing(no_model, monkeypatch, capsys, tmp_path):
    """`train --model X` in another folder once only said that data/train.jsonl cannot be read."""
    monkeypatch.chdir(tmp_path)
    message = mistake(capsys, "train", "--model", demo.DEMO_DIR)
    assert message.startswith("minilora: there is no data/train.jsonl in the current folder. This is the default of ")
    assert message.count("\n") == 1


def test_a_table_in_a_toml_file(capsys, tmp_path):
    (tmp_path / "c.toml").write_text("[train]\nlora_r = 4\n")
    message = mistake(capsys, "train", tmp_path / "c.toml")
    assert message.endswith(
        "there is no key 'train': tables are not used. Write the keys at the top of the file, without [train].\n"
    )


def test_resume_with_a_base_that_was_moved(no_model, capsys, tmp_path):
    """The message was once that of a mistyped --model, which nobody had given."""
    run, base = tmp_path / "run", tmp_path / "gone"
    run.mkdir()
    rows = str(write_jsonl(tmp_path / "rows.jsonl", 4))
    (run / "config.json").write_text(json.dumps({"config": {"model": str(base), "train_file": rows}}))
    message = mistake(capsys, "train", "--resume", run)
    assert message == (
        f"minilora: {run / 'config.json'} names the base {base}: there is no such folder. "
        "Give its new place as --model.\n"
    )
    (tmp_path / "new").mkdir()
    assert "new is no model folder" in mistake(capsys, "train", "--resume", run, "--model", tmp_path / "new")


def test_resume_of_nothing(no_model, capsys, tmp_path):
    assert "there is no run" in mistake(capsys, "train", "--resume", tmp_path / "none")


# --------------------------------------------------------------------------------- outputs and permissions


def outputs(rows, tiny_folder, run):
    """Each verb with an output option, by verb and option; FILE stands for the output."""
    inspect = ["inspect", "--model", tiny_folder, "hello"]
    return {
        "eval --json": ["eval", "--model", tiny_folder, "--eval_file", rows, "--json", "FILE"],
        "inspect --json": [*inspect, "--json", "FILE"],
        "inspect --html": [*inspect, "--html", "FILE"],
        "preview --html": ["preview", "--model", tiny_folder, rows, "--html", "FILE"],
        "report --html": ["report", run, "--html", "FILE"],
    }


OUTPUTS = ["eval --json", "inspect --json", "inspect --html", "preview --html", "report --html"]


@pytest.mark.parametrize("which", OUTPUTS)
def test_only_a_file_of_the_same_kind_is_replaced(which, tiny_folder, tmp_path, capsys):
    """`eval --eval_file X --json X` once replaced X by the figures, and `--html` any file."""
    rows, file, run = write_jsonl(tmp_path / "rows.jsonl", 2), tmp_path / "file", tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(rows)
    command, flag = outputs(rows, tiny_folder, run)[which], which.split()[1]

    def argv(output):
        return [str(output) if word == "FILE" else str(word) for word in command]

    contents = {"theirs.json": '{"a": 1}', "theirs.html": "<!doctype html>\n<html></html>", "notes": "mine"}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    for name in (*contents, "rows.jsonl", "link"):
        before = (tmp_path / name).read_bytes()
        message = mistake(capsys, *argv(tmp_path / name))
        assert message.startswith(f"minilora: {flag} {tmp_path / name}: ")
        assert message.count("\n") == 1
        assert (tmp_path / name).read_bytes() == before
    for _ in range(2):  # the second time over its own file
        assert cli.main(argv(file)) == 0
    assert file.stat().st_size > 100


@pytest.fixture
def without_rights(environment, tmp_path):
    """A function: what a command says to a user whom the permissions of files bind, as they do not bind root."""
    code = "import faults, sys; from minilora import cli; faults.give_up_overriding_permissions(); sys.exit(cli.main())"
    variables = environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}

    def run(*argv):
        command = [sys.executable, "-c", code, *map(str, argv)]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        return done.stderr.removeprefix("minilora: ").rstrip()

    return run


def test_folders_without_permission(without_rights, tmp_path):
    """They were once "[Errno 13]" with exit code 1, or "there is no such folder", or found after an hour of scoring."""
    closed, fixed, rows = tmp_path / "closed", tmp_path / "fixed", ROOT / "data" / "valid.jsonl"
    closed.mkdir(mode=0o000)
    fixed.mkdir(mode=0o555)
    inside, out, model = closed / "x", closed / "out", ["--model", demo.DEMO_DIR]
    for verb in (["verify"], ["merge", "--output_dir", "merged"], ["train"], ["eval", "--eval_file", rows]):
        assert without_rights(*verb, "--adapter", inside) == f"adapter {str(inside)!r}: Permission denied."
    assert without_rights("generate", "--model", inside, "hi") == f"model {str(inside)!r}: Permission denied."
    for folder in (out, fixed / "out"):
        message = without_rights("train", *model, "--train_file", rows, "--output_dir", folder)
        assert message == f"{folder}: cannot be written: Permission denied."
    for folder in (closed, fixed):
        why = f"{folder / 'out'}: the folder {folder} cannot be written to: Permission denied. Give another file."
        for flag, argv in {
            "--json": ["eval", *model, "--eval_file", rows],
            "--html": ["report", "none"],
            "--output_file": ["generate", *model, "--input_file", rows],
        }.items():
            assert without_rights(*argv, flag, folder / "out") == f"{flag} {why}"


# -------------------------------------------------------------------------------- exit codes, our mistakes


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (errors.DivergedError("no finite gradient"), 3, "no finite gradient"),
        (errors.OutOfMemoryError("one example does not fit"), 4, "one example does not fit"),
        (errors.StoppedError("stopped by SIGINT", signal.SIGINT), 130, "stopped by SIGINT"),
        (errors.StoppedError("stopped by SIGTERM", signal.SIGTERM), 143, "stopped by SIGTERM"),
        (errors.StorageError("the disk is full"), 2, "the disk is full"),
        (MemoryError("no memory"), 4, "no memory"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("division by zero"), 1, "a mistake of ours: ZeroDivisionError: division by zero"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_exit_codes(error, code, expected, monkeypatch, capsys):
    def train(config):
        raise error

    monkeypatch.setattr("minilora.loop.train", train)
    assert cli.main(["train", "lora"]) == code
    message = capsys.readouterr().err
    assert message.startswith(f"minilora: {expected}")
    assert "Traceback" not in message
    if not isinstance(error, KeyboardInterrupt):
        with pytest.raises(type(error)):
            cli.main(["train", "--debug", "lora"])


def test_help_into_a_closed_pipe(environment, tmp_path):
    """As in `minilora train --help | head -1`."""
    command = f"{shlex.join(MODULE)} train --help | true"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr


# ------------------------------------------------------------------------------------------- the bare call


@pytest.fixture
def bare(monkeypatch):
    """A function: the model that `python train.py` trains where the cache and the hub are so."""
    seen = []
    monkeypatch.setattr("minilora.loop.train", seen.append)

    def call(cached, why, *argv):
        asked = []
        monkeypatch.setattr(loading, "cached_model", lambda name: asked.append(name) or cached)
        monkeypatch.setattr(loading, "hub_answers", lambda name: asked.append(name) or why)
        assert cli.main(["train", *argv]) == 0
        return seen.pop(), asked

    return call


def test_the_bare_call_trains_the_real_model_where_it_can_be_had(bare, capsys):
    for cached, why, asked in ((Path("/cache"), "unused", 1), (None, "", 2)):
        config, names = bare(cached, why)
        assert (config.model, config.train_file) == ("Qwen/Qwen2-0.5B-Instruct", "data/train.jsonl")
        assert names == ["Qwen/Qwen2-0.5B-Instruct"] * asked
    assert capsys.readouterr().out == ""


def test_the_bare_call_trains_the_demo_elsewhere_and_says_so(bare, capsys):
    config, _ = bare(None, "the hub cannot be reached (ConnectError)")
    assert Path(config.model) == ROOT / "minilora" / "demo" / "model"
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == (
        "Qwen/Qwen2-0.5B-Instruct is not in the local cache, and the hub cannot be reached (ConnectError)."
    )
    assert "trains the small built-in demo model instead" in second
    assert third.split()[:4] == ["python", "train.py", "--model", "FOLDER_OR_HUB_NAME"]


def test_only_the_bare_call_adapts(bare, capsys):
    for argv in (["lora"], ["--seed", "1"], ["--train_file", "mine.jsonl"]):
        config, asked = bare(None, "the hub cannot be reached", *argv)
        assert config.model == "Qwen/Qwen2-0.5B-Instruct"
        assert asked == []
    assert capsys.readouterr().out == ""


class SlowHub:
    """A hub whose every byte takes for ever."""

    def model_info(self, name, timeout):
        time.sleep(30)


class BrokenHub:
    def model_info(self, name, timeout):
        raise ConnectionError("no route to host")


class GoodHub:
    def model_info(self, name, timeout):
        assert timeout <= 3


@pytest.mark.parametrize(
    ("hub", "answer"),
    [(SlowHub, "did not answer within 0.2 s"), (BrokenHub, "cannot be reached (ConnectionError)"), (GoodHub, "")],
)
def test_the_hub_is_asked_and_not_waited_for(hub, answer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    assert loading.HUB_TIMEOUT_S == 3
    monkeypatch.setattr(loading, "HUB_TIMEOUT_S", 0.2)
    started = time.perf_counter()
    printed = loading.hub_answers("Qwen/Qwen2-0.5B-Instruct")
    assert time.perf_counter() - started < 5
    assert printed == (f"the hub {answer}" if answer else "")


# ------------------------------------------------------------------------------------------------ signals

STEPS = 12
DEMO_RUN = ["demo", "--max_steps", str(STEPS), "--logging_steps", "1", "--device", "cpu"]
ADAPTER = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The adapter's bytes of a demo run that nobody stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minilora.inference.generate.sample_answers", lambda chat_model: [""] * 3)
        assert cli.main(["train", *DEMO_RUN, "--output_dir", str(run)]) == 0
    return (run / ADAPTER).read_bytes()


def stop_and_resume(number, after, environment, tmp_path, uninterrupted):
    """Stop a demo run by a signal `after` so many steps; go on with the command it printed."""
    run = tmp_path / "run"
    command = [*TRAIN, *DEMO_RUN, "--output_dir", str(run)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as process:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith(f"step {after}/"):
                process.send_signal(number)
        error = process.stderr.read()
    printed = "".join(printed)
    assert process.returncode == 128 + number
    assert not (run / ADAPTER).exists()
    message = re.fullmatch(rf"minilora: stopped by {number.name}; saved (.+)\. Go on with: (.+)\n", error)
    assert message, error
    saved = int(Path(message[1]).name.removeprefix("step-"))
    assert after <= saved < STEPS
    assert "\x1b" not in printed + error  # no terminal, no escape codes
    assert "⟦" in printed  # supervised tokens are marked without colour

    program, script, *argv = shlex.split(message[2])
    assert (program, script) == ("python", str(ROOT / "train.py"))  # as it was started, from any folder
    assert cli.main(["train", *argv]) == 0
    assert (run / ADAPTER).read_bytes() == uninterrupted
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(number, environment, tmp_path, uninterrupted, mute):
    """130 or 143, the command to go on with, and in the end the same adapter, to the byte."""
    stop_and_resume(number, 3, environment, tmp_path, uninterrupted)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_stopped_anywhere(seed, environment, tmp_path, uninterrupted, mute):
    rng = random.Random(seed)
    number = rng.choice([signal.SIGINT, signal.SIGTERM])
    stop_and_resume(number, rng.randrange(1, STEPS - 1), environment, tmp_path, uninterrupted)


# ------------------------------------------------------------------------------------------------- colour


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("no_color", "coloured"), [(None, True), ("", True), ("1", False)])
def test_no_color_and_terminals(no_color, coloured, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    for stream, expected in ((Terminal(), coloured), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stdout", stream)
        terminal.say("run", "here")
        assert ("\x1b" in stream.getvalue()) == expected
        assert re.sub(r"\x1b\[\d+m", "", stream.getvalue()) == "run          here\n"
        assert ("\x1b" in terminal.style("x", "32")) == expected


# -------------------------------------------------------------------------------------- generate and chat


@pytest.fixture
def conversations(monkeypatch):
    """What the model is asked, one list of turns a conversation; it answers for itself."""
    asked = []
    really = generate.answer

    def answer(chat_model, turns_of, sampling, on_text=None):
        asked.extend([[*turns] for turns in turns_of])
        return really(chat_model, turns_of, sampling, on_text)

    monkeypatch.setattr(generate, "answer", answer)
    return asked


def chat(monkeypatch, tiny_folder, typed):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    speaking = ["--max_new_tokens", "6", "--dtype", "float32", "--system_prompt", "Be brief."]
    return cli.main(["chat", "--model", str(tiny_folder), *speaking])


def test_chat_answers_remembers_forgets_and_leaves(conversations, monkeypatch, capsys, tiny_folder):
    typed = "Hello\n\n   \n你是谁？\n/new\nAgain?\n/quit\nnever asked\n"
    assert chat(monkeypatch, tiny_folder, typed) == 0
    printed = capsys.readouterr().out
    assert [[turn.role for turn in turns] for turns in conversations] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user"],
    ]
    assert [turns[-1].content for turns in conversations] == ["Hello", "你是谁？", "Again?"]
    assert conversations[1][0] == Turn("user", "Hello")
    answers = [part.split("you> ")[0] for part in printed.split("you> ")[1:]]
    assert answers[0].strip() == conversations[1][1].content != ""  # what was said is what is remembered
    assert len([text for text in answers if text.strip()]) == 3
    assert "\x1b" not in printed


@pytest.mark.parametrize("leave", ["/quit\n", "/exit\n", "", "\n"])
def test_chat_is_left_by_command_or_end_of_file(leave, conversations, monkeypatch, capsys, tiny_folder):
    assert chat(monkeypatch, tiny_folder, leave) == 0
    assert conversations == []


def test_generate_answers_one_or_more_prompts(conversations, capsys, tiny_folder):
    flags = ["--model", str(tiny_folder), "--max_new_tokens", "6", "--dtype", "float32"]
    singles = []
    for prompt in ("Hello", "你是谁？"):
        assert cli.main(["generate", *flags, prompt]) == 0
        singles.append(capsys.readouterr().out.strip())
    assert all(singles)
    assert cli.main(["generate", *flags, "Hello", "你是谁？"]) == 0
    assert capsys.readouterr().out == f"> Hello\n{singles[0]}\n\n> 你是谁？\n{singles[1]}\n\n"
    assert conversations[:2] == [[Turn("user", "Hello")], [Turn("user", "你是谁？")]]
    assert sorted(conversations[2:], key=str) == sorted(conversations[:2], key=str)  # a batch begins with the longest


@pytest.mark.parametrize("prompt", ["--dry-run is which flag?", "-5 + 3 = ?", "--dry-run", "--debug"])
def test_prompts_reach_the_model_as_they_are(prompt, conversations, capsys, tiny_folder):
    """Dashes become underscores in flags only."""
    flags = ["--model", str(tiny_folder), "--max_new_tokens", "1", "--dtype", "float32"]
    assert cli.main(["generate", *flags, "--", prompt]) == 0
    assert conversations == [[Turn("user", prompt)]]


def test_a_prompt_longer_than_the_model_is_refused(capsys, tiny_folder):
    message = mistake(capsys, "generate", "--model", tiny_folder, "--max_new_tokens", "8", "word " * 600)
    assert "this model takes 504 before an answer" in message


def test_the_home_folder_behind_an_equals_sign(monkeypatch):
    """The shell expands ~ only where a word begins with it."""
    monkeypatch.setenv("HOME", "/home/lo")
    assert arguments.normal("--output-dir=~/x") == "--output_dir=/home/lo/x"
    assert arguments.normal("--system-prompt=~ is a tilde") == "--system_prompt=~ is a tilde"
