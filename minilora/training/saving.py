"""Functions that save checkpoints, adapters and models, and compare a saved result with the trained model."""

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.adapters import format as adapter_format
from minilora.adapters.format import save_folder
from minilora.distributed.world import collect, full_tensor, local_part
from minilora.errors import AdapterError, DivergedError, ModelError
from minilora.inference.generate import ChatModel, short_answers
from minilora.models.fingerprint import fingerprint
from minilora.models.load import load_model
from minilora.models.probe import probe_logits
from minilora.models.trained import end_tokens, model_config, save_tokenizer, write_generation, write_record
from minilora.training import checkpoint
from minilora.training.run import Run
from minilora.utils import files
from minilora.utils.device import free_cached, is_out_of_memory, peak_memory_bytes, trim_heap

SAMPLES_AT_ONCE = 8


def save_model(
    folder: Path, model: Any, tokenizer: Any, dtype: torch.dtype, base_folder: Path, system_prompt: str, step: int
) -> None:
    """Write a Hugging Face model folder: the weights, rounded once to dtype, and the other files of the base.

    Raises DivergedError for weights that are not finite.
    """
    weights = _weights(model)
    if broken := [name for name, tensor in weights.items() if not torch.isfinite(local_part(tensor)).all()]:
        raise DivergedError(
            f"the model is not finite ({len(broken)} tensors, the first is {broken[0]}): not written to {folder}"
        )
    try:
        base_config = files.read_json(base_folder / "config.json")
    except ValueError as error:
        raise ModelError(f"{base_folder / 'config.json'}: {error}.") from error
    base_config.pop("_name_or_path", None)
    config = model_config(base_config, tokenizer, str(dtype).removeprefix("torch."))
    with files.new_folder(folder) as temporary:
        save_tokenizer(temporary, tokenizer, base_folder)
        files.write_file(temporary / "config.json", files.json_chunks(config))
        write_generation(temporary, model.generation_config.to_diff_dict(), end_tokens(tokenizer))
        write_record(temporary, system_prompt)
        specs = {name: (dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
        chunks = files.lazy_safetensors_chunks(
            specs, lambda name: full_tensor(weights[name]).to(dtype), {"format": "pt", "step": str(step)}
        )
        files.write_file(temporary / "model.safetensors", chunks)


def take_part(model: Any) -> None:
    """Send the shards of this process to the process that writes the model, in the order of `save_model`."""
    collect(_weights(model).values())


def _weights(model: Any) -> dict[str, torch.Tensor]:
    tied = model.config.tie_word_embeddings
    return {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def reload(
    base_folder: Path, result: Path, method: str, dtype: torch.dtype, device: torch.device, bits: int = 0
) -> tuple[Any, Any]:
    """(the base, read from the disk; a function that turns it into the saved result and returns the result)."""
    base = load_model(base_folder, dtype, device, bits)

    def apply() -> nn.Module:
        if method == "full":
            return load_model(result, dtype, device)
        adapter_format.load(base, result, fingerprint(base))
        return base.eval()

    return base, apply


def compare(reference: torch.Tensor, reloaded: nn.Module, ids: list[int], result: Path) -> float:
    """The largest absolute difference of logits between the trained model (`reference`) and the reloaded one.

    Raises AdapterError if it is too large, DivergedError if the logits of the trained model are not finite.
    """
    if not torch.isfinite(reference).all():
        raise DivergedError(
            f"{result}: the logits of the trained model are not finite numbers. Start a new run with "
            "a lower --learning_rate or --weight_decay."
        )
    logits = probe_logits(reloaded, ids)
    difference = float((logits - reference).abs().max())
    allowed = 1e-5 if reference.dtype == torch.float32 and next(reloaded.parameters()).dtype == torch.float32 else 1e-2
    if not difference <= allowed * max(1.0, float(reference.abs().max())):
        raise AdapterError(
            f"{result}: the logits of the reloaded result differ by {difference:.3g} from those of the trained model."
        )
    return difference


def step_record(
    run: Run, loss: float, grad_norm: float, rate: float, num_tokens: int, num_supervised: int, seconds: float
) -> dict[str, Any]:
    """The record of the step that run.state has just counted, for metrics.jsonl."""
    return {
        "step": run.state.step,
        "epoch": run.state.step / run.schedule.steps_per_epoch,
        "loss": loss if math.isfinite(loss) else None,
        "learning_rate": rate,
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "tokens": num_tokens,
        "supervised_tokens": num_supervised,
        "tokens_per_second": num_tokens / seconds,
        "peak_memory_bytes": peak_memory_bytes(run.device),
        "time": time.time(),
        **run.objective.metrics(),
    }


def record_evaluation(run: Run, loss: float) -> None:
    """Log the loss and the answers of an evaluation; save the result to best/ if the loss is the lowest so far."""
    state, best = run.state, run.state.best_eval_loss
    answers = run.world.run_on_main(lambda: answer_questions(run))  # a run stopped here repeats the evaluation
    run.log.evaluation({"step": state.step, "eval_loss": loss if math.isfinite(loss) else None}, best)
    run.log.samples(state.step, zip(run.data.questions, answers, strict=False))
    if math.isfinite(loss) and (best is None or loss < best):
        state.best_eval_loss, state.best_step, state.evals_since_best = loss, state.step, 0
        if state.step:
            save_result(run, run.folder / checkpoint.BEST)
    else:
        state.evals_since_best += 1
    state.first_eval_loss = loss if state.step == 0 and math.isfinite(loss) else state.first_eval_loss
    state.last_eval_loss = loss if math.isfinite(loss) else state.last_eval_loss
    state.evaluated_step = state.step


def answer_questions(run: Run) -> list[str]:
    """The current answers of the model to run.data.questions, as many as memory allows. It draws no random number."""
    chat_model = ChatModel(run.model.eval(), run.tokenizer, run.markup, run.config.system_prompt)
    answers: list[str] = []
    if run.data.questions:  # gives memory that training has freed back to the system
        trim_heap(run.device)
    for start in range(0, len(run.data.questions), SAMPLES_AT_ONCE):
        part = run.data.questions[start : start + SAMPLES_AT_ONCE]
        try:
            with run.autocast():
                answers += short_answers(chat_model, [question.turns for question in part])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            run.log.note(f"out of memory: {len(answers)} of {len(run.data.questions)} samples answered")
            break
        run.check()
    if len(answers) < len(run.data.questions):
        free_cached(run.device)
    return answers


def save_checkpoint(run: Run) -> Path:
    """Save the checkpoint of run.state, unless it is saved already. Raises DivergedError if weights are not finite."""
    path = checkpoint.checkpoint_path(run.folder, run.state.step)
    if run.saved_step == run.state.step and run.world.run_on_main(lambda: checkpoint.is_valid(path)):
        return path
    _refuse_non_finite(run)

    def save() -> None:
        with files.storage_errors(run.folder):
            os.stat(run.folder)  # a deleted run folder must not be created again with only a checkpoint
        checkpoint.save(run.folder, run.model, run.optimizer, run.state, run.identity, run.config.save_total_limit)

    run.world.run_on_main(save, lambda: checkpoint.take_part(run.model, run.optimizer))
    run.saved_step = run.state.step
    return path


def weights_are_finite(run: Run) -> bool:
    """Whether all trained parameters are finite, in all processes."""
    params = checkpoint.trainable(run.model).values()
    return not run.world.any(not all(bool(torch.isfinite(local_part(param)).all()) for param in params))


def _refuse_non_finite(run: Run) -> None:
    """Raise DivergedError if weights are not finite: a step with a finite gradient may overflow them."""
    if weights_are_finite(run):
        return
    saved, _ = checkpoint.newest_valid(run.folder)
    raise DivergedError(
        f"the weights are not finite after step {run.state.step}, and are not saved; the newest checkpoint: {saved}. "
        f"Start a new run with a lower --learning_rate (is {run.config.learning_rate:g}) or --weight_decay (is "
        f"{run.config.weight_decay:g})."
    )


def save_result(run: Run, folder: Path) -> None:
    """Save the trained parameters: as a PEFT adapter or as a Hugging Face model.

    Raises DivergedError for weights that are not finite.
    """
    _refuse_non_finite(run)
    if run.config.method == "full":
        run.world.run_on_main(
            lambda: save_model(
                folder, run.model, run.tokenizer, run.result_dtype, run.base_folder, run.system_prompt, run.state.step
            ),
            lambda: take_part(run.model),
        )
    else:
        run.world.run_on_main(lambda: _save_adapter(run, folder))


def _save_adapter(run: Run, folder: Path) -> None:
    config = run.config
    settings = adapter_format.AdapterConfig(
        base_model=str(run.base_folder.resolve()) if os.path.isdir(os.path.expanduser(config.model)) else config.model,
        rank=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.target_modules,
        rslora=config.use_rslora,
        dora=config.use_dora,
    )
    if config.init_lora_weights == "pissa":
        settings = adapter_format.converted(settings)
    metadata = {"base_fingerprint": run.identity.base_fingerprint, "system_prompt": run.system_prompt}
    metadata["step"] = str(run.state.step)
    save_folder(folder, run.model, run.tokenizer, settings, metadata, run.base_folder)
