"""The parser of command lines: dashes or underscores, no abbreviations, and every mistake answered in one line."""

import argparse
import itertools
import os
import re
from collections.abc import Sequence
from typing import NoReturn

from minilora.config import nearest, presets
from minilora.errors import ConfigError

BOOLEAN_WORDS = ("true", "false", "yes", "no", "on", "off", "1", "0", "none")  # the first two are accepted
NEGATIVE = re.compile(r"-\.?\d")


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
        args, unknown = self.parse_known_args([*self.with_own_values(list(map(normal, argv[:end]))), *argv[end:]])
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            flags = [word for word in unknown if re.match(r"--?[^\W\d]", word)]
            hints = []
            for word in flags or unknown:  # what follows an unknown flag is its value, no second mistake
                mistake, hint = f"unknown argument {word!r}", nearest(word.partition("=")[0], known)
                if word.startswith("--preset") and hasattr(args, "source"):
                    hint = f" A preset is named without a flag: {self.prog} demo."
                elif not flags and getattr(args, "source", None):
                    mistake = f"{args.source!r} and {word!r}: give only one preset or TOML file"
                hints.append(f"{mistake}.{hint}")
            raise ConfigError(f"{' '.join(hints)} See {self.prog} --help")
        return args

    def with_own_values(self, words: list[str]) -> list[str]:
        """The words with the values of a flag behind an equals sign, where argparse would take too many or too few.

        A boolean flag takes no word that may be meant otherwise; a flag with several values does not take a preset or a
        TOML file; a negative number is a value.
        """
        nargs = {flag: action.nargs for action in self._actions for flag in action.option_strings}
        positional = {action.dest for action in self._actions if not action.option_strings}
        found = []
        while words:
            word, *words = words
            kind, count = nargs.get(word, 0), 0
            if kind == "?":
                boolean = bool(words) and words[0].lower() in BOOLEAN_WORDS
                other = bool(words) and positional == {"source"} and is_value(words[0])
                count = int(boolean or (other and not nearest(words[0], presets())))
                word += "" if count else "=true"
            elif kind == "+":
                count = len(list(itertools.takewhile(is_value, words)))
                if not count:
                    self.error(f"argument {word}: expected at least one argument")
            elif kind is None:
                count = int(bool(words) and bool(NEGATIVE.match(words[0])))
            found.append(f"{word}={','.join(words[:count])}" if count else word)
            words = words[count:]
        return found


def is_source(word: str) -> bool:
    """Whether a word names a preset or a TOML file."""
    return word.endswith(".toml") or word in presets()


def is_value(word: str) -> bool:
    """Whether a word after a flag with several values is one of them."""
    return not is_source(word) and (not word.startswith("-") or bool(NEGATIVE.match(word)))


def normal(word: str) -> str:
    """--learning-rate=1 as --learning_rate=1, --adapter=~/x with the home folder; other words unchanged."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    if value.startswith("~/"):  # the shell leaves it so behind an equals sign
        value = os.path.expanduser(value)
    return "--" + flag[2:].replace("-", "_") + equals + value
