"""Text out of a base model, with or without an adapter."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minilora.adapters import format as adapter_format
from minilora.data.formats import Turn
from minilora.data.markup import ChatMarkup
from minilora.errors import AdapterError, DataError
from minilora.models.fingerprint import fingerprint
from minilora.models.load import load_model, load_tokenizer
from minilora.models.probe import SAMPLE_PROMPTS
from minilora.models.trained import adapter_system_prompt, trained_system_prompt
from minilora.utils.device import halve_until_fits, pick_device, pick_dtype

SAMPLE_TOKENS = 48

EMPTY_THINKING = re.compile(r"\A\s*<think>\s*</think>")  # Qwen3's templates begin an answer without reasoning so


@dataclass
class ChatModel:
    """A model ready to answer: with its tokenizer, its markup, and the system prompt it was trained with."""

    model: Any
    tokenizer: Any
    markup: ChatMarkup
    system_prompt: str


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


def load_chat_model(
    model_name: str | None,
    adapter_folder: str | None,
    dtype: str = "auto",
    device: str = "auto",
    system_prompt: str | None = None,
    allow_other_base: bool = False,
) -> ChatModel:
    """A model, or the base an adapter names (model_name overrides) with the adapter on it.

    system_prompt: None takes the one that it was trained with (`adapter_system_prompt`); a plain model gets none.
    """
    folder = Path(os.path.expanduser(adapter_folder)) if adapter_folder else None
    if folder:
        model_name = adapter_format.base_of(folder, model_name)
    if not model_name:
        raise AdapterError("give --adapter DIR, or --model NAME for a model without adapter")
    base_folder = adapter_format.find_base(model_name, folder)
    place = pick_device(device)
    tokenizer = load_tokenizer(base_folder)
    if system_prompt is None and folder:
        stored = adapter_format.read_metadata(folder).get("system_prompt")
        system_prompt = adapter_system_prompt(stored, tokenizer)
    elif system_prompt is None:
        system_prompt = trained_system_prompt(base_folder) or ""
    base = load_model(base_folder, pick_dtype(dtype, place), place)
    if folder:
        adapter_format.load(base, folder, fingerprint(base), allow_other_base)
        base.eval()
    return ChatModel(base, tokenizer, ChatMarkup(tokenizer), system_prompt)


@torch.no_grad()
def answer(
    chat_model: ChatModel,
    conversations: Sequence[Sequence[Turn]],
    sampling: Sampling,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """The assistant's next turn in each conversation, computed as one left-padded batch.

    on_text gets the pieces of the answer as they come (one conversation only). Answers stop at <|im_end|>.
    """
    from transformers import TextStreamer

    prompts = [prompt_ids(chat_model, turns, sampling) for turns in conversations]
    longest = max(map(len, prompts))
    pad = chat_model.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    streamer = None
    if on_text is not None:
        streamer = TextStreamer(chat_model.tokenizer, skip_prompt=True, skip_special_tokens=True)
        shown = without_empty_thinking(on_text)
        streamer.on_finalized_text = lambda text, stream_end=False: shown(text)  # type: ignore[method-assign]
    chosen: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        chosen |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    else:
        chosen |= {"temperature": None, "top_p": None, "top_k": None}
    device = next(chat_model.model.parameters()).device
    output = chat_model.model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=[chat_model.markup.end, pad],
        pad_token_id=pad,
        repetition_penalty=1.0,
        streamer=streamer,
        **chosen,
    )
    texts = [chat_model.tokenizer.decode(row[longest:], skip_special_tokens=True) for row in output.cpu().tolist()]
    return [EMPTY_THINKING.sub("", text).strip() for text in texts]


def without_empty_thinking(on_text: Callable[[str], None]) -> Callable[[str], None]:
    """The same function for a text in pieces, without an empty think block at its beginning."""
    held: list[str] | None = []  # what may still become an empty block; None: the decision is made

    def on_piece(piece: str) -> None:
        nonlocal held
        if held is None:
            return on_text(piece)
        held.append(piece)
        text = "".join(held)
        if not "<think></think>".startswith("".join(text.split())):
            held, rest = None, EMPTY_THINKING.sub("", text)
            on_text(text if rest == text else rest.lstrip())

    return on_piece


def prompt_ids(chat_model: ChatModel, turns: Sequence[Turn], sampling: Sampling) -> list[int]:
    """The tokens of a conversation up to the answer. Raises DataError when they leave no room for it."""
    for turn in turns:
        try:
            turn.content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError("the prompt is not UTF-8: its bytes are no text in the terminal's encoding") from error
    ids = chat_model.markup.prompt_ids(turns, chat_model.system_prompt)
    limit = chat_model.model.config.max_position_embeddings - sampling.max_new_tokens
    if len(ids) > limit:
        raise DataError(
            f"the prompt has {len(ids):,} tokens; this model takes {max(0, limit):,} before an answer of "
            f"{sampling.max_new_tokens:,}."
        )
    return ids


def answer_all(
    chat_model: ChatModel,
    conversations: Sequence[Sequence[Turn]],
    sampling: Sampling,
    batch_size: int,
    what: str,
    on_answer: Callable[[int, str], object] = lambda place, text: None,
) -> list[str]:
    """Answers to any number of conversations, in their order, `batch_size` at a time; smaller when memory runs out.

    Conversations of about equal length go together, the longest first: little padding, and too little memory shows at
    once. what: the label of the progress bar. on_answer gets (place, answer) as soon as each is there.
    Raises DataError before the first answer when a prompt is too long.
    """
    lengths = [len(prompt_ids(chat_model, turns, sampling)) for turns in conversations]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    answers = [""] * len(order)
    start, device = 0, next(chat_model.model.parameters()).device

    def next_answers(size: int) -> list[str]:
        return answer(chat_model, [conversations[i] for i in order[start : start + size]], sampling)

    with progress(len(order), what) as bar:
        while start < len(order):
            prompt = f"not even one answer to {lengths[order[start]]:,} tokens fits"
            problem = f"{prompt}: give a smaller --max_new_tokens or a shorter prompt"
            size = min(batch_size, len(order) - start)
            texts, batch_size = halve_until_fits(next_answers, size, 1, device, problem)
            for i, text in zip(order[start:], texts, strict=False):
                answers[i] = text
                on_answer(i, text)
            start += len(texts)
            bar.update(len(texts))
    return answers


def progress(total: int, what: str) -> Any:
    """A progress bar on stderr, rarely renewed where that is a file."""
    every_s = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=what, unit="row", file=sys.stderr, mininterval=every_s, dynamic_ncols=True)


def sample_answers(chat_model: ChatModel) -> list[str]:
    """Greedy answers to SAMPLE_PROMPTS."""
    return answer(chat_model, [[Turn("user", text)] for text in SAMPLE_PROMPTS], Sampling(max_new_tokens=SAMPLE_TOKENS))


def short_answers(chat_model: ChatModel, conversations: Sequence[Sequence[Turn]]) -> list[str]:
    """The beginnings of the greedy answers to a few conversations, each of which leaves room for a token."""
    longest = max(len(chat_model.markup.prompt_ids(turns, chat_model.system_prompt)) for turns in conversations)
    room = chat_model.model.config.max_position_embeddings - longest
    texts = answer(chat_model, conversations, Sampling(max_new_tokens=min(SAMPLE_TOKENS, room)))
    return [text.rstrip("\ufffd") for text in texts]  # cut between the bytes of a character
