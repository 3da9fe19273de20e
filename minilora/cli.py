"""The command line: one verb per job. Errors become one clear message and an exit code, never a traceback."""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minilora import __version__
from minilora.config import FIELDS, TYPES, TrainConfig, as_number, choices, nearest, presets, read_source, resolve
from minilora.errors import ConfigError, MiniloraError, printable
from minilora.utils.arguments import Parser, is_source

PROG = "minilora"
LAST_WORDS_S = 1.0


def started(verb: str) -> str:
    """The command of a verb, as this process was started: a clone has no command `minilora`."""
    script = os.path.basename(sys.argv[0])
    if script == "train.py" and verb == "train":
        return "python train.py"
    return f"python -m {PROG} {verb}" if script in ("train.py", "__main__.py") else f"{PROG} {verb}"


def train_parser() -> Parser:
    """The flags of `train`."""
    return run_parser(
        "train",
        "Fine-tune a model. With no argument at all: preset lora on Qwen/Qwen2-0.5B-Instruct, or the "
        "built-in demo where that model is not available.",
    )


def run_parser(verb: str, description: str) -> Parser:
    """The flags that say what a run is: one for each field of TrainConfig."""
    parser = Parser(started(verb), description)
    parser.add_argument(
        "source", nargs="?", metavar="PRESET | FILE.toml", help=f"settings: {', '.join(presets())}, or a TOML file"
    )
    for name in FIELDS:
        add_key(parser, name)
    return parser


def add_key(parser: Parser, name: str) -> None:
    """The flag of a field of TrainConfig."""
    field = FIELDS[name]
    default = (" ".join(field.default) or "none") if isinstance(field.default, tuple) else field.default
    text = f"{field.metadata['help']} (default: {default})".replace("%", "%%")
    shape: dict[str, Any] = {"metavar": "|".join(choices(name)) or None, "help": text, "default": argparse.SUPPRESS}
    if TYPES[name] in (bool, bool | None):
        shape |= {"nargs": "?", "const": "true", "metavar": "true|false"}
    elif TYPES[name] == tuple[str, ...]:
        shape |= {"nargs": "+", "metavar": "NAME"}
    parser.add_argument(f"--{name}", **shape)


def train_command(argv: Sequence[str]) -> int:
    """minilora train"""
    config = parse_train(argv)

    from minilora.loop import train

    train(config)
    return 0


def parse_train(argv: Sequence[str]) -> TrainConfig:
    """The settings of a run: [PRESET | FILE.toml] [--KEY VALUE ...]."""
    args = vars(train_parser().parse(argv))
    source = args.pop("source")
    return config_of(source if argv else source_of_bare_call(), args)


def config_of(source: str | None, flags: dict[str, Any]) -> TrainConfig:
    """The settings from a preset or a file and flags; other keys are those of the run to resume, or of preset lora.

    Of an adapter to continue from, the keys that are not given are its own.
    """
    base, given = None, (read_source(source) if source else {}) | flags
    if flags.get("resume") not in (None, "auto", "never"):
        from minilora.training.rundir import saved_config

        base = saved_config(Path(os.path.expanduser(flags["resume"])), with_base="model" not in given)
    folder = given.get("adapter")
    adapter_keys = None
    if isinstance(folder, str) and folder.lower() not in ("none", ""):
        from minilora.adapters.format import keys_to_go_on

        adapter_keys = keys_to_go_on(Path(os.path.expanduser(folder)))
    return resolve(source or ("lora" if base is None else None), flags, base, adapter_keys)


def plan_command(argv: Sequence[str]) -> int:
    """minilora plan"""
    parser = run_parser(
        "plan", "Predict the memory that a run needs, part by part and for other settings. No weights are loaded."
    )
    parser.add_argument(
        "--card", metavar="NAME | GIB", help="a card by its name or its GiB (RTX 4080, H100, 24); default: this machine"
    )
    args = vars(parser.parse(argv))
    source, card = args.pop("source"), args.pop("card")
    config = config_of(source, args)

    from minilora.tools.plan import plan

    plan(config, card)
    return 0


def tune_command(argv: Sequence[str]) -> int:
    """minilora tune"""
    parser = run_parser(
        "tune",
        "Search for the learning rate: train a few steps at several rates on your rows and suggest one. "
        "Nothing is written.",
    )
    text = "learning rates to try; default: --learning_rate, then some around 1e-3 (method full: around 1e-5)"
    parser.add_argument("--rates", nargs="+", default=[], metavar="RATE", help=text)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps at each rate (default: 2)")
    parser.add_argument("--rows", type=int, default=8, help="rows in one step (default: 8)")
    parser.add_argument("--held_out", type=int, default=8, help="other rows on which the loss is measured (default: 8)")
    args = vars(parser.parse(argv))
    source, given, *counts = (args.pop(name) for name in ("source", "rates", "steps", "rows", "held_out"))
    rates = []
    for text in ",".join(given).split(",") if given else ():
        try:
            rates.append(as_number(float, text))
        except ValueError as error:
            raise ConfigError(f"--rates = {text!r} {error}: give numbers, separated by spaces or commas") from error
    config = config_of(source, args)

    from minilora.tools.tune import Search, tune

    tune(config, Search(tuple(sorted(set(rates))), *counts))
    return 0


def source_of_bare_call() -> str:
    """lora where its model is at hand or the hub answers within seconds, else demo, said in the first lines."""
    from minilora.models.load import cached_model, hub_answers

    name = TrainConfig().model
    if cached_model(name):
        return "lora"
    why = hub_answers(name)
    if not why:
        return "lora"
    if reports():
        print(f"{name} is not in the local cache, and {why}.")
        print("So this trains the small built-in demo model instead. To train a real one:")
        print("    python train.py --model FOLDER_OR_HUB_NAME --train_file data/train.jsonl", flush=True)
    return "demo"


def base_flag(parser: Parser) -> None:
    """--model beside --adapter."""
    text = "name on the hub, or folder, of the base; replaces the one that the adapter names"
    parser.add_argument("--model", metavar="NAME", help=text)


def other_base_flag(parser: Parser) -> None:
    """--allow_other_base."""
    text = "accept a base that the adapter was not trained on"
    parser.add_argument("--allow_other_base", action="store_true", help=text)


def model_flags(parser: Parser, several: bool = False) -> None:
    """The flags that say which model, and how it is loaded."""
    if several:
        text = "adapter folder; give the flag once for each adapter; the first one names the base"
        parser.add_argument("--adapter", metavar="[NAME=]DIR", action="append", default=[], help=text)
    else:
        parser.add_argument("--adapter", metavar="DIR", help="adapter folder; it names its base")
    base_flag(parser)
    other_base_flag(parser)
    parser.add_argument(
        "--system_prompt", metavar="TEXT", help="system turn; default: the one that the adapter was trained with"
    )
    auto = "dtype of the base; auto: bfloat16 where the hardware has it"
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help=auto)
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N")


def chat_parser(verb: str, description: str, several: bool = False) -> Parser:
    """The flags shared by the verbs that let a model speak."""
    parser = Parser(prog=started(verb), description=description)
    model_flags(parser, several)
    parser.add_argument(
        "--max_new_tokens", type=int, default=256, help="largest number of tokens of an answer (default: 256)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="randomness of an answer; 0: always the most probable token (default: 0)",
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="sample among the most probable tokens that together have this probability (default: 1)",
    )
    parser.add_argument(
        "--top_k", type=int, default=0, help="sample among this number of the most probable tokens; 0: all (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    return parser


def sampling_of(args: argparse.Namespace) -> Any:
    """Sampling from parsed flags, whose numbers are checked before anything is loaded."""
    at_least(args, 1, "max_new_tokens")
    at_least(args, 0, "top_k", "seed")
    if not 0 <= args.temperature < math.inf:
        raise ConfigError(f"--temperature = {args.temperature} must be a finite number, at least 0")
    if not 0 < args.top_p <= 1:
        raise ConfigError(f"--top_p = {args.top_p} must be more than 0 and at most 1")
    if args.seed >= 2**63:
        raise ConfigError(f"--seed = {args.seed} must be less than 2**63")
    import torch

    from minilora.inference.generate import Sampling

    torch.manual_seed(args.seed)
    return Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k)


def load_from(args: argparse.Namespace) -> Any:
    """A ChatModel from parsed flags."""
    from minilora.inference.generate import load_chat_model

    return load_chat_model(args.model, args.adapter, args.dtype, args.device, args.system_prompt, args.allow_other_base)


def file_to_write(flag: str, given: str | None, written_here: Callable[[Path], bool], *inputs: str) -> Path | None:
    """The file that a flag names, if it is given. Raises ConfigError if it cannot be written, or must not be replaced.

    written_here: whether an existing file is of the kind that this flag writes; no other file is replaced
    inputs: the files that the command reads
    """
    if given is None:
        return None
    path = Path(os.path.expanduser(given))
    if problem := why_not_written(path, written_here, [os.path.expanduser(file) for file in inputs]):
        raise ConfigError(f"--{flag} {given}: {problem}. Give another file.")
    return path


def why_not_written(path: Path, written_here: Callable[[Path], bool], inputs: Sequence[str]) -> str:
    """The reason why `file_to_write` refuses a file; empty if it does not."""
    folder = path.parent
    try:
        os.stat(folder)
    except FileNotFoundError:
        return f"the folder {folder} does not exist"
    except OSError as error:
        return f"{folder}: {error.strerror}"
    if os.path.isdir(path):
        return "it is a folder"
    if not os.path.isdir(folder):
        return f"{folder} is not a folder"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"the folder {folder} cannot be written to: Permission denied"
    if not os.path.exists(path):
        return ""
    if any(os.path.exists(file) and os.path.samefile(path, file) for file in inputs):
        return "it is the input itself"
    if not os.path.isfile(path):
        return "it is not a regular file"
    return "" if os.path.getsize(path) == 0 or written_here(path) else "this flag did not write what is in that file"


def holds(*keys: str) -> Callable[[Path], bool]:
    """A function: whether a file is a JSON object with these keys."""

    def written_here(path: Path) -> bool:
        from minilora.utils.files import read_json

        try:
            return read_json(path).keys() >= set(keys)
        except ValueError:
            return False

    return written_here


def at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """Raise ConfigError for a number below what it can be."""
    for name in names:
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} = {getattr(args, name)} must be at least {least}")


def generate_command(argv: Sequence[str]) -> int:
    """minilora generate"""
    parser = chat_parser("generate", "Answer prompts: those of the command line, or those of a file.")
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="a question; after the word -- it may begin with a dash"
    )
    parser.add_argument(
        "--input_file",
        metavar="F",
        help='JSONL file of questions: rows as for training, with or without answers, or {"prompt": ...}',
    )
    parser.add_argument(
        "--output_file", metavar="F", help='file for the same rows in the same order, each with an "answer"'
    )
    parser.add_argument("--batch_size", type=int, default=8, help="prompts that are answered together (default: 8)")
    args = parser.parse(argv)
    at_least(args, 1, "batch_size")
    if bool(args.input_file) != bool(args.output_file) or bool(args.prompts) == bool(args.input_file):
        raise ConfigError("give one or more of PROMPT, or both --input_file and --output_file")
    sampling = sampling_of(args)
    if args.input_file:
        return answer_file(args, sampling)
    chat_model = load_from(args)

    from minilora.data.formats import Turn
    from minilora.inference.generate import answer, answer_all

    conversations = [[Turn("user", prompt)] for prompt in args.prompts]
    if len(conversations) == 1:
        answer(chat_model, conversations, sampling, on_text=lambda text: print(text, end="", flush=True))
        print()
        return 0
    answers = answer_all(chat_model, conversations, sampling, args.batch_size, "answers")
    for prompt, text in zip(args.prompts, answers, strict=True):
        print(f"> {prompt}\n{text}\n")
    return 0


def answer_file(args: argparse.Namespace, sampling: Any) -> int:
    """minilora generate --input_file; whatever is wrong with the files is found before the model is loaded."""
    from minilora.inference.answer_file import holds_answers, read_questions, write_answers

    questions = read_questions(Path(args.input_file).expanduser())
    output = file_to_write("output_file", args.output_file, holds_answers, args.input_file)
    assert output is not None
    write_answers(load_from(args), questions, output, sampling, args.batch_size)
    print(f"answered {len(questions):,} rows: {output}")
    return 0


def chat_command(argv: Sequence[str]) -> int:
    """minilora chat"""
    parser = chat_parser(
        "chat",
        "Talk to a model. /new starts a new conversation; /quit or end of file ends the program. With adapters, "
        "/adapter NAME changes the adapter, and /base lets the base answer the last prompt.",
        several=True,
    )
    args = parser.parse(argv)
    sampling = sampling_of(args)

    from minilora.inference.chat import Chat
    from minilora.inference.multi_adapter import load_several, named_folders

    options = (args.dtype, args.device, args.system_prompt, args.allow_other_base)
    chat_model, adapters = load_several(named_folders(args.adapter), args.model, *options)
    Chat(chat_model, adapters, sampling, fixed_prompt=args.system_prompt is not None).talk()
    return 0


def eval_command(argv: Sequence[str]) -> int:
    """minilora eval"""
    parser = Parser(
        started("eval"), "Score a base and its adapter on a file: loss, perplexity, token accuracy, exact answers."
    )
    model_flags(parser)
    parser.add_argument("--eval_file", metavar="F", required=True, help="JSONL file with rows as for training")
    parser.add_argument("--merged", metavar="DIR", help="also score this model folder, which `merge` has written")
    bad = "what to do with a line that is not an example (default: error)"
    parser.add_argument("--on_bad_rows", choices=choices("on_bad_rows"), default=TrainConfig.on_bad_rows, help=bad)
    parser.add_argument(
        "--max_rows", type=int, default=0, help="use only the first rows, this number of them; 0: all (default: 0)"
    )
    cut = f"largest number of tokens of a row; the rest is cut off (default: {TrainConfig.max_length})"
    parser.add_argument("--max_length", type=int, default=TrainConfig.max_length, help=cut)
    exact = "answer the first N rows and count the answers that are equal to those of the file (default: 0)"
    parser.add_argument("--generate", metavar="N", type=int, default=0, help=exact)
    parser.add_argument("--batch_size", type=int, default=8, help="rows that are answered together (default: 8)")
    parser.add_argument("--json", metavar="F", help="also write the figures to this file")
    args = parser.parse(argv)
    at_least(args, 0, "max_rows", "generate")
    at_least(args, 1, "batch_size")
    at_least(args, 2, "max_length")

    from minilora.inference.evaluate import Request, evaluate, save, table

    output = file_to_write("json", args.json, holds("eval_file", "scores"), args.eval_file)
    asked = {key: value for key, value in vars(args).items() if key != "json"}
    found = evaluate(Request(**asked))
    print(table(found))
    if output is not None:
        save(found, output)
    if found.interrupted:
        raise KeyboardInterrupt
    return 0


def merge_command(argv: Sequence[str]) -> int:
    """minilora merge"""
    parser = Parser(
        started("merge"), "Add an adapter to the weights of its base, and write a normal Hugging Face model folder."
    )
    parser.add_argument("--adapter", metavar="DIR", required=True, help="adapter folder; it names its base")
    parser.add_argument("--output_dir", metavar="DIR", required=True, help="new folder for the merged model")
    base_flag(parser)
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    other_base_flag(parser)
    args = parser.parse(argv)

    from minilora.adapters.merge import merge

    agreement = merge(
        Path(os.path.expanduser(args.adapter)),
        Path(os.path.expanduser(args.output_dir)),
        args.model,
        args.dtype,
        args.allow_other_base,
    )
    print(
        f"merged into {args.output_dir}: against base + adapter in fp32, largest logit difference "
        f"{agreement.max_logit_difference:.3g}, same likeliest token at {100 * agreement.top1_share:.1f} % of positions"
    )
    return 0


def export_command(argv: Sequence[str]) -> int:
    """minilora export"""
    parser = Parser(
        started("export"), "Write an adapter in a form that other programs read, and print the commands for them."
    )
    parser.add_argument("--adapter", metavar="DIR", required=True, help="adapter folder")
    parser.add_argument("--output_dir", metavar="DIR", required=True, help="new folder for the exported adapter")
    parser.add_argument(
        "--portable",
        action="store_true",
        default=True,
        help="multiply B by the scale, for programs that ignore lora_alpha or rsLoRA (the only form, and the default)",
    )
    args = parser.parse(argv)

    from minilora.adapters.export import export_portable, how_to_use
    from minilora.adapters.format import read_metadata

    output = Path(args.output_dir).expanduser()
    config = export_portable(Path(args.adapter).expanduser(), output)
    print(f"{'exported':<12} {output}: the scale of r {config.rank}, alpha {config.alpha} is in B now")
    for program, text in how_to_use(output, config, read_metadata(output).get("system_prompt")):
        print(f"{program:<12} {printable(text, longest=100_000)}")  # a command that was cut would be a wrong one
    return 0


def verify_command(argv: Sequence[str]) -> int:
    """minilora verify"""
    parser = Parser(
        started("verify"),
        "Check that an adapter is complete and finite, fits its base, and gives the same results when merged.",
    )
    parser.add_argument("--adapter", metavar="DIR", required=True, help="adapter folder; it names its base")
    base_flag(parser)
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    args = parser.parse(argv)

    from minilora.tools.verify import verify

    verdict = verify(Path(args.adapter).expanduser(), args.model, args.device)
    base = "the base it was trained on" if verdict.same_base else "it does not say on which base it was trained"
    what = f"{args.adapter}: r {verdict.config.rank} on {verdict.num_layers} layers, all finite; {base}"
    if verdict.changes_nothing:
        print(f"{'no effect':<12} {what}; it changes nothing: its logits are those of the base. Was it trained?")
        return 0
    print(
        f"{'verified':<12} {what}; moves logits by up to {verdict.largest_effect:.3g}; "
        f"merged into the weights they differ by {verdict.max_logit_difference:.2g}"
    )
    return 0


def inspect_command(argv: Sequence[str]) -> int:
    """minilora inspect"""
    parser = Parser(
        started("inspect"),
        "Show a text inside a model: tokens, ids, embeddings, logits, the most probable next tokens. With an adapter, "
        "base and adapter are shown side by side.",
    )
    model_flags(parser)
    parser.add_argument("text", metavar="TEXT", help="the text; after the word -- it may begin with a dash")
    raw = "use the text alone; without this flag, it is a question in chat markup, up to where the answer begins"
    parser.add_argument("--raw", action="store_true", help=raw)
    parser.add_argument(
        "--top_k", type=int, default=10, help="number of next tokens to show for each model (default: 10)"
    )
    parser.add_argument("--html", metavar="F", help="also write an HTML page to this file")
    parser.add_argument("--json", metavar="F", help="also write the figures to this JSON file")
    args = parser.parse(argv)
    at_least(args, 1, "top_k")
    if args.raw and args.system_prompt is not None:
        raise ConfigError("--raw takes the text alone: leave --system_prompt out")

    from minilora.tools import inspect as inspection
    from minilora.utils.html import is_page

    html = file_to_write("html", args.html, is_page)
    json = file_to_write("json", args.json, holds("text", "predicted"))
    chat_model = load_from(args)

    found = inspection.inspect(chat_model, args.text, args.raw, args.top_k)
    inspection.show(found)
    if html is not None:
        inspection.save_page(found, args.adapter or args.model, html)
    if json is not None:
        inspection.save_json(found, json)
    return 0


def preview_command(argv: Sequence[str]) -> int:
    """minilora preview"""
    parser = Parser(
        started("preview"),
        "Show rows as the model sees them, with the learned tokens marked, and the contents of the file in figures.",
    )
    parser.add_argument("file", metavar="FILE", help="JSONL file with rows as for training")
    keys = ("model", "system_prompt", "max_length", "overlong", "train_on_prompt")
    for name in keys:
        add_key(parser, name)
    parser.add_argument("--rows", type=int, default=3, help="number of rows to show (default: 3)")
    parser.add_argument("--from_line", type=int, default=1, help="first line of the file to show (default: 1)")
    parser.add_argument("--html", metavar="F", help="also write an HTML page to this file")
    args = parser.parse(argv)
    at_least(args, 0, "rows")
    at_least(args, 1, "from_line")

    from minilora.tools import preview
    from minilora.utils.html import is_page

    html = file_to_write("html", args.html, is_page, args.file)
    config = config_of(None, {name: value for name, value in vars(args).items() if name in keys})

    found = preview.preview(os.path.expanduser(args.file), config, args.rows, args.from_line)
    preview.show(found)
    if html is not None:
        preview.save_page(found, html)
    return 0


def doctor_command(argv: Sequence[str]) -> int:
    """minilora doctor"""
    parser = Parser(
        started("doctor"),
        "Check everything that a run needs. The exit code is 0 when all is well, else 1; each failure has a fix.",
    )
    parser.add_argument("--model", metavar="NAME", help="also check this model: name on the hub, or folder")
    parser.add_argument(
        "--output_dir", metavar="DIR", default="runs", help="folder in which runs will be written (default: runs)"
    )
    args = parser.parse(argv)

    from minilora.tools.doctor import Asked, doctor

    return doctor(Asked(args.model, args.output_dir))


def report_command(argv: Sequence[str]) -> int:
    """minilora report"""
    parser = Parser(
        started("report"),
        "Write an HTML page about one run, or about several runs side by side. The page needs no network.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    where = "file for the page (default: report.html in the folder of the run; for several runs, in the current folder)"
    parser.add_argument("--html", metavar="F", help=where)
    args = parser.parse(argv)
    folders = [Path(os.path.expanduser(run)) for run in args.runs]

    from minilora.training import report
    from minilora.utils.html import is_page

    default = (folders[0] if len(folders) == 1 else Path()) / report.REPORT
    html = file_to_write("html", args.html or (str(default) if os.path.exists(default) else None), is_page) or default
    report.write(folders, html)
    print(f"written: {html}")
    return 0


VERBS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (train_command, "fine-tune a model"),
    "plan": (plan_command, "predict the memory that a run needs"),
    "tune": (tune_command, "search for the learning rate in a few steps"),
    "eval": (eval_command, "score a model on a file of examples"),
    "generate": (generate_command, "answer prompts"),
    "chat": (chat_command, "talk to a model"),
    "merge": (merge_command, "add an adapter to the weights of its base"),
    "export": (export_command, "write an adapter for other programs"),
    "verify": (verify_command, "check an adapter"),
    "inspect": (inspect_command, "show a text inside a model, up to the next token"),
    "preview": (preview_command, "show rows as the model sees them"),
    "doctor": (doctor_command, "check everything that a run needs"),
    "report": (report_command, "write an HTML page about one or more runs"),
}


def run(argv: Sequence[str]) -> int:
    """Carry out one verb."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {started('VERB')} ...\n")
        for verb, (_, text) in VERBS.items():
            print(f"  {verb:<10} {text}")
        print(f"\n{started('VERB')} --help explains a verb.")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"{PROG} {__version__}")
        return 0
    if argv[0] not in VERBS:
        hint = f" Did you mean {started('train')} {argv[0]}?" if is_source(argv[0]) else nearest(argv[0], VERBS)
        raise ConfigError(f"there is no verb {argv[0]!r} ({', '.join(VERBS)}).{hint}")
    if argv[0] != "train" and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(f"only train runs in several processes: start {started(argv[0])} without torchrun")
    return VERBS[argv[0]][0](argv[1:])


def reports(error: BaseException | None = None) -> bool:
    """Whether this process prints it: of the processes of a launcher, one prints what all of them meet."""
    return getattr(error, "alone", False) or os.environ.get("LOCAL_RANK", "0") == "0"


def report_error(error: BaseException, text: str) -> None:
    """Print an error, if this process is the one to do so; if not, leave that one the time."""
    if reports(error):
        who = f"{PROG}, process {os.environ['RANK']}" if getattr(error, "alone", False) else PROG
        print(f"{who}: {text}", file=sys.stderr, flush=True)
    else:
        time.sleep(LAST_WORDS_S)  # torchrun ends all processes when the first one fails


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return report_errors(run, list(sys.argv[1:] if argv is None else argv))


def report_errors(work: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Call work(argv); an error becomes one clear message and its exit code. --debug shows the traceback instead."""
    end = argv.index("--") if "--" in argv else len(argv)
    debug = "--debug" in argv[:end]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        return work([*(word for word in argv[:end] if word != "--debug"), *argv[end:]]) or 0
    except MiniloraError as error:
        if debug:
            raise
        report_error(error, printable(str(error)))
        return error.exit_code
    except KeyboardInterrupt as error:
        report_error(error, "interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.filename:
            report_error(error, printable(f"{error.filename}: {error.strerror}"))
        elif isinstance(error, (OSError, MemoryError)):
            report_error(error, printable(str(error)))
        else:
            what = printable(f"{type(error).__name__}: {error}")
            report_error(error, f"a mistake of ours: {what}. --debug shows where.")
        return 4 if isinstance(error, MemoryError) else 2 if isinstance(error, PermissionError) else 1
