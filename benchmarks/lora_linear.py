"""Measures one LoRA layer, forward and backward: the plain formula, minilora's own function, and peft's layer.

    python -m benchmarks.lora_linear --tokens 1024 --threads 2

The sizes are those of Qwen2-0.5B. All run under bf16 autocast on a bf16 base, as in training. x needs a gradient. The
saved memory is that of the distinct storages that autograd keeps for backward, with x and without the weights.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minilora.lora import LoRALinear, lora_linear, plain_lora_linear

RANK, ALPHA = 8, 32
SIZES = {"q_proj": (896, 896), "down_proj": (4864, 896)}  # in, out
Layer = Callable[[Tensor], Tensor]


def layers(base: nn.Linear, dropout: float) -> dict[str, tuple[Layer, list[nn.Parameter]]]:
    """The layer of each contender on the same base, with its trained parameters."""
    own = LoRALinear(base, RANK, ALPHA, dropout)
    nn.init.normal_(own.lora_B)
    given = (base.weight, base.bias, own.lora_A, own.lora_B, own.scale, dropout)
    trained = [own.lora_A, own.lora_B]
    return {
        "plain formula": (lambda x: plain_lora_linear(x, *given), trained),
        "minilora": (lambda x: lora_linear(x, *given), trained),
        "peft": peft_layer(base, dropout),
    }


def peft_layer(base: nn.Linear, dropout: float) -> tuple[Layer, list[nn.Parameter]]:
    """peft's layer, with A and B in fp32 as in get_peft_model."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=["linear"])
    layer = inject_adapter_in_model(config, nn.ModuleDict({"linear": base}))["linear"]
    trained = [param for name, param in layer.named_parameters() if "lora_" in name]
    for param in trained:
        param.data = param.data.float()
    return layer, trained


def step(layer: Layer, x: Tensor, dy: Tensor) -> None:
    """Forward and backward."""
    with torch.autocast(x.device.type, torch.bfloat16):
        y = layer(x)
    y.backward(dy)


def milliseconds(layer: Layer, trained: list[nn.Parameter], x: Tensor, dy: Tensor, repeat: int) -> list[float]:
    """The times of forward and backward, without the first three calls."""
    times = []
    for _ in range(repeat + 3):
        for tensor in (x, *trained):
            tensor.grad = None
        began = now(x.device)
        step(layer, x, dy)
        times.append(1e3 * (now(x.device) - began))
    return times[3:]


def now(device: torch.device) -> float:
    """The time in seconds, after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def saved_bytes(layer: Layer, weights: list[Tensor], x: Tensor) -> int:
    """The bytes of the distinct storages kept for backward, without those of the weights."""
    weight_storages = {weight.untyped_storage()._cdata for weight in weights}
    kept: dict[int, Tensor] = {}  # keeps the tensors, so that no storage's address is reused

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(x.device.type, torch.bfloat16),
    ):
        y = layer(x)
    own = [tensor for key, tensor in kept.items() if key not in weight_storages]
    del y
    return sum(tensor.untyped_storage().nbytes() for tensor in own)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.tokens:,} tokens, rank {RANK}, forward and backward, {name}, torch {torch.__version__}\n")
    print("| layer | dropout | contender | ms, median (min - max) | saved, KB/token |\n| --- | --- | --- | --- | --- |")
    for label, (inputs, outputs) in SIZES.items():
        x = torch.randn(args.tokens, inputs, device=device, dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn(args.tokens, outputs, device=device, dtype=torch.bfloat16)
        for dropout in (0.05, 0.0):
            base = nn.Linear(inputs, outputs, device=device, dtype=torch.bfloat16).requires_grad_(False)
            for contender, (layer, trained) in layers(base, dropout).items():
                times = milliseconds(layer, trained, x, dy, args.repeat)
                kilobytes = saved_bytes(layer, [*base.parameters(), *trained], x) / args.tokens / 1e3
                spread = f"{statistics.median(times):.2f} ({min(times):.2f} - {max(times):.2f})"
                print(
                    f"| {label} {inputs}x{outputs} | {dropout} | {contender} | {spread} | {kilobytes:.2f} |", flush=True
                )


if __name__ == "__main__":
    main()
