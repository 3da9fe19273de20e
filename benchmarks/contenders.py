"""One contender, one process: train one pass over the rows and say how it went, as one JSON line.

Called by compare.py: `python benchmarks/contenders.py NAME --model DIR --train_file F --rows N --json OUT`.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()

import torch  # noqa: E402

from minilora.data import ChatMarkup, DataReport, Dataset, Row, read_rows, tokenize  # noqa: E402
from minilora.model import load_tokenizer, pick_device, pick_dtype  # noqa: E402

SYSTEM = "你是一个AI助手"
EXAMPLES_PER_STEP = 32
RECIPE = {"learning_rate": 1e-4, "weight_decay": 0.01, "max_grad_norm": 0.1, "lr_scheduler_type": "cosine"}


def rendered(args: argparse.Namespace) -> tuple[list[Row], Dataset]:
    """The rows every contender trains on, and their tokens, by which all are measured."""
    rows = read_rows(args.train_file)[0][: args.rows]
    markup = ChatMarkup(load_tokenizer(Path(args.model)))
    report = DataReport(args.train_file)
    options = {"max_length": 1024, "overlong": "truncate", "train_on_prompt": False}
    return rows, tokenize(rows, markup, report, system_prompt=SYSTEM, **options)


def minilora(args: argparse.Namespace) -> dict[str, Any]:
    """What `python train.py` does, without evaluation."""
    from minilora import loop
    from minilora.config import resolve
    from minilora.lora import disabled

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_bytes(b"".join(Path(args.train_file).read_bytes().splitlines(keepends=True)[: args.rows]))
        flags = {"model": args.model, "train_file": str(rows), "num_train_epochs": 1, "device": args.device}
        config = resolve("lora", flags | {"output_dir": f"{folder}/run"} | json.loads(args.flags))
        seen: dict[str, Any] = {}
        step = loop.train_step

        def watched(run: Any) -> dict[str, Any]:
            if not seen:
                first = run.train_set.subset(range(min(EXAMPLES_PER_STEP, len(run.train_set))))
                began = time.perf_counter()
                with disabled(run.model):
                    seen["start_completion_loss"] = loop.evaluate(run, first)
                seen["checked_s"] = time.perf_counter() - began
            record = step(run)
            seen.setdefault("seconds_to_first_step", time.perf_counter() - STARTED - seen["checked_s"])
            seen.setdefault("first", record)
            seen["peak_bytes"], seen["seconds"] = peak_bytes(args.device), run.state.seconds
            return record

        loop.train_step = watched
        summary = loop.train(config)
    first = seen["first"]
    return {
        "seconds": summary.seconds,
        "first_step_loss": first["loss"],
        "first_grad_norm": first["grad_norm"],
        "peak_bytes": seen["peak_bytes"],
        **{key: seen[key] for key in ("start_completion_loss", "seconds_to_first_step")},
    }


def peft_model(args: argparse.Namespace) -> Any:
    """The base in bf16 with the seed's LoRA, as peft makes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device = pick_device(args.device)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=pick_dtype("auto", device)).to(device)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=8, lora_alpha=32, target_modules=targets, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")
    return get_peft_model(base, lora)


@torch.no_grad()
def completion_loss(model: Any, dataset: Dataset) -> float:
    """Mean nats over the supervised tokens of the first rows, row by row through Hugging Face's own loss."""
    nats, supervised = 0.0, 0
    model.eval()
    for i in range(min(EXAMPLES_PER_STEP, len(dataset))):
        ids = torch.from_numpy(dataset[i].input_ids).long()[None].to(model.device)
        labels = torch.from_numpy(dataset[i].labels).long()[None].to(model.device)
        count = int((labels[:, 1:] != -100).sum())
        nats += float(model(input_ids=ids, labels=labels, use_cache=False).loss) * count
        supervised += count
    model.train()
    return nats / supervised


def run_trainer(trainer: Any, check: Callable[[], float], device: str) -> dict[str, Any]:
    """Train with a Hugging Face Trainer, timing its steps from the first micro-batch to the last update."""
    from transformers import TrainerCallback

    times: dict[str, float] = {}

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.setdefault("begin", time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times["end"] = time.perf_counter()
            times.setdefault("first", times["end"])
            times["peak"] = peak_bytes(device)

    began = time.perf_counter()
    loss = check()
    checked_s = time.perf_counter() - began
    trainer.add_callback(Clock())
    trainer.train()
    first = next(record for record in trainer.state.log_history if "grad_norm" in record)
    return {
        "seconds": times["end"] - times["begin"],
        "first_step_loss": first["loss"],
        "first_grad_norm": first["grad_norm"],
        "start_completion_loss": loss,
        "seconds_to_first_step": times["first"] - STARTED - checked_s,
        "peak_bytes": int(times["peak"]),
    }


def common(args: argparse.Namespace, folder: str, per_device: int) -> dict[str, Any]:
    """Trainer settings shared by the peers."""
    return RECIPE | {
        "output_dir": folder,
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": EXAMPLES_PER_STEP // per_device,
        "num_train_epochs": 1,
        "warmup_steps": 0.1,
        "bf16": True,
        "use_cpu": args.device == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def seed(args: argparse.Namespace) -> dict[str, Any]:
    """The seed's script: peft + Trainer, every row padded, gradient checkpointing, all logits, loss on all tokens.

    Its max_length, the length of its first row, would cut longer rows; here it is the longest row's, at most 512.
    """
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    _, dataset = rendered(args)
    tokenizer = load_tokenizer(Path(args.model))
    model = peft_model(args)
    model.enable_input_require_grads()
    limit = min(512, int(dataset.lengths.max()))
    columns = [{"input_ids": dataset[i].input_ids[:limit].tolist()} for i in range(len(dataset))]
    rows = [tokenizer.pad(column, padding="max_length", max_length=limit) for column in columns]
    with tempfile.TemporaryDirectory() as folder:
        kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        settings = TrainingArguments(**common(args, folder, 4) | kwargs)
        collator = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)
        trainer = Trainer(model=model, args=settings, train_dataset=rows, data_collator=collator)
        return run_trainer(trainer, lambda: completion_loss(model, dataset), args.device)


def trl(args: argparse.Namespace, per_device: int, grouped: bool) -> dict[str, Any]:
    """TRL's SFTTrainer + peft: loss on the answers only, no checkpointing."""
    from datasets import Dataset as HubDataset
    from trl import SFTConfig, SFTTrainer

    rows, dataset = rendered(args)
    tokenizer = load_tokenizer(Path(args.model))

    def split(row: Row) -> dict[str, Any]:
        turns = [{"role": "system", "content": SYSTEM}]
        turns += [{"role": turn.role, "content": turn.content} for turn in row.turns]
        return {"prompt": turns[:-1], "completion": turns[-1:]}

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            **common(args, folder, per_device),
            gradient_checkpointing=False,
            max_length=1024,
            completion_only_loss=True,
            **({"train_sampling_strategy": "group_by_length"} if grouped else {}),
        )
        model = peft_model(args)
        data = HubDataset.from_list([split(row) for row in rows])
        trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
        return run_trainer(trainer, lambda: completion_loss(model, dataset), args.device)


def peak_bytes(device: str) -> int:
    """Most memory so far: allocated on the card, or resident on the CPU."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


CONTENDERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "minilora": minilora,
    "seed": seed,
    "trl": lambda args: trl(args, 4, grouped=False),
    "trl-1": lambda args: trl(args, 1, grouped=False),
    "trl-grouped": lambda args: trl(args, 2, grouped=True),
}


def main() -> None:
    """Run the contender named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--flags", default="{}", help="JSON of further minilora keys")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(42)
    result = CONTENDERS[args.name](args)
    _, dataset = rendered(args)
    result["tokens"] = int(dataset.offsets[-1])
    result["supervised_tokens"] = int(dataset.supervised.sum())
    result["tokens_per_second"] = result["tokens"] / result["seconds"]
    result["supervised_tokens_per_second"] = result["supervised_tokens"] / result["seconds"]
    args.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
