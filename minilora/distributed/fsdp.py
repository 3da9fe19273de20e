"""A base that no one device holds: every process has a part of each layer and gathers it for use (FSDP2)."""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from minilora.distributed.world import World
from minilora.utils.device import map_large_blocks


def shard(model: Any, world: World, device: torch.device, dtype: torch.dtype) -> None:
    """Leave this process its part of a model, which lies whole on the CPU, on its device.

    A frozen base: the decoder's layers are sharded; adapters are whole everywhere, and so are embedding, last norm and
    head, which each micro-batch needs from its beginning to its end. Where every weight is trained, everything is
    sharded, with its gradient and its moments; layers are gathered in `dtype`, their gradients added up in fp32.
    From now on the processes go through each micro-batch together.
    """
    map_large_blocks(device)  # gathered layers come and go
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
        fully_shard(decoder, mesh=mesh, ignored_params=outside | adapters)  # holds no shards: it orders the gathering
        for param in outside:
            param.data = param.data.to(device, copy=True)  # nothing keeps the file of the base in memory any more
    nn.Module.to(model, device)  # what else is whole
    world.sharded = True


def all_trained(model: nn.Module) -> bool:
    """Whether every weight is trained."""
    return all(param.requires_grad for param in model.parameters())


def _add_up(module: Any) -> None:
    """Gradients are sums over the processes: the step's loss is already divided by its tokens."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
