"""Runs one contender in this process: it trains one pass over the first rows of a file, and reports figures as JSON.

    python -m benchmarks.contenders NAME --model DIR --train_file F --rows 64 --out OUT          the measured run
    python -m benchmarks.contenders NAME --model DIR --train_file F --rows 64 --out OUT --check  the loss before it

compare.py calls both. The check is a separate run, so that it neither warms up the measured run nor adds to its peak.
"""

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTED = time.time()  # before the import of torch, because the first step has to wait for this import

import torch  # noqa: E402

from minilora.data.dataset import IGNORE, Dataset, tokenize  # noqa: E402
from minilora.data.formats import Row  # noqa: E402
from minilora.data.markup import ChatMarkup  # noqa: E402
from minilora.data.rows import read_rows  # noqa: E402
from minilora.models.load import load_tokenizer  # noqa: E402
from minilora.utils.device import pick_device, pick_dtype  # noqa: E402

SYSTEM = "你是一个AI助手"
EXAMPLES_PER_STEP = 32
MAX_LENGTH = 512  # every contender cuts longer rows at this length, so that all train on the same tokens
RECIPE = {"learning_rate": 1e-4, "weight_decay": 0.01, "max_grad_norm": 0.1, "lr_scheduler_type": "cosine"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """The input of a contender: all get the same model folder and rows. A contender may write into `folder`."""

    model: str
    rows_file: Path
    device: torch.device
    folder: Path
    flags: dict[str, Any]  # further minilora keys
    seed: int = 42
    save: Path | None = None  # where the adapter goes, in PEFT's format
    dtype: str = "auto"  # auto | bfloat16 | float32: of the base and the products

    @property
    def peer_dtype(self) -> torch.dtype:
        """The dtype of a peer; auto is bf16 if the hardware has it. minilora resolves auto itself."""
        return pick_dtype(self.dtype, self.device)

    def rendered(self) -> tuple[list[Row], Dataset]:
        """The rows, and the tokens that count for all contenders: no padding, nothing after the last <|im_end|>."""
        rows, reading = read_rows(self.rows_file)
        options = {"max_length": MAX_LENGTH, "overlong": "truncate", "train_on_prompt": False}
        markup = ChatMarkup(load_tokenizer(Path(self.model)))
        return rows, tokenize(rows, markup, reading, system_prompt=SYSTEM, **options)[0]


# ---------------------------------------------------------------------------------------- minilora


def minilora(job: Job, check: bool) -> Result:
    """Train as `python train.py` does, without evaluation. The figures come from minilora's own records."""
    from minilora import loop
    from minilora.config import resolve

    flags = {"model": job.model, "train_file": str(job.rows_file), "device": str(job.device), "num_train_epochs": 1}
    flags |= {"max_length": MAX_LENGTH, "system_prompt": SYSTEM, "output_dir": str(job.folder / "run")}
    flags |= {"seed": job.seed, "dtype": job.dtype}
    config = resolve("lora", flags | job.flags)
    if check:
        return {"start_completion_loss": minilora_start_loss(config)}
    summary = loop.train(config)
    if job.save:
        shutil.copytree(job.folder / "run" / "adapter", job.save)
    first = json.loads((job.folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()[0])
    about = json.loads((job.folder / "run" / "config.json").read_text("utf-8"))
    dtype, base_dtype = (about[key].removeprefix("torch.") for key in ("dtype", "base_dtype"))
    return {
        "dtype": dtype if base_dtype == dtype else f"{dtype}, base {base_dtype}",
        "seconds": summary.seconds,
        "steps": summary.steps,
        "first_step_loss": first["loss"],
        "first_grad_norm": first["grad_norm"],
        "seconds_to_first_step": first["time"] - STARTED,
        "peak_training_bytes": summary.peak_memory_bytes,
    }


def minilora_start_loss(config: Any) -> float:
    """Mean nats over the answers' tokens of the first EXAMPLES_PER_STEP rows, by minilora's own evaluation."""
    from minilora import loop
    from minilora.training.setup import prepare
    from minilora.training.signals import StopRequest

    with StopRequest() as stop, ExitStack() as held:
        run = prepare(config, stop, held)
        return loop.evaluate(run, run.data.train.subset(range(EXAMPLES_PER_STEP)))


# ---------------------------------------------------------------------------------------- peft + a Trainer


def peft_model(job: Job) -> Any:
    """The base in the job's dtype, with the recipe's LoRA from peft (A and B in fp32)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.peer_dtype).to(job.device)
    base.config.use_cache = False
    lora = LoraConfig(r=8, lora_alpha=32, target_modules=TARGETS, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")
    return get_peft_model(base, lora)


def common(job: Job, per_device: int) -> dict[str, Any]:
    """Trainer settings that all peers share."""
    return RECIPE | {
        "output_dir": str(job.folder / "trainer"),
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": EXAMPLES_PER_STEP // per_device,
        "per_device_eval_batch_size": 1,
        "num_train_epochs": 1,
        "seed": job.seed,
        "warmup_steps": 0.1,  # a ratio: transformers 5 has no warmup_ratio
        "bf16": job.peer_dtype == torch.bfloat16,
        "use_cpu": job.device.type == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def seed(job: Job, check: bool) -> Result:
    """The LoRA script of the seed document (its section 5.2), as closely as transformers 5 can run it.

    Every row is padded on the left to max_length. The script uses gradient checkpointing and computes all logits.
    DataCollatorForLanguageModeling puts the loss on every token except padding. In the script pad = eos, so no
    <|im_end|> counts either.
    Two things differ from the script:
    - Its max_length is the length of the FIRST row, and every longer row is cut. So its tokens would differ from those
      of the other contenders, and the first row would decide the speed. Here max_length is MAX_LENGTH.
    - Its prepare_model_for_kbit_training casts the base to fp32. Here the base is in the dtype of the job.
    """
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    rows, dataset = job.rendered()
    tokenizer = load_tokenizer(Path(job.model))
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    texts = [seed_text(row) for row in rows]
    encoded = tokenizer(texts, truncation=True, max_length=MAX_LENGTH, padding="max_length")
    columns = [{key: encoded[key][i] for key in ("input_ids", "attention_mask")} for i in range(len(rows))]
    settings = TrainingArguments(
        **common(job, per_device=4),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        remove_unused_columns=False,
    )
    collator = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)
    trainer = Trainer(model=peft_model(job), args=settings, train_dataset=columns, data_collator=collator)
    if check:
        first = columns[:EXAMPLES_PER_STEP]
        return {"start_completion_loss": trainer_start_loss(trainer, first, dataset, same_mask=False)}
    return run_trainer(trainer, job)


def seed_text(row: Row) -> str:
    """The seed's format_prompt: ChatML as text, without a newline at its end."""
    turns = [f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>" for turn in row.turns]
    system = [] if row.turns[0].role == "system" else [f"<|im_start|>system\n{SYSTEM}<|im_end|>"]
    return "\n".join(system + turns)


def trl(job: Job, check: bool, per_device: int, sampling: str = "random") -> Result:
    """TRL's SFTTrainer + peft: loss on the answers only, head and loss fused, no checkpointing.

    It also trains on the newline after each <|im_end|>. That is one token more for each row than the other contenders.
    This token is not counted.
    """
    from datasets import Dataset as Table
    from trl import SFTConfig, SFTTrainer

    rows, dataset = job.rendered()
    settings = SFTConfig(
        **common(job, per_device),
        gradient_checkpointing=False,
        max_length=MAX_LENGTH,
        completion_only_loss=True,
        train_sampling_strategy=sampling,
    )
    trainer = SFTTrainer(
        model=peft_model(job),
        args=settings,
        train_dataset=Table.from_list([conversation(row) for row in rows]),
        processing_class=load_tokenizer(Path(job.model)),
    )
    if check:
        trainer.args.train_sampling_strategy = "random"  # grouping would also reorder the evaluation
        first = trainer.train_dataset.select(range(EXAMPLES_PER_STEP))
        return {"start_completion_loss": trainer_start_loss(trainer, first, dataset, same_mask=True)}
    return run_trainer(trainer, job)


def conversation(row: Row) -> dict[str, Any]:
    """A row as TRL's conversational prompt and completion. The tokenizer's chat template renders it."""
    turns = [{"role": turn.role, "content": turn.content} for turn in row.turns]
    if turns[0]["role"] != "system":
        turns = [{"role": "system", "content": SYSTEM}, *turns]
    return {"prompt": turns[:-1], "completion": turns[-1:]}


@torch.no_grad()
def trainer_start_loss(trainer: Any, first: Any, dataset: Dataset, same_mask: bool) -> float:
    """Mean nats over the answers' tokens of the first rows. The trainer collates and computes them itself.

    The computation is row by row; the seed keeps its padding. Raises RuntimeError if the tokens of a row differ from
    the shared rendering, because such a contender would not train on the same rows. same_mask: compare the labels too
    """
    nats, supervised = 0.0, 0
    model = trainer.model.eval()
    bf16 = torch.autocast(model.device.type, torch.bfloat16, enabled=trainer.args.bf16)
    batches = zip(dataset, trainer.get_eval_dataloader(first), strict=False)
    for row, (example, inputs) in enumerate(batches, 1):
        inputs = {key: value.to(model.device) for key, value in inputs.items()}
        real = inputs["attention_mask"][0].nonzero()[: len(example.input_ids), 0]  # not TRL's newline at the end
        shared = torch.from_numpy(example.labels).long().to(model.device)
        if inputs["input_ids"][0, real].tolist() != example.input_ids.tolist():
            raise RuntimeError(f"row {row} does not have the tokens that the others have")
        if same_mask and not torch.equal(inputs["labels"][0, real], shared):
            raise RuntimeError(f"row {row} does not have the labels that the others have")
        inputs["labels"] = torch.full_like(inputs["labels"], IGNORE)
        inputs["labels"][0, real] = shared
        count = int((shared[1:] != IGNORE).sum())
        with bf16:
            nats += float(trainer.compute_loss(model, inputs)) * count
        supervised += count
    return nats / supervised


def run_trainer(trainer: Any, job: Job) -> Result:
    """Train, and measure the time from the beginning of the first step to the end of the last step."""
    from transformers import TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        """The beginning of the first step, then the end of every step, in seconds of the wall clock."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not times:
                times.append(now(job.device))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(now(job.device))

    trainer.add_callback(Clock())
    trainer.train()
    if job.save:
        trainer.save_model(str(job.save))
    first = next(record for record in trainer.state.log_history if "grad_norm" in record)
    return {
        "dtype": str(job.peer_dtype).removeprefix("torch."),
        "seconds": times[-1] - times[0],
        "steps": len(times) - 1,
        "first_step_loss": first["loss"],
        "first_grad_norm": first["grad_norm"],
        "seconds_to_first_step": times[1] - STARTED,
        "peak_training_bytes": peak_bytes(job.device),
    }


def now(device: torch.device) -> float:
    """The wall clock in seconds, after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.time()


# ---------------------------------------------------------------------------------------- what all report


def peak_bytes(device: torch.device) -> int:
    """The peak memory so far: allocated memory on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def about(device: torch.device) -> dict[str, Any]:
    """The device and the number of threads of this process."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(), "threads": torch.get_num_threads()}
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return {"device": f"CPU: {model}, {os.cpu_count()} cores", "threads": torch.get_num_threads()}


def measured(job: Job, contender: "Contender") -> Result:
    """Run a contender, and add its peak memory, its tokens and its speed."""
    result = contender(job, False)
    peaks = {"peak_bytes": peak_bytes(job.device)}  # of the whole process, with minilora's check of its result
    if job.device.type == "cuda":
        peaks["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    _, dataset = job.rendered()
    tokens, supervised = int(dataset.lengths.sum()), int(dataset.counts.sum())
    return (
        result
        | peaks
        | {
            "tokens": tokens,
            "supervised_tokens": supervised,
            "tokens_per_second": tokens / result["seconds"],
            "supervised_tokens_per_second": supervised / result["seconds"],
        }
    )


def first_rows(train_file: str, count: int) -> bytes:
    """The first `count` non-empty lines of a file. Raises ValueError if there are fewer."""
    lines = [line for line in Path(train_file).read_bytes().split(b"\n") if line.strip()][:count]
    if len(lines) < count:
        raise ValueError(f"{train_file} has {len(lines)} rows, {count} are asked for")
    return b"\n".join(lines) + b"\n"


Contender = Callable[[Job, bool], Result]
CONTENDERS: dict[str, Contender] = {
    "minilora": minilora,
    "seed": seed,
    "trl": lambda job, check: trl(job, check, per_device=4),
    "trl-grouped": lambda job, check: trl(job, check, per_device=2, sampling="group_by_length"),
    "trl-1": lambda job, check: trl(job, check, per_device=1),
}


def main() -> None:
    """Run the contender named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--rows", type=int, required=True, help=f"a multiple of {EXAMPLES_PER_STEP}")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--flags", default="{}", help="JSON of further minilora keys")
    parser.add_argument("--check", action="store_true", help="only the loss before training")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--save", type=Path, help="folder for the adapter")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # a Trainer would use all GPUs
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder) / "rows.jsonl"
        rows_file.write_bytes(first_rows(args.train_file, args.rows))
        flags = json.loads(args.flags)
        job = Job(args.model, rows_file, device, Path(folder), flags, args.seed, args.save, args.dtype)
        contender = CONTENDERS[args.name]
        result = contender(job, True) if args.check else measured(job, contender)
    args.out.write_text(json.dumps(result | about(device)))


if __name__ == "__main__":
    main()
