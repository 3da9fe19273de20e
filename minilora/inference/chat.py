"""A conversation in the terminal, with one adapter or several, and with the base for comparison."""

import re
import sys

from minilora.data.formats import Turn
from minilora.errors import AdapterError, DataError, printable
from minilora.inference import generate
from minilora.inference.generate import ChatModel, Sampling
from minilora.inference.multi_adapter import Adapters
from minilora.models.trained import adapter_system_prompt

COMMANDS = ("/adapter NAME", "/base", "/new", "/quit")


class Chat:
    """What is said so far, and who says it.

    fixed_prompt: the system prompt stays when the adapter changes; else it is the one each adapter was trained with.
    """

    def __init__(self, chat_model: ChatModel, adapters: Adapters, sampling: Sampling, fixed_prompt: bool) -> None:
        self.chat_model, self.adapters, self.sampling, self.fixed_prompt = chat_model, adapters, sampling, fixed_prompt
        self.turns: list[Turn] = []

    def talk(self) -> None:
        """Read lines from stdin and answer them, until /quit or the end of the file."""
        print("Talk to it; /new starts afresh, /quit leaves.", flush=True)
        if self.adapters.names:
            print(f"/adapter NAME switches ({self.listed()}), /base lets the base answer the last prompt.", flush=True)
        while True:
            try:
                said = input("you> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            command, _, rest = said.partition(" ")
            if said in ("/quit", "/exit"):
                return
            if said == "/new":
                self.turns = []
            elif said == "/base":
                self.ask_base()
            elif command == "/adapter":
                self.switch(rest.strip())
            elif re.fullmatch(r"/[a-zA-Z]+", command):
                print(f"there is no {command}; possible are {', '.join(COMMANDS)}", file=sys.stderr)
            elif said:
                self.ask(said)

    def ask(self, said: str) -> None:
        """Answer, and remember both; what cannot be answered is not remembered."""
        asked = [*self.turns, Turn("user", said)]
        text = self.answer(asked)
        if text is not None:
            self.turns = [*asked, Turn("assistant", text)]

    def ask_base(self) -> None:
        """The last prompt again, answered by the base; not remembered."""
        if not self.turns:
            print("nothing has been asked yet", file=sys.stderr)
            return
        with self.adapters.disabled():
            self.answer(self.turns[:-1])

    def answer(self, turns: list[Turn]) -> str | None:
        """Print the answer as it comes; returns it, or None when the prompt is too long or no text."""
        try:
            texts = generate.answer(
                self.chat_model, [turns], self.sampling, on_text=lambda text: print(text, end="", flush=True)
            )
        except DataError as error:
            print(printable(str(error)), file=sys.stderr)
            return None
        print()
        return texts[0]

    def switch(self, name: str) -> None:
        """Go on with another adapter; without a name, list them."""
        try:
            chosen = self.adapters.use(name) if name else None
        except AdapterError as error:
            print(printable(str(error)), file=sys.stderr)
            return
        if chosen is not None and not self.fixed_prompt:
            self.chat_model.system_prompt = adapter_system_prompt(chosen.system_prompt, self.chat_model.tokenizer)
        print(f"adapters: {self.listed()}")

    def listed(self) -> str:
        """The adapters' names, the active one in brackets."""
        return " ".join(f"[{name}]" if name == self.adapters.active else name for name in self.adapters.names) or "none"
