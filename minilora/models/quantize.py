"""Quantises the linear layers of a base to 4 or 8 bits with bitsandbytes, for low-rank adapters on top.

4 bits: nf4 with double quantisation (QLoRA, arXiv:2305.14314). 8 bits: LLM.int8 (arXiv:2208.07339). Embeddings, norms
and the output head are not quantised. The layers of bitsandbytes compute the products and the gradient of their input.
"""

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError, first_line

OUTLIERS = 6.0  # LLM.int8 multiplies inputs beyond this in 16 bits (section 3.2 of the paper)
INSTALL = "pip install bitsandbytes"


def library(device: torch.device) -> Any:
    """Import bitsandbytes and quantise a small weight on this device. Raises ConfigError of one line if this fails."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every 8-bit product
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ConfigError(f"load_in_4bit and load_in_8bit need bitsandbytes ({error}): {INSTALL}") from error
    try:
        held(bnb, nn.Linear(64, 64, bias=False), 4, device)
    except Exception as error:  # without CUDA the library fails only on use, with many kinds of error
        raise ConfigError(
            f"bitsandbytes {bnb.__version__} does not work on {device}: {first_line(error)}. {INSTALL} --upgrade, or "
            "do not use load_in_4bit and load_in_8bit."
        ) from error
    return bnb


def quantise(model: Any, bits: int, device: torch.device) -> None:
    """Quantise the linear layers of a loaded model to 4 or 8 bits on a device, one by one, except the output head."""
    bnb = library(device)
    head = model.get_output_embeddings()
    linears = [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Linear and layer is not head]
    for name, layer in linears:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, held(bnb, layer, bits, device))


def held(bnb: Any, layer: nn.Linear, bits: int, device: torch.device) -> nn.Module:
    """The quantised form of a linear layer, on a device. It computes in the dtype of the given layer."""
    shape = (layer.in_features, layer.out_features, layer.bias is not None)
    if bits == 4:
        settings = {"compress_statistics": True, "quant_type": "nf4"}
        new = bnb.nn.Linear4bit(*shape, compute_dtype=layer.weight.dtype, device="meta", **settings)
        new.weight = bnb.nn.Params4bit(layer.weight.detach(), requires_grad=False, module=new, **settings)
    else:
        new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=OUTLIERS, device="meta")
        new.weight = bnb.nn.Int8Params(layer.weight.detach(), requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    new.support_avx512bf16_for_cpu = False  # the packed weight of that form has no backward pass
    return new.to(device)


def num_elements(param: Tensor) -> int:
    """The number of elements of a parameter before quantisation. A 4-bit parameter stores two of them in a byte."""
    state = getattr(param, "quant_state", None)
    return param.numel() if state is None else math.prod(state.shape)
