"""The command line: one verb per job. Errors become one clear message and an exit code, never a traceback."""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from minilora import __version__
from minilora.config import FIELDS, TYPES, TrainConfig, choices, resolve
from minilora.errors import ConfigError, DataError, MiniloraError

PROG = "minilora"


class Parser(argparse.ArgumentParser):
    """argparse, with underscores and dashes alike, no abbreviations, and mistakes raised as ConfigError."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage."""
        raise ConfigError(f"{message}. See {self.prog} --help")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of argv; an unknown flag is answered with the nearest one."""
        end = argv.index("--") if "--" in argv else len(argv)  # what follows is text, whatever it looks like
        args, unknown = self.parse_known_args([*map(normal, argv[:end]), *argv[end:]])
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            hints = []
            for word in unknown:
                close = difflib.get_close_matches(word.partition("=")[0], known, n=1)
                hints.append(f"unknown argument {word!r}" + (f" Did you mean {close[0]}?" if close else ""))
            raise ConfigError("; ".join(hints) + f". See {self.prog} --help")
        return args


def normal(word: str) -> str:
    """--learning-rate=1 as --learning_rate=1; other words unchanged."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def train_parser() -> Parser:
    """The flags of `train`: one for each field of TrainConfig."""
    parser = Parser(
        prog=f"{PROG} train",
        description="Fine-tune a model. With no argument at all: preset lora on Qwen/Qwen2-0.5B-Instruct, or the "
        "built-in demo where that model cannot be had.",
    )
    parser.add_argument(
        "source", nargs="?", metavar="PRESET | FILE.toml", help="lora, full, demo, or a TOML file of keys"
    )
    for name, field in FIELDS.items():
        default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
        text = f"{field.metadata['help']} (default: {default})".replace("%", "%%")
        shape: dict[str, Any] = {"metavar": "|".join(choices(name)) or None, "help": text, "default": argparse.SUPPRESS}
        if TYPES[name] is bool:
            shape |= {"nargs": "?", "const": "true", "metavar": "true|false"}
        elif isinstance(field.default, tuple):
            shape |= {"nargs": "+", "metavar": "NAME"}
        parser.add_argument(f"--{name}", **shape)
    return parser


def train_command(argv: Sequence[str]) -> int:
    """minilora train"""
    args = vars(train_parser().parse(argv))
    source = args.pop("source")
    if not argv:
        source = source_of_bare_call()
    base = None
    if args.get("resume") not in (None, "auto", "never"):
        from minilora.rundir import saved_config

        base = saved_config(Path(args["resume"]))
    config = resolve(source or ("lora" if base is None else None), args, base)

    from minilora.loop import train

    train(config)
    return 0


def source_of_bare_call() -> str:
    """lora where its model is at hand or the hub answers within seconds, else demo, said in the first lines."""
    from minilora.model import cached_model, hub_answers

    name = TrainConfig().model
    if cached_model(name):
        return "lora"
    why = hub_answers(name)
    if not why:
        return "lora"
    print(f"{name} is not in the local cache, and {why}.")
    print("So this trains the small built-in demo model instead. To train a real one:")
    print("    python train.py --model FOLDER_OR_HUB_NAME --train_file data/train.jsonl", flush=True)
    return "demo"


def speaker_parser(verb: str, description: str) -> Parser:
    """The flags shared by the verbs that let a model speak."""
    parser = Parser(prog=f"{PROG} {verb}", description=description)
    parser.add_argument("--adapter", metavar="DIR", help="adapter folder; its base is found from it")
    parser.add_argument("--model", metavar="NAME", help="hub name or folder; overrides the adapter's base")
    parser.add_argument(
        "--allow_other_base", action="store_true", help="load the adapter on a base it was not trained on"
    )
    parser.add_argument("--system_prompt", metavar="TEXT", help="default: the one the adapter was trained with")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="tokens of an answer at most (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (default: 0)")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus sampling (default: 1)")
    parser.add_argument("--top_k", type=int, default=0, help="sample among so many; 0: all (default: 0)")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    return parser


def load_from(args: argparse.Namespace) -> tuple[Any, Any]:
    """(Speaker, Sampling) from parsed flags."""
    good = args.max_new_tokens >= 1 and 0 <= args.temperature < math.inf and 0 < args.top_p <= 1 and args.top_k >= 0
    if not good or not 0 <= args.seed < 2**63:
        raise ConfigError(
            "--max_new_tokens must be at least 1, --temperature, --top_k and --seed at least 0, --top_p in (0, 1]"
        )
    import torch

    from minilora.generate import Sampling, load_speaker

    torch.manual_seed(args.seed)
    speaker = load_speaker(args.model, args.adapter, args.dtype, args.device, args.system_prompt, args.allow_other_base)
    return speaker, Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k)


def generate_command(argv: Sequence[str]) -> int:
    """minilora generate"""
    parser = speaker_parser("generate", "Answer one or more prompts.")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    args = parser.parse(argv)
    speaker, sampling = load_from(args)

    from minilora.data import Turn
    from minilora.generate import answer

    conversations = [[Turn("user", prompt)] for prompt in args.prompts]
    if len(conversations) == 1:
        answer(speaker, conversations, sampling, on_text=lambda text: print(text, end="", flush=True))
        print()
        return 0
    for prompt, text in zip(args.prompts, answer(speaker, conversations, sampling), strict=True):
        print(f"> {prompt}\n{text}\n")
    return 0


def chat_command(argv: Sequence[str]) -> int:
    """minilora chat"""
    parser = speaker_parser("chat", "Talk to a model. /new forgets the conversation, /quit or end of file leaves.")
    speaker, sampling = load_from(parser.parse(argv))

    from minilora.data import Turn
    from minilora.generate import answer

    turns: list[Any] = []
    print("Talk to it; /new starts afresh, /quit leaves.", flush=True)
    while True:
        try:
            said = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if said in ("/quit", "/exit"):
            return 0
        if said == "/new":
            turns = []
        elif said:
            turns.append(Turn("user", said))
            try:
                texts = answer(speaker, [turns], sampling, on_text=lambda text: print(text, end="", flush=True))
            except DataError as error:  # too long, or no text: the conversation goes on without it
                print(printable(str(error)), file=sys.stderr)
                turns.pop()
                continue
            print()
            turns.append(Turn("assistant", texts[0]))


def merge_command(argv: Sequence[str]) -> int:
    """minilora merge"""
    parser = Parser(f"{PROG} merge", "Fold an adapter into its base: a plain Hugging Face folder comes out.")
    parser.add_argument("--adapter", metavar="DIR", required=True, help="adapter folder; its base is found from it")
    parser.add_argument("--output_dir", metavar="DIR", required=True, help="where the merged model goes")
    parser.add_argument("--model", metavar="NAME", help="hub name or folder; overrides the adapter's base")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    parser.add_argument("--allow_other_base", action="store_true", help="merge into a base it was not trained on")
    args = parser.parse(argv)

    from minilora.merge import merge

    agreement = merge(Path(args.adapter), Path(args.output_dir), args.model, args.dtype, args.allow_other_base)
    print(
        f"merged into {args.output_dir}: against base + adapter in fp32, largest logit difference "
        f"{agreement.max_logit_difference:.3g}, same likeliest token at {100 * agreement.top1_share:.1f} % of positions"
    )
    return 0


VERBS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (train_command, "fine-tune a model"),
    "generate": (generate_command, "answer prompts"),
    "chat": (chat_command, "talk to a model"),
    "merge": (merge_command, "fold an adapter into its base"),
}


def run(argv: Sequence[str]) -> int:
    """Carry out one verb."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {PROG} VERB ...\n")
        for verb, (_, text) in VERBS.items():
            print(f"  {verb:<10} {text}")
        print(f"\n{PROG} VERB --help tells more.")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"{PROG} {__version__}")
        return 0
    if argv[0] not in VERBS:
        close = difflib.get_close_matches(argv[0], VERBS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"there is no verb {argv[0]!r} ({', '.join(VERBS)}).{hint}")
    return VERBS[argv[0]][0](argv[1:])


def printable(text: str, longest: int = 600) -> str:
    """A message without control characters (a file may have put them there), its lines cut to a readable length."""
    lines = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in line[:longest]) for line in text.split("\n")]
    return "\n".join(line + ("..." if len(line) >= longest else "") for line in lines[:80])


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code. --debug shows the traceback of an error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    debug = "--debug" in argv[:end]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        return run([*(word for word in argv[:end] if word != "--debug"), *argv[end:]])
    except MiniloraError as error:
        if debug:
            raise
        print(f"{PROG}: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        if isinstance(error, (OSError, MemoryError)):
            print(f"{PROG}: {printable(str(error))}", file=sys.stderr)
        else:
            what = printable(f"{type(error).__name__}: {error}")
            print(f"{PROG}: a mistake of ours: {what}. --debug shows where.", file=sys.stderr)
        return 4 if isinstance(error, MemoryError) else 1
