"""Text out of a base model, with or without an adapter."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from minilora import adapter, model
from minilora.data import ChatMarkup, Turn
from minilora.errors import AdapterError, DataError, OutOfMemoryError
from minilora.memory import free_cached, is_out_of_memory


@dataclass
class Speaker:
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


def load_speaker(
    model_name: str | None,
    adapter_folder: str | None,
    dtype: str = "auto",
    device: str = "auto",
    system_prompt: str | None = None,
    allow_other_base: bool = False,
) -> Speaker:
    """A model, or the base an adapter names (model_name overrides) with the adapter on it."""
    folder = Path(os.path.expanduser(adapter_folder)) if adapter_folder else None
    stored = None
    if folder:
        model_name = adapter.base_of(folder, model_name)
        stored = adapter.read_metadata(folder).get("system_prompt")
    if not model_name:
        raise AdapterError("give --adapter DIR, or --model NAME for a model without adapter")
    base_folder = model.find_model(model_name)
    place = model.pick_device(device)
    tokenizer = model.load_tokenizer(base_folder)
    base = model.load_model(base_folder, model.pick_dtype(dtype, place), place)
    if folder:
        adapter.load(base, folder, model.fingerprint(base), allow_other_base)
        base.eval()
    given = system_prompt if system_prompt is not None else stored
    return Speaker(base, tokenizer, ChatMarkup(tokenizer), given if given is not None else "")


@torch.no_grad()
def answer(
    speaker: Speaker,
    conversations: Sequence[Sequence[Turn]],
    sampling: Sampling,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """The assistant's next turn in each conversation, computed as one left-padded batch.

    on_text gets the pieces of the answer as they come (one conversation only). Answers stop at <|im_end|>.
    """
    from transformers import TextStreamer

    prompts = [prompt_ids(speaker, turns, sampling) for turns in conversations]
    longest = max(map(len, prompts))
    pad = speaker.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    streamer = None
    if on_text is not None:
        streamer = TextStreamer(speaker.tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = lambda text, stream_end=False: on_text(text)  # type: ignore[method-assign]
    chosen: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        chosen |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    else:
        chosen |= {"temperature": None, "top_p": None, "top_k": None}
    device = next(speaker.model.parameters()).device
    output = speaker.model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=[speaker.markup.end, pad],
        pad_token_id=pad,
        repetition_penalty=1.0,
        streamer=streamer,
        **chosen,
    )
    return [speaker.tokenizer.decode(row[longest:], skip_special_tokens=True).strip() for row in output.cpu().tolist()]


def prompt_ids(speaker: Speaker, turns: Sequence[Turn], sampling: Sampling) -> list[int]:
    """The tokens of a conversation up to the answer. Raises DataError when they leave no room for it."""
    for turn in turns:
        try:
            turn.content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError("the prompt is not UTF-8: its bytes are no text in the terminal's encoding") from error
    ids = speaker.markup.prompt_ids(turns, speaker.system_prompt)
    limit = speaker.model.config.max_position_embeddings - sampling.max_new_tokens
    if len(ids) > limit:
        raise DataError(
            f"the prompt has {len(ids):,} tokens; this model takes {max(0, limit):,} before an answer of "
            f"{sampling.max_new_tokens:,}."
        )
    return ids


def answer_all(
    speaker: Speaker, conversations: Sequence[Sequence[Turn]], sampling: Sampling, batch_size: int, what: str
) -> list[str]:
    """Answers to any number of conversations, in their order, `batch_size` at a time; smaller when memory runs out.

    Conversations of about equal length go together, the longest first: little padding, and too little memory shows at
    once. what: the label of the progress bar. Raises DataError before the first answer when a prompt is too long.
    """
    lengths = [len(prompt_ids(speaker, turns, sampling)) for turns in conversations]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    answers = [""] * len(order)
    start = 0
    with progress(len(order), what) as bar:
        while start < len(order):
            part = order[start : start + batch_size]
            try:
                texts = answer(speaker, [conversations[i] for i in part], sampling)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise OutOfMemoryError(
                        f"not even one answer to {lengths[part[0]]:,} tokens fits: give a smaller --max_new_tokens or "
                        "a shorter prompt"
                    ) from error
                texts = []
            for i, text in zip(part, texts, strict=False):
                answers[i] = text
            if not texts:  # outside of the except block, whose error holds on to what did not fit
                batch_size = len(part) // 2
                free_cached(next(speaker.model.parameters()).device)
            start += len(texts)
            bar.update(len(texts))
    return answers


def progress(total: int, what: str) -> Any:
    """A progress bar on stderr, rarely renewed where that is a file."""
    every_s = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=what, unit="row", file=sys.stderr, mininterval=every_s, dynamic_ncols=True)


@torch.no_grad()
def probe_logits(module: nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """Logits of a short sequence, for comparing two models. (tokens, vocabulary), fp32 on the CPU"""
    device = next(module.parameters()).device
    was_training = module.training
    module.eval()
    logits = module(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0].float().cpu()
    module.train(was_training)
    return logits
