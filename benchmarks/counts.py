"""Counts one training step with the shapes of Qwen2-0.5B on fake tensors. The figures do not depend on the machine.

    python -m benchmarks.counts --tokens 4096 --examples 8

Forward, loss and backward of one micro-batch run under torch's FakeTensorMode. Its tensors have shapes and no numbers,
so the script needs only seconds, no weights and little memory. It counts the operations that torch dispatches, the
FLOPs of matrix products and attention, and the bytes of the live storages. It does not count memory that a kernel
allocates and frees internally.
"""

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minilora import lora
from minilora.batching import Batch, collate
from minilora.data.dataset import IGNORE, Example
from minilora.decoder import once, recomputed
from minilora.models.families import family_of
from minilora.objectives.sft import SFT
from minilora.training.memory_estimate import LAYERS, MarkedDecoder
from minilora.training.memory_trace import Watch, policy_as_on, to_fake

SHAPE = {  # Qwen2-0.5B
    "hidden_size": 896,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK, ALPHA, DROPOUT = 8, 32, 0.05
SUPERVISED_SHARE = 0.5
CONTENDERS = ("minilora", "peft")


@dataclass(frozen=True)
class Counts:
    """The cost of one micro-batch. `tokens` includes the last token of each example."""

    contender: str
    form: str
    checkpointing: bool
    tokens: int
    examples: int
    flops: int
    saved_bytes: int  # alive between forward and backward, without the weights and the batch
    peaks_bytes: tuple[int, ...]  # the peak of each phase of the step, without the weights and the batch
    operations: int  # dispatched operations, views included
    kernels: int  # operations that are not views
    names: dict[str, int]  # the operations by name

    @property
    def peak_bytes(self) -> int:
        """The peak of live memory, without the weights and the batch."""
        return max(self.peaks_bytes)

    @property
    def flops_per_token(self) -> float:
        """FLOPs of matrix products and attention, per token."""
        return self.flops / self.tokens

    @property
    def saved_bytes_per_token(self) -> float:
        """Bytes saved for backward, per token."""
        return self.saved_bytes / self.tokens


def formula_flops_per_token(tokens_per_example: int, layers: int = 24) -> float:
    """The FLOPs per token by formula.

    The formula has the layers with the gradient of their input, the head on supervised rows, and attention. Of the last
    layer, o_proj and the MLP see only the supervised rows too, because nothing reads their other outputs. The formula
    has no gradient of weights and no LoRA. Attention has 2 products forward and 5 backward (the scores are recomputed),
    over the tokens that each token attends to.
    """
    hidden = SHAPE["hidden_size"]
    kv = hidden * SHAPE["num_key_value_heads"] // SHAPE["num_attention_heads"]
    qkv = hidden * hidden + 2 * hidden * kv
    others = hidden * hidden + 3 * hidden * SHAPE["intermediate_size"]  # o_proj and the MLP
    body = layers * qkv + (layers - 1 + SUPERVISED_SHARE) * others
    head = hidden * SHAPE["vocab_size"]
    seen = 7 * 2 * hidden * layers * (tokens_per_example / 2)
    return 4 * body + 4 * head * SUPERVISED_SHARE + seen


def whole(contender: str, layers: int = 24, **size: Any) -> Counts:
    """The `count` of the whole model, from counts of 3 and 4 layers: all but the first and the last cost the same."""
    few, more = (count(contender, layers=number, **size) for number in LAYERS)
    steps = layers - LAYERS[0]

    def along(name: str) -> int:
        return getattr(few, name) + steps * (getattr(more, name) - getattr(few, name))

    peaks = tuple(low + steps * (high - low) for low, high in zip(few.peaks_bytes, more.peaks_bytes, strict=True))
    names = {name: few.names[name] + steps * (number - few.names[name]) for name, number in more.names.items()}
    key = (few.contender, few.form, few.checkpointing, few.tokens, few.examples)
    return Counts(*key, along("flops"), along("saved_bytes"), peaks, along("operations"), along("kernels"), names)


def count(
    contender: str,
    tokens: int = 4096,
    examples: int = 8,
    checkpointing: bool = False,
    dropout: float = DROPOUT,
    form: str = "cpu",
    layers: int = 24,
) -> Counts:
    """The figures of one micro-batch of `examples` equal examples with `tokens` tokens in total. Half are supervised.

    form: cpu, or cuda for the operations of minilora on CUDA. peft is counted on the CPU, where its dropout keeps fp32
        noise.
    Raises ValueError for an unknown contender, and for a form that the contender does not have.
    """
    if contender not in CONTENDERS:
        raise ValueError(f"{contender!r} is none of {', '.join(CONTENDERS)}")
    if form not in (("cpu", "cuda") if contender == "minilora" else ("cpu",)):
        raise ValueError(f"{contender} has no form {form!r}")
    length = tokens // examples
    step = minilora_step if contender == "minilora" else peft_step
    model, forward, inputs = step(base_model(layers), length, examples, dropout, checkpointing, form)
    with FakeTensorMode():
        to_fake(model)
        inputs = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in inputs]
        with Watch([*model.parameters(), *model.buffers(), *inputs]) as watch:
            with torch.autocast("cpu", torch.bfloat16):
                loss = forward(inputs, watch)
            gc.collect()
            saved = watch.alive_bytes
            watch.mark()
            loss.backward()
    trained = [name for name, param in model.named_parameters() if param.grad is not None]
    assert len(trained) == 2 * len(TARGETS) * layers, f"{len(trained)} weights got a gradient"
    assert all("lora_" in name for name in trained), "a frozen weight got a gradient"
    figures = (watch.flops, saved, tuple(watch.peaks_bytes), watch.operations, watch.kernels, watch.names)
    return Counts(contender, form, checkpointing, tokens, examples, *figures)


Forward = Callable[[list[Tensor], Watch], Tensor]  # inputs -> loss
Step = tuple[Any, Forward, list[Tensor]]  # the model, its forward, inputs of the right shapes


def base_model(layers: int) -> Any:
    """A model of SHAPE in bf16 on the meta device, where weights need no memory and layers can be replaced."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(**SHAPE | {"num_hidden_layers": layers})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.train()


def minilora_step(model: Any, length: int, examples: int, dropout: float, checkpointing: bool, form: str) -> Step:
    """The micro-batch of minilora, as `minilora.loop.gradients` runs it. Examples share no prefix."""
    lora.inject(model, TARGETS, RANK, ALPHA, dropout)
    batch = collate([example(length)] * examples)
    # random numbers have no state here, so none is preserved
    run_layer = recomputed(preserve_rng_state=False) if checkpointing else once

    def forward(inputs: list[Tensor], watch: Watch) -> Tensor:
        fake = Batch(*inputs[:2], batch.layout, *inputs[2:])
        family, policy = family_of(model.config), policy_as_on(form)
        decoder = MarkedDecoder(model, family, policy, run_layer, dtype=torch.bfloat16, watch=watch)
        return SFT().loss(decoder, fake) / len(fake.targets)

    return model, forward, [batch.input_ids, batch.position_ids, batch.rows, batch.targets]


def peft_step(model: Any, length: int, examples: int, dropout: float, checkpointing: bool, form: str) -> Step:
    """peft's layers and Hugging Face's loss, as a Trainer runs them, with all logits of (examples, length) at once."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=dropout, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    ids = torch.zeros(examples, length, dtype=torch.int64)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": False})

    def forward(inputs: list[Tensor], watch: Watch) -> Tensor:
        first = model.get_decoder().layers[0]  # its backward pass is a phase whose peak does not grow with the layers
        first.register_forward_hook(lambda _, __, output: output.register_hook(lambda _: watch.mark()) and None)
        # Rows of equal length need no mask. transformers cannot see this on fake tensors, and would build a mask.
        no_mask = {"full_attention": None}
        return model(input_ids=inputs[0], attention_mask=no_mask, labels=inputs[1], use_cache=False).loss

    return model, forward, [ids, ids]  # the labels do not change the counts


def example(length: int) -> Example:
    """An example whose second half is supervised."""
    ids = np.zeros(length, np.int32)
    labels = np.where(np.arange(length) < length * (1 - SUPERVISED_SHARE), IGNORE, ids).astype(np.int32)
    return Example(ids, labels)


def table(counts: list[Counts]) -> str:
    """The figures as Markdown."""
    units = "MFLOP/token | saved for backward, KB/token | peak beyond the weights, GiB | operations | not views"
    lines = [f"| step | {units} |", "| --- | --- | --- | --- | --- | --- |"]
    for c in counts:
        name = c.contender + (", as on CUDA" if c.form == "cuda" else "") + ", checkpointing" * c.checkpointing
        lines.append(
            f"| {name} | {c.flops_per_token / 1e6:,.0f} | {c.saved_bytes_per_token / 1e3:,.0f} | "
            f"{c.peak_bytes / 2**30:.2f} | {c.operations:,} | {c.kernels:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table of all contenders, with and without checkpointing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=DROPOUT)
    parser.add_argument("--layers", type=int, default=24)
    args = parser.parse_args()
    size = {"tokens": args.tokens, "examples": args.examples, "dropout": args.dropout, "layers": args.layers}
    kinds = (("minilora", "cuda"), ("minilora", "cpu"), ("peft", "cpu"))
    counts = [
        whole(name, form=form, checkpointing=checkpointing, **size)
        for name, form in kinds
        for checkpointing in (False, True)
    ]
    print(f"{args.tokens:,} tokens in {args.examples} examples, half supervised, dropout {args.dropout}, ", end="")
    print(f"torch {torch.__version__}\n\n{table(counts)}\n")
    formula = formula_flops_per_token(args.tokens // args.examples, args.layers) / 1e6
    print(f"formula: {formula:,.0f} MFLOP/token")
    often = sorted(counts[0].names.items(), key=lambda item: -item[1])[:12]
    print("most frequent operations of the first row: " + ", ".join(f"{name} {number:,}" for name, number in often))


if __name__ == "__main__":
    main()
