"""How good a model is on a file of examples: loss, perplexity, token accuracy, exact answers; in one table."""

import dataclasses
import gc
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.batching import default_tokens, micro_batches
from minilora.config import TrainConfig
from minilora.data.dataset import Dataset, tokenize
from minilora.data.formats import Question, Row, question_of
from minilora.data.report import MAX_PROBLEMS_SHOWN
from minilora.data.rows import read_rows
from minilora.errors import AdapterError, DivergedError, OutOfMemoryError
from minilora.inference.generate import ChatModel, Sampling, answer_all, load_chat_model, progress
from minilora.lora import disabled
from minilora.loss import CHUNK_ROWS
from minilora.models.families import decoder_of
from minilora.models.load import find_model
from minilora.models.trained import trained_system_prompt
from minilora.utils import files
from minilora.utils.device import autocast, halve_until_fits

ANSWER_MARGIN = 16  # tokens that an answer may have beyond the longest reference
MAX_LOSS = 700.0  # nats; exp of more overflows, and no working model has it


@dataclass(frozen=True)
class Scores:
    """What one model reaches on the supervised tokens, and on the answers, of the examples."""

    loss: float  # nats a supervised token
    perplexity: float
    token_accuracy: float  # share of the supervised tokens that are the likeliest one
    exact_match: float | None  # share of the answers that are the reference, to the character


@dataclass(frozen=True)
class Evaluation:
    """The scores of base, adapter and merged model on the same examples."""

    eval_file: str
    sha256: str
    system_prompt: str
    examples: int
    bad_rows: int  # lines that are no examples, left out
    truncated: int  # examples cut to max_length
    tokens: int
    supervised_tokens: int
    answered: int  # rows whose answers were compared with the reference
    too_long: int  # rows that leave no room for an answer, and are not among these
    scores: dict[str, Scores]
    interrupted: bool = False  # Ctrl-C came before all scores were there


@dataclass(frozen=True)
class Request:
    """What is to be evaluated, and how; `generate` is the number of rows to answer."""

    eval_file: str
    model: str | None = None
    adapter: str | None = None
    merged: str | None = None
    system_prompt: str | None = None
    on_bad_rows: str = TrainConfig.on_bad_rows
    max_rows: int = 0
    max_length: int = TrainConfig.max_length
    generate: int = 0
    batch_size: int = 8
    dtype: str = "auto"
    device: str = "auto"
    allow_other_base: bool = False


def evaluate(request: Request) -> Evaluation:
    """Score the base, with and without the adapter, then the merged model, which takes the base's place in memory.

    The file is read, and the merged folder looked for, before a model is loaded. Ctrl-C ends it with the scores that
    are there, and raises KeyboardInterrupt where there are none.
    """
    rows, reading = read_rows(os.path.expanduser(request.eval_file), request.on_bad_rows)
    rows = rows[: request.max_rows or None]
    merged = find_model(request.merged) if request.merged else None
    chat_model = _chat_model(request)
    dataset, report = tokenize(
        rows,
        chat_model.markup,
        reading,
        system_prompt=chat_model.system_prompt,
        max_length=request.max_length,
        overlong="truncate",
        train_on_prompt=False,
    )
    asking = [row for row in rows if question_of(row)][: request.generate]
    fits = with_room(chat_model, questions(asking))
    asked = [question for question, fit in zip(questions(asking), fits, strict=True) if fit]
    too_long = [row.line for row, fit in zip(asking, fits, strict=True) if not fit]
    if too_long:
        lines = ", ".join(map(str, too_long[:MAX_PROBLEMS_SHOWN])) + ", ..." * (len(too_long) > MAX_PROBLEMS_SHOWN)
        print(
            f"{len(too_long):,} rows are too long to be answered; no answer is compared: line {lines}", file=sys.stderr
        )

    scores: dict[str, Scores] = {}

    def add_scores(chat_model: ChatModel, name: str) -> None:
        scores[name] = score(chat_model.model, dataset, name)
        if not asked:
            return
        try:
            share = exact_match(chat_model, asked, request.batch_size, name)
            scores[name] = dataclasses.replace(scores[name], exact_match=share)
        except OutOfMemoryError as error:
            print(f"{name}: the answers are not compared: {error}", file=sys.stderr)

    prompt, interrupted = chat_model.system_prompt, False
    try:
        with disabled(chat_model.model):
            add_scores(chat_model, "base")
        if request.adapter:
            add_scores(chat_model, "adapter")
        if merged:
            del chat_model
            gc.collect()
            add_scores(load_chat_model(str(merged), None, request.dtype, request.device, prompt), "merged")
    except KeyboardInterrupt:
        if not scores:
            raise
        interrupted = True
    return Evaluation(
        eval_file=request.eval_file,
        sha256=report.sha256,
        system_prompt=prompt,
        examples=len(dataset),
        bad_rows=len(report.bad),
        truncated=report.truncated,
        tokens=int(dataset.lengths.sum()),
        supervised_tokens=int(dataset.counts.sum()),
        answered=len(asked),
        too_long=len(too_long),
        scores=scores,
        interrupted=interrupted,
    )


def _chat_model(request: Request) -> ChatModel:
    """The model to score; its system prompt: as given, else as stored with the result, else training's default."""
    if not request.model and not request.adapter:
        raise AdapterError("give --adapter DIR, or --model NAME to evaluate a model without adapter")
    prompt = request.system_prompt
    if prompt is None and request.model and not request.adapter:
        stored = trained_system_prompt(find_model(request.model))
        prompt = TrainConfig.system_prompt if stored is None else stored
    where = (request.dtype, request.device)
    return load_chat_model(request.model, request.adapter, *where, prompt, request.allow_other_base)


def score(model: Any, dataset: Dataset, what: str) -> Scores:
    """Loss, perplexity and token accuracy of a model; micro-batches get smaller when memory runs out.

    Raises DivergedError when the loss is not a number.
    """
    device = next(model.parameters()).device
    longest = int(max(dataset.lengths)) - 1
    sizes = (model.config.intermediate_size, model.get_output_embeddings().weight.dtype)
    max_tokens = default_tokens(device.type, next(dataset.groups()), device.type == "cpu", *sizes)
    problem = f"one example of {longest:,} tokens does not fit: give a smaller --max_length"
    (nats, correct, supervised), _ = halve_until_fits(
        lambda size: _totals(model, dataset, size, what), max_tokens, longest, device, problem
    )
    loss = nats / supervised
    if not loss < MAX_LOSS:
        raise DivergedError(f"{what}: the loss is {loss}: there is something wrong with the model's numbers")
    return Scores(loss, math.exp(loss), correct / supervised, None)


@torch.no_grad()
def _totals(model: Any, dataset: Dataset, max_tokens: int, what: str) -> tuple[float, int, int]:
    """(sum of nats, correct tokens, supervised tokens), as the training loop's evaluation cuts and computes them."""
    device, dtype = next(model.parameters()).device, model.get_output_embeddings().weight.dtype
    decoder = decoder_of(model.eval(), dtype, device.type)
    nats = torch.zeros((), device=device, dtype=torch.float64)
    correct = torch.zeros((), device=device, dtype=torch.int64)
    supervised = 0
    with progress(len(dataset), what) as bar:
        for group in dataset.groups():
            for batch in micro_batches(group, max_tokens, share_prefix=device.type == "cpu"):
                batch = batch.to(device)
                with autocast(device, dtype):
                    batch_nats, batch_correct = token_scores(decoder(batch), decoder.head_weight, batch.targets)
                nats += batch_nats
                correct += batch_correct
                supervised += len(batch.targets)
                bar.update(len(batch.layout.lengths))
    return nats.item(), int(correct.item()), supervised


def token_scores(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = CHUNK_ROWS["cpu"]
) -> tuple[Tensor, Tensor]:
    """(summed nats, number of targets that are the likeliest token), `chunk` rows of logits at a time.

    hidden: (S, hidden), weight: (vocabulary, hidden), targets: (S,)
    """
    nats = torch.zeros((), device=hidden.device, dtype=torch.float64)
    correct = torch.zeros((), device=hidden.device, dtype=torch.int64)
    for rows, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = F.linear(rows, weight).float()  # (chunk, vocabulary)
        nats += F.cross_entropy(logits, target, reduction="sum")
        correct += (logits.argmax(-1) == target).sum()
    return nats, correct


def questions(rows: Sequence[Row]) -> list[Question]:
    """Those of the rows in which the user asks."""
    return [question for row in rows if (question := question_of(row))]


def with_room(chat_model: ChatModel, asked: Sequence[Question]) -> list[bool]:
    """For each question: does its prompt leave room for the longest reference of those that fit?"""
    if not asked:
        return []
    limit = chat_model.model.config.max_position_embeddings
    prompts = [len(chat_model.markup.prompt_ids(turns, chat_model.system_prompt)) for turns, _ in asked]
    answers = [len(ids) + ANSWER_MARGIN for ids in chat_model.markup.encode([reference for _, reference in asked])]
    longest = max((own for prompt, own in zip(prompts, answers, strict=True) if prompt + own <= limit), default=limit)
    return [prompt + max(own, longest) <= limit for prompt, own in zip(prompts, answers, strict=True)]


def exact_match(chat_model: ChatModel, asked: Sequence[Question], batch_size: int, what: str) -> float:
    """Share of the answers that the model gives to the character, greedily; blanks at the ends and reasoning aside."""
    conversations, references = zip(*asked, strict=True)
    # An answer longer than every reference is wrong however it ends; the same text in other tokens takes a few more.
    longest = max(map(len, chat_model.markup.encode(references)))
    texts = answer_all(
        chat_model, conversations, Sampling(max_new_tokens=longest + ANSWER_MARGIN), batch_size, f"{what}, answers"
    )
    same = [_without_reasoning(text) == _without_reasoning(own) for text, own in zip(texts, references, strict=True)]
    return sum(same) / len(same)


def _without_reasoning(text: str) -> str:
    return text.rpartition("</think>")[2].strip()


def table(evaluation: Evaluation) -> str:
    """What was scored, then the scores as aligned columns, a model in each row."""
    columns: dict[str, Callable[[Scores], str]] = {
        "loss": lambda scores: f"{scores.loss:.4f}",
        "perplexity": lambda scores: f"{scores.perplexity:.3f}",
        "token accuracy": lambda scores: f"{100 * scores.token_accuracy:.2f} %",
    }
    if evaluation.answered:
        columns[f"exact match of {evaluation.answered}"] = lambda scores: (
            "-" if scores.exact_match is None else f"{100 * scores.exact_match:.1f} %"
        )
    cut = f", {evaluation.truncated:,} rows cut to --max_length" if evaluation.truncated else ""
    cut += f", {evaluation.bad_rows:,} bad rows left out" if evaluation.bad_rows else ""
    cut += f", {evaluation.too_long:,} rows too long to be answered" if evaluation.too_long else ""
    lines = [f"{evaluation.examples:,} rows, {evaluation.supervised_tokens:,} supervised tokens{cut}"]
    lines.append(" " * 8 + "".join(f"  {head:>14}" for head in columns))
    for name, scores in evaluation.scores.items():
        cells = (f"  {cell(scores):>{max(14, len(head))}}" for head, cell in columns.items())
        lines.append(f"{name:<8}" + "".join(cells))
    return "\n".join(lines)


def save(evaluation: Evaluation, path: Path) -> None:
    """The evaluation as JSON, the keys of `Evaluation`."""
    files.replace_file(path, files.json_chunks(dataclasses.asdict(evaluation)))
