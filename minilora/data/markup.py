"""Writes conversations as ChatML token ids."""

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
    """What is asked of a Hugging Face tokenizer here."""

    chat_template: Any
    backend_tokenizer: Any


class ChatMarkup:
    """Writes conversations as ChatML token ids (the markup of Qwen2, Qwen2.5 and Qwen3), turn by turn.

    Control tokens are placed by id; all text is encoded by a copy of the tokenizer that knows no control tokens, so
    nothing a user writes can become one. Source of the format: the chat_template of the Qwen tokenizers, which the
    tests compare with.
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
        # Qwen3 opens the last answer with a think block, empty where the row brings no reasoning.
        self.thinks = "<think>" in known and "reasoning_content" in str(tokenizer.chat_template)
        self.think = [known.get("<think>", -1), known.get("</think>", -1)]
        control = (self.start, self.end, self.thinks, self.think)
        self.sha256 = hashlib.sha256(f"{text}{control}".encode()).hexdigest()  # of all that the ids depend on

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, in parallel, with no control tokens whatever the text holds."""
        return [each.ids for each in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def prompt_ids(self, turns: Sequence[Turn], system_prompt: str = "") -> list[int]:
        """A conversation up to the point where the assistant answers. Its last turn is the user's."""
        pieces = self._pieces(turns, system_prompt)
        return [i for ids in self._ids(pieces) for i in ids] + self.openings["assistant"]

    def texts(self, turns: Sequence[Turn]) -> list[str]:
        """What of a conversation is encoded as text: all but the control tokens, and what the template leaves out."""
        return [piece.text for piece in self._pieces(turns, "") if piece.text is not None]

    def render(self, rows: Sequence[Sequence[Turn]], system_prompt: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Conversations end to end: (ids, supervised, lengths); (tokens,) int32, (tokens,) bool, (rows,) int64."""
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
        known = dict(zip(texts, self.encode(texts), strict=True))  # a system prompt is many rows', and encoded once
        return [piece.ids if piece.text is None else known[piece.text] for piece in pieces]

    def _pieces(self, turns: Sequence[Turn], system_prompt: str) -> list["Piece"]:
        """A conversation as pieces of markup (ids) and text, each supervised or not.

        A prompt turn's role and text are encoded together, as the chat template does; an answer's text starts anew
        after "assistant\\n", as it does when the model writes it.
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
        """What the assistant says; for Qwen3 with the reasoning dropped or set off as its template does."""
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
    """A part of a rendered turn: control tokens and fixed markup by id, or text still to be encoded."""

    ids: Sequence[int] = ()
    text: str | None = None
    supervised: bool = False
