"""Converts conversations to ChatML token ids and marks the supervised tokens."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from tokenizers import Tokenizer

from minilora.data.formats import ROLES, Turn
from minilora.errors import DataError

# ---------------------------------------------------------------------------------------- rows -> tokens


class HasTokenizer(Protocol):
    """The attributes of a Hugging Face tokenizer that this module uses."""

    chat_template: Any
    backend_tokenizer: Any


class ChatMarkup:
    """Converts conversations to ChatML token ids (the markup of Qwen2, Qwen2.5 and Qwen3), turn by turn.

    Control tokens are inserted by id. A copy of the tokenizer without control tokens encodes all text, so no text of a
    user can become a control token. The format is that of the chat_template of the Qwen tokenizers. The tests compare
    the results with these templates.
    """

    def __init__(self, tokenizer: HasTokenizer) -> None:
        plain = json.loads(tokenizer.backend_tokenizer.to_str())
        plain["added_tokens"], plain["truncation"], plain["padding"] = [], None, None
        text = json.dumps(plain, ensure_ascii=False)
        self._plain = Tokenizer.from_str(text)
        known = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
        if missing := [token for token in ("<|im_start|>", "<|im_end|>") if token not in known]:
            raise DataError(f"the tokenizer has no {' or '.join(missing)}: it is not a ChatML (Qwen) tokenizer.")
        self.start, self.end = known["<|im_start|>"], known["<|im_end|>"]
        self.newline = self.encode(["\n"])[0]
        self.openings = {role: [self.start, *self.encode([f"{role}\n"])[0]] for role in ROLES}
        self._markup = {
            "turn": Piece([self.start]),
            "answer": Piece(self.openings["assistant"]),
            "end of answer": Piece([self.end], supervised=True),
            "end of turn": Piece([self.end, *self.newline]),
            "newline": Piece(self.newline),
        }
        # Qwen3 begins the last answer with a think block. It is empty if the row has no reasoning.
        self.thinks = "<think>" in known and "reasoning_content" in str(tokenizer.chat_template)
        self.think = [known.get("<think>", -1), known.get("</think>", -1)]
        control = (self.start, self.end, self.thinks, self.think)
        self.sha256 = hashlib.sha256(f"{text}{control}".encode()).hexdigest()  # of everything the ids depend on

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text, in parallel. The ids never contain control tokens."""
        return [each.ids for each in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def prompt_ids(self, turns: Sequence[Turn], system_prompt: str = "") -> list[int]:
        """The token ids of a conversation up to the next answer. Its last turn is the user's."""
        pieces = self._pieces(turns, system_prompt)
        return [i for ids in self._ids(pieces) for i in ids] + self.openings["assistant"]

    def texts(self, turns: Sequence[Turn]) -> list[str]:
        """The parts of a conversation that are encoded as text: not control tokens, not what the template drops."""
        return [piece.text for piece in self._pieces(turns, "") if piece.text is not None]

    def render(self, rows: Sequence[Sequence[Turn]], system_prompt: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Conversations end to end as (ids: (tokens,) int32, supervised: (tokens,) bool, lengths: (rows,) int64)."""
        pieces_of = [self._pieces(turns, system_prompt) for turns in rows]
        pieces = [piece for each in pieces_of for piece in each]
        parts = self._ids(pieces)
        sizes = np.array([len(part) for part in parts])
        supervised = np.repeat([piece.supervised for piece in pieces], sizes)
        firsts = np.cumsum([0, *(len(each) for each in pieces_of[:-1])])
        ids = np.fromiter(itertools.chain.from_iterable(parts), np.int32, count=len(supervised))
        return ids, supervised, np.add.reduceat(sizes, firsts)

    def _ids(self, pieces: Sequence["Piece"]) -> list[Sequence[int]]:
        texts = list(dict.fromkeys(piece.text for piece in pieces if piece.text is not None))
        known = dict(zip(texts, self.encode(texts), strict=True))  # a text of many rows is encoded once
        return [piece.ids if piece.text is None else known[piece.text] for piece in pieces]

    def _pieces(self, turns: Sequence[Turn], system_prompt: str) -> list["Piece"]:
        """A conversation as pieces of markup (ids) and text. Each piece is supervised or not.

        The role and the text of a prompt turn are encoded together, as the chat template does. The text of an answer
        is encoded separately from "assistant\\n" before it, because the model also generates it separately.
        """
        if system_prompt and turns[0].role != "system":
            turns = [Turn("system", system_prompt), *turns]
        last_asked = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=-1)
        pieces = []
        for i, turn in enumerate(turns):
            if turn.role == "assistant":
                pieces.append(self._markup["answer"])
                pieces += self._answer(turn.content, after_last_user=i > last_asked, last=i == len(turns) - 1)
                pieces += (self._markup["end of answer"], self._markup["newline"])
            else:
                text = Piece(text=f"{turn.role}\n{turn.content}")
                pieces += (self._markup["turn"], text, self._markup["end of turn"])
        return pieces

    def _answer(self, content: str, after_last_user: bool, last: bool) -> list["Piece"]:
        """The pieces of an answer. For Qwen3, the reasoning is dropped or put in a think block, as in its template."""
        if not self.thinks:
            return [Piece(text=content, supervised=True)]
        reasoning, closed, _ = content.partition("</think>")
        reasoning = reasoning.rpartition("<think>")[2].strip("\n") if closed else ""
        answer = content.rpartition("</think>")[2].lstrip("\n") if closed else content
        if not after_last_user or not (last or reasoning):
            return [Piece(text=answer, supervised=True)]
        begin, end = ([i] for i in self.think)
        texts = [Piece(text=text, supervised=True) for text in (f"\n{reasoning}\n", f"\n\n{answer}")]
        return [Piece(begin, supervised=True), texts[0], Piece(end, supervised=True), texts[1]]


class Piece(NamedTuple):
    """A part of a rendered turn: ids of control tokens and fixed markup, or a text to encode."""

    ids: Sequence[int] = ()
    text: str | None = None
    supervised: bool = False
