"""A counter of the memory and the FLOPs of each operation of a step, on fake tensors.

Fake tensors of torch have shapes but no numbers. A step of any model runs in seconds, needs no memory and gives the
same figures on every machine. Memory that a kernel allocates and frees before it returns is not counted.
"""

import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora.kernels import Policy

FORWARD_ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")
BACKWARD_ATTENTION = tuple(f"{name}_backward" for name in FORWARD_ATTENTION)
VARLEN = {"_varlen_attn": 2, "_varlen_attn_backward": 5}  # the number of matrix products of each


class Watch(TorchDispatchMode):
    """Counts dispatched operations and FLOPs, and tracks each storage from its allocation until it is freed.

    There is one peak for each interval between two calls of `mark`. Tensors in `left_out` are not counted.
    """

    def __init__(self, left_out: list[Tensor]) -> None:
        super().__init__()
        self.operations = self.kernels = self.flops = self.alive_bytes = 0
        self.peaks_bytes = [0]
        self.names: Counter[str] = Counter()  # operation -> number of calls
        self._known = {tensor.untyped_storage()._cdata for tensor in left_out}

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once since the start."""
        return max(self.peaks_bytes)

    def mark(self) -> None:
        """Begin the next interval of `peaks_bytes`."""
        self.peaks_bytes.append(self.alive_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not outputs:  # a query of a device or a dtype; with real tensors it is no operation
            return out
        self.operations += 1
        self.names[func.overloadpacket.__name__] += 1
        self.kernels += not func.is_view
        self.flops += flops_of(func, args)
        for tensor in outputs:
            self._track(tensor.untyped_storage())
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive_bytes += size
        self.peaks_bytes[-1] = max(self.peaks_bytes[-1], self.alive_bytes)
        weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive_bytes -= size


def flops_of(func: Any, args: Any) -> int:
    """The FLOPs of one operation: 2 for each multiply-add of a matrix product, 0 for every other operation.

    Causal attention counts only the half of the scores that its kernels compute (FlopCounterMode of torch counts all):
    two products forward, and five backward, because the scores are recomputed. Packed examples count as equally long,
    because fake tensors do not hold their boundaries.
    """
    name = func.overloadpacket.__name__.removesuffix("_")
    shapes = [arg.shape for arg in args if isinstance(arg, Tensor)]
    causal = any(arg is True for arg in args)
    if name in ("mm", "bmm"):
        return 2 * shapes[0].numel() * shapes[1][-1]
    if name in ("addmm", "baddbmm"):
        return 2 * shapes[1].numel() * shapes[2][-1]
    if name in FORWARD_ATTENTION:  # query, key: (batch, heads, length, head_dim)
        return 2 * 2 * shapes[0].numel() * shapes[1][-2] // (1 + causal)
    if name in BACKWARD_ATTENTION:  # d out, query, key
        return 5 * 2 * shapes[1].numel() * shapes[2][-2] // (1 + causal)
    if name in VARLEN:  # query (forward), d out (backward): (T, heads, head_dim); then max_q, max_k
        products, longest = VARLEN[name], next(arg for arg in args if isinstance(arg, int))
        return products * 2 * shapes[0].numel() * longest // (1 + causal)
    return 0


def to_fake(model: nn.Module) -> None:
    """Replace every parameter and buffer by a fake one on the CPU; shared tensors stay shared."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is None:
                    continue
                fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                if isinstance(tensor, nn.Parameter):
                    fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                setattr(module, name, fakes.setdefault(id(tensor), fake))


def policy_as_on(device_type: str) -> Policy:
    """The policy under which fake tensors on the CPU run the code that real tensors run on `device_type`: cpu or cuda.

    Fake CUDA tensors need a CUDA build of torch. On the CPU only dropout differs from a real step: the number of
    dropped elements is the expected number, not a random one.
    """
    return Policy(device_type, draw=expected_positions if device_type == "cpu" else dropped_mask)


@contextmanager
def autograd_unchanged() -> Iterator[None]:
    """Inside, an error that is kept does not change later backward passes.

    In torch 2.11 the saved-tensor hooks of a failed checkpoint stay active as long as its frame lives.
    """
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


def expected_positions(x: Tensor, dropout: float) -> Tensor:
    """The dropped positions as on the CPU: the expected number of them."""
    return torch.empty(round(x.numel() * dropout), dtype=torch.int64)


def dropped_mask(x: Tensor, dropout: float) -> Tensor:
    """The dropped elements as on CUDA: a mask with the shape of x."""
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(dropout)
