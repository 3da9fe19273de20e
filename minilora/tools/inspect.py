"""`minilora inspect` shows how a model processes a text: tokens, ids, embeddings, logits and the next token."""

import dataclasses
import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.data.formats import Turn
from minilora.errors import DataError, DivergedError
from minilora.inference.generate import ChatModel, Sampling, prompt_ids
from minilora.lora import disabled, lora_layers
from minilora.utils import files
from minilora.utils.html import Html, bar, page, section, table, tag
from minilora.utils.terminal import say

FIRST_VALUES = 5  # shown of each embedding
EXACT = "float32"  # for other types the output says that the numbers are rounded
SHOWN_TOKENS = 64  # in the terminal; of a longer text the first and the last tokens are shown


@dataclass(frozen=True)
class Token:
    """A token of the text with the first values of its embedding."""

    position: int
    id: int
    text: str
    embedding: list[float]


@dataclass(frozen=True)
class Candidate:
    """A possible next token: its probability over the vocabulary and its rank, by model."""

    id: int
    text: str
    probability: dict[str, float]
    rank: dict[str, int]


@dataclass(frozen=True)
class Inspection:
    """The result of an inspection. Shapes: embeddings (tokens, hidden), logits (tokens, vocabulary)."""

    text: str
    raw: bool
    system_prompt: str
    dtype: str
    tokens: list[Token]
    embedding_shape: tuple[int, ...]
    logits_shape: tuple[int, ...]
    candidates: list[Candidate]
    predicted: dict[str, str]  # model -> likeliest next token


@torch.no_grad()
def inspect(chat_model: ChatModel, text: str, raw: bool, top_k: int) -> Inspection:
    """Run a text through the base, and through the adapter if there is one.

    Raises DataError for a text that has no tokens or too many, DivergedError for logits that are not finite.
    """
    ids = raw_ids(chat_model, text) if raw else prompt_ids(chat_model, [Turn("user", text)], Sampling(max_new_tokens=1))
    model, tokenizer = chat_model.model, chat_model.tokenizer
    input_ids = torch.tensor([ids], device=next(model.parameters()).device)  # (1, tokens)
    embedded = model.get_input_embeddings()(input_ids)[0]  # (tokens, hidden)
    probabilities = {}
    with disabled(model):
        probabilities["base"] = next_token(model, input_ids, "base")  # (vocabulary,)
    if lora_layers(model):
        probabilities["adapter"] = next_token(model, input_ids, "adapter")
    likeliest = {name: int(chances.argmax()) for name, chances in probabilities.items()}
    values = embedded[:, :FIRST_VALUES].float().tolist()
    return Inspection(
        text=text,
        raw=raw,
        system_prompt="" if raw else chat_model.system_prompt,
        dtype=str(embedded.dtype).removeprefix("torch."),
        tokens=[Token(i, id, token_text(tokenizer, id), values[i]) for i, id in enumerate(ids)],
        embedding_shape=tuple(embedded.shape),
        logits_shape=(len(ids), len(probabilities["base"])),
        candidates=candidates(tokenizer, probabilities, top_k),
        predicted={name: token_text(tokenizer, id) for name, id in likeliest.items()},
    )


def raw_ids(chat_model: ChatModel, text: str) -> list[int]:
    """The token ids of a text without chat markup. A control token that the text spells becomes that token."""
    try:
        ids = chat_model.tokenizer(text)["input_ids"]
    except (UnicodeEncodeError, TypeError) as error:
        raise DataError("the text is not UTF-8") from error
    if not ids:
        raise DataError("the text is empty: there is no last position to predict from")
    if len(ids) > (limit := chat_model.model.config.max_position_embeddings):
        raise DataError(f"the text has {len(ids):,} tokens; this model takes {limit:,}")
    return ids


def next_token(model: Any, input_ids: Tensor, name: str) -> Tensor:
    """The probabilities of the token after the last position. (vocabulary,), fp64 on the CPU

    Only the logits of the last position are computed; those of a long text would need gigabytes.
    """
    logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits[0, -1].double().cpu()
    if not torch.isfinite(logits).all():
        raise DivergedError(f"{name}: its logits are not finite numbers, so its weights are damaged")
    return logits.softmax(-1)


def candidates(tokenizer: Any, probabilities: dict[str, Tensor], top_k: int) -> list[Candidate]:
    """The top_k tokens of each model, sorted by the rank in the last model."""
    order = {name: chances.argsort(descending=True, stable=True) for name, chances in probabilities.items()}
    ranks = {name: ids.argsort() for name, ids in order.items()}  # from 0, by token id
    ids = {int(id) for best in order.values() for id in best[:top_k]}
    last = list(probabilities)[-1]
    return [
        Candidate(
            id,
            token_text(tokenizer, id),
            {name: float(chances[id]) for name, chances in probabilities.items()},
            {name: 1 + int(rank[id]) for name, rank in ranks.items()},
        )
        for id in sorted(ids, key=lambda id: int(ranks[last][id]))
    ]


# ---------------------------------------------------------------------------------------- tokens as text


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token as text. Bytes that are only part of a character are written as \\xNN."""
    added = tokenizer.added_tokens_decoder.get(token_id)
    if added is not None:
        return added.content
    symbols = tokenizer.convert_ids_to_tokens(token_id) if token_id < len(tokenizer) else None
    if symbols is None:
        return f"[no token {token_id}]"  # the vocabulary of a model may be padded beyond the tokenizer's
    known = _byte_of_symbol()
    if not all(symbol in known for symbol in symbols):
        return tokenizer.decode([token_id])
    return bytes(known[symbol] for symbol in symbols).decode("utf-8", "backslashreplace")


@functools.cache
def _byte_of_symbol() -> dict[str, int]:
    """The byte for each symbol of a byte-level vocabulary.

    Source: bytes_to_unicode of https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def visible(text: str) -> str:
    """A text on one line: characters that are not printable become escape sequences."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def padded(text: str, columns: int) -> str:
    """A text padded with spaces to a width in terminal columns; a Chinese character takes two."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    marks = sum(unicodedata.combining(char) > 0 for char in text)
    return text + " " * max(0, columns - len(text) - wide + marks)


# ---------------------------------------------------------------------------------------- the output


def show(found: Inspection) -> None:
    """Print an inspection."""
    say("text", visible(found.text))
    if not found.raw:
        system = f"system prompt: {visible(found.system_prompt)!r}" if found.system_prompt else "no system prompt"
        say("", f"in chat markup, up to where the assistant answers; {system}")
    say("tokens", f"{len(found.tokens):,}: position, id, text, first values of the embedding")
    for token in shortened(found.tokens):
        if token is None:
            say("", f"... and {len(found.tokens) - SHOWN_TOKENS:,} more; the last ones follow ...")
            continue
        values = " ".join(f"{value:8.4f}" for value in token.embedding)
        say("", f"{token.position:>5} {token.id:>7}  {padded(quoted(token.text), 16)} {values}")
    tokens, hidden = found.embedding_shape
    say("embeddings", f"({tokens:,}, {hidden:,}) in {found.dtype}: {hidden:,} numbers for each token")
    vocabulary = found.logits_shape[1]
    say("logits", f"({tokens:,}, {vocabulary:,}): at each position one for each token of the vocabulary")
    names = list(found.predicted)
    say("next token", f"after position {tokens - 1}, the last: probability among all {vocabulary:,} tokens (rank)")
    if found.dtype != EXACT:
        say("", rounded(found))
    say("", f"{'id':>7}  {'text':<16}" + "".join(f"{name:>21}" for name in names))
    for candidate in found.candidates:
        cells = "".join(
            f"{100 * candidate.probability[name]:>9.4f} % {f'({candidate.rank[name]:,})':>9}" for name in names
        )
        say("", f"{candidate.id:>7}  {padded(quoted(candidate.text), 16)}{cells}")
    for name, text in found.predicted.items():
        say("predicted", f"{name}: {quoted(text)}")


def rounded(found: Inspection) -> str:
    """A warning about probabilities that are not computed in float32."""
    return f"rounded to {found.dtype}, which changes some by a factor of two; --dtype {EXACT} is more precise"


def shortened(tokens: Sequence[Token]) -> list[Token | None]:
    """The tokens; of more than SHOWN_TOKENS only the first and the last, with None between them."""
    if len(tokens) <= SHOWN_TOKENS:
        return list(tokens)
    half = SHOWN_TOKENS // 2
    return [*tokens[:half], None, *tokens[-half:]]


def quoted(text: str) -> str:
    """A token in quotation marks, so that spaces are visible."""
    return f'"{visible(text)}"'


def save_json(found: Inspection, path: Path) -> None:
    """Write the inspection as JSON with the keys of `Inspection`."""
    files.replace_file(path, files.json_chunks(dataclasses.asdict(found)))


def save_page(found: Inspection, title: str, path: Path) -> None:
    """Write the inspection as an HTML page."""
    files.replace_file(path, [as_page(found, title).encode()])


def as_page(found: Inspection, title: str) -> Html:
    """The inspection as HTML."""
    names = list(found.predicted)
    tokens, hidden = found.embedding_shape
    vocabulary = found.logits_shape[1]
    token_rows = [
        (token.position, token.id, tag("code", quoted(token.text)), ", ".join(f"{x:.4f}" for x in token.embedding))
        for token in found.tokens
    ]
    largest = max(max(candidate.probability.values()) for candidate in found.candidates)
    rows = []
    for candidate in found.candidates:
        cells: list[object] = [candidate.id, tag("code", quoted(candidate.text))]
        for number, name in enumerate(names):
            chance = candidate.probability[name]
            cells.append(tag("span", f"{100 * chance:.4f} % ({candidate.rank[name]:,})", bar(chance / largest, number)))
        rows.append(cells)
    tokenised = "without chat markup" if found.raw else "in chat markup, up to where the assistant answers"
    prompt = [tag("p", "system prompt: ", found.system_prompt, class_="soft")] if found.system_prompt else []
    return page(
        "Inspection of a text",
        tag("p", title, class_="soft"),
        section("Text", tag("p", found.text, class_="text"), *prompt),
        section(
            f"{tokens:,} tokens, {tokenised}",
            tag("p", f"Embeddings ({tokens:,}, {hidden:,}) in {found.dtype}: {hidden:,} numbers for each token."),
            table(("position", "id", "text", f"first {FIRST_VALUES} numbers"), token_rows, numbers=(0, 1)),
        ),
        section(
            "Next token",
            tag(
                "p",
                f"Logits ({tokens:,}, {vocabulary:,}). The last row, position {tokens - 1}, is shown as probabilities "
                f"over all {vocabulary:,} tokens of the vocabulary; the rank is in brackets.",
                *([f" They are {rounded(found)}."] if found.dtype != EXACT else []),
            ),
            table(["id", "text", *names], rows, numbers=[0]),
            *(tag("p", name, " predicts ", tag("code", quoted(text))) for name, text in found.predicted.items()),
        ),
    )
