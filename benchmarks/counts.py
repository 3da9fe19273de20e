"""One training step of Qwen2-0.5B's shape on fake tensors: figures that no noisy machine can blur.

    python -m benchmarks.counts --tokens 4096 --examples 8

Forward, loss and backward of one micro-batch run under torch's FakeTensorMode, which knows shapes but holds no numbers:
seconds, no weights, no memory, the same result everywhere. Counted are the operations torch dispatches, the FLOPs of
the matrix products and of attention among them, and the storages that are alive. What a kernel allocates for itself
and gives back before it returns is not seen.
"""

import argparse
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora import attention, fast, lora
from minilora.batching import Batch, collate
from minilora.data import IGNORE, Example
from minilora.loss import token_loss
from minilora.model import head_weight, hidden_states, packed

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

FORWARD_ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")
BACKWARD_ATTENTION = tuple(f"{name}_backward" for name in FORWARD_ATTENTION)


@dataclass(frozen=True)
class Counts:
    """What one micro-batch costs; tokens are those of the examples, the last of each included."""

    contender: str
    form: str
    checkpointing: bool
    tokens: int
    examples: int
    flops: int
    saved_bytes: int  # alive between forward and backward, beyond the weights and the batch
    peak_bytes: int  # most alive at once, beyond the weights and the batch
    operations: int  # dispatched, views included
    kernels: int  # those that are no views

    @property
    def flops_per_token(self) -> float:
        """FLOPs of matrix products and attention, per token."""
        return self.flops / self.tokens

    @property
    def saved_bytes_per_token(self) -> float:
        """Bytes kept for backward, per token."""
        return self.saved_bytes / self.tokens


class Watch(TorchDispatchMode):
    """Counts dispatched operations and FLOPs, and follows the storages that operations make until they are gone."""

    def __init__(self, left_out: list[Tensor]) -> None:
        super().__init__()
        self.operations = self.kernels = self.flops = self.alive_bytes = self.peak_bytes = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in left_out}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not made:  # a question about device or dtype: real tensors answer it without a dispatch
            return out
        self.operations += 1
        self.kernels += not func.is_view
        self.flops += flops_of(func, args)
        for tensor in made:
            self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
        weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive_bytes -= size


def flops_of(func: Any, args: Any) -> int:
    """FLOPs of one operation, 2 for a multiplication with its addition; 0 for all that are no products.

    Attention counts as the full square, the convention of torch's FlopCounterMode: kernels that skip what is masked do
    about half of it.
    """
    name = func.overloadpacket.__name__.removesuffix("_")
    shapes = [arg.shape for arg in args[:4] if isinstance(arg, Tensor)]
    if name in ("mm", "bmm"):
        return 2 * shapes[0].numel() * shapes[1][-1]
    if name in ("addmm", "baddbmm"):
        return 2 * shapes[1].numel() * shapes[2][-1]
    if name in FORWARD_ATTENTION:  # query, key: (batch, heads, length, head_dim)
        return 4 * shapes[0].numel() * shapes[1][-2]  # scores; their product with the values
    if name in BACKWARD_ATTENTION:  # of out, query, key
        return 10 * shapes[1].numel() * shapes[2][-2]  # scores again, d value, d probabilities, d query, d key
    return 0


def formula_flops_per_token(tokens_per_example: int, layers: int = 24) -> float:
    """DESIGN section 5: body forward and d input, head on supervised rows only, attention; no d weight, no LoRA.

    Attention: 2 products forward, 5 backward (scores are computed again), over the tokens that are seen.
    """
    hidden = SHAPE["hidden_size"]
    kv = hidden * SHAPE["num_key_value_heads"] // SHAPE["num_attention_heads"]
    body = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * SHAPE["intermediate_size"])
    head = hidden * SHAPE["vocab_size"]
    seen = 7 * 2 * hidden * layers * (tokens_per_example / 2)
    return 4 * body + 4 * head * SUPERVISED_SHARE + seen


def count(
    contender: str,
    tokens: int = 4096,
    examples: int = 8,
    checkpointing: bool = False,
    dropout: float = DROPOUT,
    form: str = "cpu",
    layers: int = 24,
) -> Counts:
    """The figures of one micro-batch of `examples` equal examples, `tokens` in all, half of them supervised.

    form: cpu, or cuda for minilora as it runs there (peft is counted on the CPU, where its dropout keeps fp32 noise)
    layers: fewer than the model's 24 are quicker to count; every layer but the first costs the same.
    Raises ValueError for a contender that is none of CONTENDERS and for a form that is not there.
    """
    if contender not in CONTENDERS:
        raise ValueError(f"{contender!r} is none of {', '.join(CONTENDERS)}")
    if form not in (("cpu", "cuda") if contender == "minilora" else ("cpu",)):
        raise ValueError(f"{contender} has no form {form!r}")
    length = tokens // examples
    step = minilora_step if contender == "minilora" else peft_step
    model, forward, inputs = step(base_model(layers), length, examples, dropout)
    with FakeTensorMode(), ExitStack() as held:
        held.enter_context(patched(lora, draw_dropped=dropped_mask))
        if form == "cuda":
            held.enter_context(patched(fast, CPU_ROWS=tokens, packed_attention=one_attention(length - 1)))
        to_fake(model)
        inputs = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in inputs]
        if checkpointing:  # random numbers have no state here, so there is none to bring back
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        held.enter_context(packed(model) if contender == "minilora" else nullcontext())
        watch = held.enter_context(Watch([*model.parameters(), *model.buffers(), *inputs]))
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(inputs)
        gc.collect()
        saved = watch.alive_bytes
        loss.backward()
    trained = [name for name, param in model.named_parameters() if param.grad is not None]
    assert len(trained) == 2 * len(TARGETS) * layers, f"{len(trained)} weights got a gradient"
    assert all("lora_" in name for name in trained), "a frozen weight got a gradient"
    how = (watch.flops, saved, watch.peak_bytes, watch.operations, watch.kernels)
    return Counts(contender, form, checkpointing, tokens, examples, *how)


Forward = Callable[[list[Tensor]], Tensor]  # inputs -> loss
Step = tuple[Any, Forward, list[Tensor]]  # the model, its forward, inputs of the right shapes


def base_model(layers: int) -> Any:
    """A model of SHAPE in bf16 on the meta device, where weights take no memory and layers can be exchanged."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(**SHAPE | {"num_hidden_layers": layers})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.train()


def to_fake(model: nn.Module) -> None:
    """Exchange every parameter and buffer for a fake one on the CPU, the shared ones for a shared one."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                if isinstance(tensor, nn.Parameter):
                    fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                tensors[name] = fakes.setdefault(id(tensor), fake)


def minilora_step(model: Any, length: int, examples: int, dropout: float) -> Step:
    """minilora's micro-batch, as `minilora.loop.gradients` runs it; no two examples share a prefix."""
    attention.register()
    lora.inject(model, TARGETS, RANK, ALPHA, dropout)
    fast.speed_up(model)
    batch = collate([example(length)] * examples)

    def forward(inputs: list[Tensor]) -> Tensor:
        fake = Batch(*inputs[:2], batch.layout, *inputs[2:])
        return token_loss(hidden_states(model, fake), head_weight(model), fake.targets) / len(fake.targets)

    return model, forward, [batch.input_ids, batch.position_ids, batch.rows, batch.targets]


def peft_step(model: Any, length: int, examples: int, dropout: float) -> Step:
    """peft's layers and Hugging Face's own loss, as a Trainer runs them: all logits, (examples, length) at once."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=dropout, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    ids = torch.zeros(examples, length, dtype=torch.int64)

    def forward(inputs: list[Tensor]) -> Tensor:
        # Rows of one length need no mask; on fake tensors transformers cannot see that, and would build one.
        no_mask = {"full_attention": None}
        return model(input_ids=inputs[0], attention_mask=no_mask, labels=inputs[1], use_cache=False).loss

    return model, forward, [ids, ids]  # which labels are supervised changes nothing here


def example(length: int) -> Example:
    """An example whose second half is supervised."""
    ids = np.zeros(length, np.int32)
    labels = np.where(np.arange(length) < length * (1 - SUPERVISED_SHARE), IGNORE, ids).astype(np.int32)
    return Example(ids, labels)


def dropped_mask(x: Tensor, dropout: float) -> Tensor:
    """minilora's dropout as it is drawn on CUDA, a mask of x's shape, for the CPU's form too.

    On the CPU it draws the positions that are dropped; how many depends on what is drawn, and fake tensors hold no
    numbers. A mask takes a byte for every element, the positions 8 bytes for every dropped one: at 5 % dropout the
    CPU's true figure is lower by 0.6 bytes an element, 51 KB a token for q, k, v and o of all layers.
    """
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(dropout)


def one_attention(length: int) -> Callable[..., tuple[Tensor, None]]:
    """A stand-in for minilora's attention on CUDA, one FlashAttention call for all examples.

    torch.nn.attention.varlen takes CUDA tensors only, and those cannot even be faked without a CUDA build. All examples
    have the same length here, so SDPA over them as a batch does the same work and saves the same.
    """

    def attend(_: Any, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> tuple[Tensor, None]:
        q, k, v = (x[0].unflatten(1, (-1, length)).transpose(0, 1) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (examples, heads, length, dim)
        return out.transpose(1, 2).flatten(0, 1)[None], None

    return attend


@contextmanager
def patched(module: Any, **values: Any) -> Iterator[None]:
    """Inside, the module's names have these values."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


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
    counts = [count(name, form=form, checkpointing=again, **size) for name, form in kinds for again in (False, True)]
    print(f"{args.tokens:,} tokens in {args.examples} examples, half supervised, dropout {args.dropout}, ", end="")
    print(f"torch {torch.__version__}\n\n{table(counts)}\n")
    formula = formula_flops_per_token(args.tokens // args.examples, args.layers) / 1e6
    print(f"formula (DESIGN 5): {formula:,.0f} MFLOP/token")


if __name__ == "__main__":
    main()
