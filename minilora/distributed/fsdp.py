"""Shards a base with FSDP2: each process holds a part of each layer, and the whole layer is gathered for use."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard, distribute_tensor

from minilora.distributed.world import World
from minilora.utils.device import map_large_blocks

T = TypeVar("T")
CALL = "call_gathered"  # the method of a sharded module that runs a function while its parameters are gathered


def shard(model: Any, world: World, device: torch.device, dtype: torch.dtype) -> None:
    """Shard a model that is whole on the CPU: this process keeps its part on its device.

    If the base is frozen, only the decoder layers are sharded. Every process holds the whole adapters, embedding, last
    norm and head, because each micro-batch needs these from its beginning to its end.
    If every weight is trained, everything is sharded, together with its gradient and its moments. Layers are gathered
    in `dtype`, and their gradients are added up in fp32.
    After this call, all processes must run each micro-batch together.
    """
    map_large_blocks(device)  # gathered layers are allocated and freed all the time
    decoder, mesh = model.get_decoder(), world.mesh(device.type)
    adapters = {param for param in model.parameters() if param.requires_grad}
    if all_trained(model):
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for layer in decoder.layers:
            _add_up(fully_shard(layer, mesh=mesh, mp_policy=policy))
        _add_up(fully_shard(decoder, mesh=mesh, reshard_after_forward=True))
        head = model.get_output_embeddings()
        if model.config.tie_word_embeddings:
            head.weight = decoder.embed_tokens.weight
        else:
            whole = head.weight.detach().to(device)
            head.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None))
    else:
        for layer in decoder.layers:
            fully_shard(layer, mesh=mesh, ignored_params=adapters)
        outside = set(model.parameters()) - {param for layer in decoder.layers for param in layer.parameters()}
        fully_shard(decoder, mesh=mesh, ignored_params=outside | adapters)  # it has no shards; it orders the gathering
        for param in outside:
            param.data = param.data.to(device, copy=True)  # a copy, so that the file of the base can leave memory
    for module in (decoder, *decoder.layers):
        setattr(module, CALL, _call)
        register_fsdp_forward_method(module, CALL)
    nn.Module.to(model, device)  # moves the remaining whole tensors
    world.sharded = True


def call_gathered(module: Any, function: Callable[..., T], *inputs: Any) -> T:
    """function(*inputs), while the parameters of a sharded module are gathered; for a whole module only the call."""
    run: Callable[..., T] = getattr(module, CALL, _call)
    return run(function, *inputs)


def _call(function: Callable[..., T], *inputs: Any) -> T:
    return function(*inputs)


def all_trained(model: nn.Module) -> bool:
    """Whether every weight is trained."""
    return all(param.requires_grad for param in model.parameters())


def _add_up(module: Any) -> None:
    """Make gradients sums over the processes, not means: the loss is already divided by the tokens of the step."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
