"""The end of a run: the result is saved, reloaded into a fresh base, compared and summarised."""

import dataclasses
import shlex
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from minilora.errors import StoppedError
from minilora.inference.generate import ChatModel, sample_answers
from minilora.models.probe import SAMPLE_PROMPTS, logits_of_shards, probe, probe_logits
from minilora.models.trained import template_system_prompt
from minilora.training import checkpoint, report
from minilora.training.log import SUMMARY
from minilora.training.run import Run
from minilora.training.saving import compare, reload, save_result
from minilora.training.setup import parameter_counts
from minilora.utils import files
from minilora.utils.device import gib, peak_memory_bytes
from minilora.utils.terminal import one_line, say


@dataclass(frozen=True)
class Summary:
    """summary.json: the totals of a run."""

    steps: int
    stop_reason: str
    tokens: int
    supervised_tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    predicted_peak_memory_bytes: int | None
    trainable_parameters: int
    parameters: int
    skipped_steps: int
    first_loss: float | None
    last_loss: float | None
    first_eval_loss: float | None
    last_eval_loss: float | None
    best_eval_loss: float | None
    verified_max_logit_difference: float
    result: str
    answers: list[dict[str, str]]


def finish(run: Run, stop_reason: str) -> Summary:
    """Save the result, reload it into a fresh base, compare both, answer sample prompts, and write summary.json."""
    result = run.folder / ("adapter" if run.config.method == "lora" else "model")
    save_result(run, result)
    run.saved_result = result
    world = run.world
    world.run_on_main(lambda: checkpoint.remove_abandoned(run.folder, run.state))  # this is the last state
    with run.stop.interruptible() if world.main else nullcontext():  # the rest only reads what is saved
        counts = parameter_counts(run.model)
        reference = _logits_as_saved(run) if world.main or world.sharded else None
        if not world.main:
            run.release()
        return Summary(
            **world.run_on_main(lambda: dataclasses.asdict(_verify(run, stop_reason, result, counts, reference)))
        )


def _logits_as_saved(run: Run) -> torch.Tensor:
    """The logits of the probe from the trained model, with its weights rounded as saved. (tokens, vocabulary)"""
    ids = probe(run.markup, run.system_prompt)
    if run.world.sharded:
        return logits_of_shards(run.model, ids, run.result_dtype)
    if run.config.method == "full":  # but not the rotary buffers, which a loaded model has in fp32
        for param in run.model.parameters():
            param.data = param.data.to(run.result_dtype)
    return probe_logits(run.model, ids)


def _verify(
    run: Run, stop_reason: str, result: Path, counts: tuple[int, int], reference: torch.Tensor | None
) -> Summary:
    state, method = run.state, run.config.method
    trained, total = counts
    peak = peak_memory_bytes(run.device)
    ids = probe(run.markup, run.system_prompt)
    run.release()  # a card may not have memory for two bases
    place = torch.device("cpu") if run.world.sharded else run.device  # nor for one, if the base is sharded
    base, apply = reload(run.base_folder, result, method, run.result_dtype, place, run.config.base_bits)
    before = sample_answers(ChatModel(base, run.tokenizer, run.markup, run.system_prompt))
    tuned = apply()
    assert reference is not None, "the process that writes has the reference"
    difference = compare(reference, tuned, ids, result)
    after = sample_answers(ChatModel(tuned, run.tokenizer, run.markup, run.system_prompt))
    summary = Summary(
        steps=state.step,
        stop_reason=stop_reason,
        tokens=state.tokens,
        supervised_tokens=state.supervised_tokens,
        seconds=state.seconds,
        tokens_per_second=state.tokens / state.seconds if state.seconds else 0.0,
        peak_memory_bytes=peak,
        predicted_peak_memory_bytes=run.predicted_peak_bytes,
        trainable_parameters=trained,
        parameters=total,
        skipped_steps=state.skipped_steps,
        first_loss=state.first_loss,
        last_loss=state.last_loss,
        first_eval_loss=state.first_eval_loss,
        last_eval_loss=state.last_eval_loss,
        best_eval_loss=state.best_eval_loss,
        verified_max_logit_difference=difference,
        result=result.name,
        answers=[
            {"prompt": prompt, "base": old, "tuned": new}
            for prompt, old, new in zip(SAMPLE_PROMPTS, before, after, strict=True)
        ],
    )
    files.replace_file(run.folder / SUMMARY, files.json_chunks(dataclasses.asdict(summary)))
    run.stop.finished()
    _report(run, summary)
    _write_page(run)
    return summary


def _write_page(run: Run) -> None:
    """Write report.html. The run is already verified, so an error here becomes a note."""
    page = run.folder / report.REPORT
    try:
        report.write([run.folder], page)
    except StoppedError:
        raise
    except Exception as error:
        run.log.note(f"{page} could not be written: {error}")
    else:
        say("report", str(page))


def _report(run: Run, summary: Summary) -> None:
    for sample in summary.answers:
        say("asked", sample["prompt"].replace("\n", " "))
        say("  base", sample["base"].replace("\n", " "))
        say("  tuned", sample["tuned"].replace("\n", " "))
    result = run.folder / summary.result
    say("done", f"{summary.stop_reason} after {summary.steps:,} steps, {summary.seconds:.1f} s in training steps")
    say("speed", f"{summary.tokens_per_second:,.0f} tokens/s over {summary.tokens:,} real tokens")
    if summary.first_loss is not None and summary.last_loss is not None:
        say("loss", f"{summary.first_loss:.4f} -> {summary.last_loss:.4f} nats per supervised token")
    if summary.first_eval_loss is not None and summary.last_eval_loss is not None:
        say(
            "held-out",
            f"{summary.first_eval_loss:.4f} -> {summary.last_eval_loss:.4f} (best {summary.best_eval_loss:.4f})",
        )
    if run.state.evaluated_step > 0 and not (run.folder / "best").exists():
        start = "the adapter that the run started from" if run.config.adapter else "the untrained base"
        say("", f"no evaluation was better than {start}: there is no best/")
    predicted = summary.predicted_peak_memory_bytes
    prediction = f"; the prediction was {gib(predicted)}" if predicted else ""
    say("memory", f"{gib(summary.peak_memory_bytes)} at the peak{prediction}")
    difference = summary.verified_max_logit_difference
    say("verified", f"{result}: loaded from the disk into a fresh base, largest logit difference {difference:.3g}")
    source = f"--{'adapter' if summary.result == 'adapter' else 'model'} {shlex.quote(str(result))}"
    say("next", f"python -m minilora chat {source}")
    say("", f'python -m minilora generate {source} "{SAMPLE_PROMPTS[0]}"')
    _report_system_prompt(run)


def _report_system_prompt(run: Run) -> None:
    """Print the system prompt of the result, and the one that other programs insert instead."""
    prompt, inserted = one_line(run.system_prompt, 400), template_system_prompt(run.tokenizer)
    if prompt:
        say("system", f"the result keeps its system prompt from training; these commands use it: {prompt!r}")
    else:
        say("system", "the result was trained without a system turn; these commands add none")
    if inserted and inserted != run.system_prompt:
        say("", f"other programs insert {one_line(inserted)!r} if a request has no system turn")
