"""The decoder of Qwen and its relatives, written out: token ids -> hidden states of the supervised rows.

The modules of transformers only hold the weights. No forward of theirs is replaced, and none is called except those of
the embedding and of the table of rotary angles. What differs between models is a row of `models/families.py`.
Shapes: T = tokens of a micro-batch, heads = query heads, kv_heads = key and value heads, S = supervised rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minilora.attention import Layout, Placement, packed_attention
from minilora.batching import ROWS_MULTIPLE, Batch
from minilora.distributed.fsdp import call_gathered
from minilora.distributed.world import gathered
from minilora.kernels import Policy
from minilora.lora import linear, project

RunLayer = Callable[..., Tensor]  # (layer function, its arguments) -> its result


@dataclass(frozen=True)
class Family:
    """What distinguishes the models of one model_type from the others.

    qk_norm: each head of q and k goes through an RMSNorm before the rotary embedding
    """

    qk_norm: bool = False


def once(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Run a layer; autograd keeps what its backward pass needs."""
    return function(*inputs)


def recomputed(preserve_rng_state: bool = True) -> RunLayer:
    """A function that runs a layer, keeps only its input, and runs it again in the backward pass (arXiv:1604.06174).

    preserve_rng_state: with the same random numbers
    """
    return partial(checkpoint, use_reentrant=False, preserve_rng_state=preserve_rng_state)


@dataclass
class Decoder:
    """The training forward of a model: `decoder(batch)` gives the hidden states of the supervised rows.

    model: the causal language model of transformers that holds the weights
    policy: how its kernels run
    run_layer: `once`, or `recomputed()` for activation checkpointing
    noise_alpha: of NEFTune, in training; 0: no noise
    dtype: of the matrix products. Where the weights are narrower, they are converted product by product.
    """

    model: Any
    family: Family
    policy: Policy
    run_layer: RunLayer = once
    noise_alpha: float = 0.0
    dtype: torch.dtype = torch.bfloat16

    def __call__(self, batch: Batch) -> Tensor:
        """Final hidden states at the supervised positions of a packed batch. (S, hidden)"""
        hidden = call_gathered(self.model.get_decoder(), self._hidden_states, batch)  # (S', hidden)
        return hidden[: len(batch.rows)]  # outside: FSDP2 warns of a view that a sharded module returns

    @property
    def head_weight(self) -> Tensor:
        """The output head's weight, whole; for tied models it is the embedding. (vocabulary, hidden)"""
        return gathered(self.model.get_output_embeddings().weight)

    def _hidden_states(self, batch: Batch) -> Tensor:
        body = self.model.get_decoder()
        hidden = body.embed_tokens(batch.input_ids[0])  # (T, hidden)
        hidden = hidden.to(torch.promote_types(hidden.dtype, self.dtype))
        if self.noise_alpha and self.model.training:
            hidden = hidden + embedding_noise(hidden, batch.layout, self.noise_alpha)
        cos, sin = (table[0] for table in body.rotary_emb(hidden, batch.position_ids))  # (T, head_dim), both
        place = Placement(batch.layout, hidden.device)
        rows = F.pad(batch.rows, (0, -len(batch.rows) % ROWS_MULTIPLE))  # (S',): products like multiples of 8
        for layer in body.layers:
            kept = rows if layer is body.layers[-1] else None  # nothing reads the other rows of the last layer
            hidden = self.run_layer(call_gathered, layer, self.layer, layer, hidden, cos, sin, place, kept)
        return self.norm(body.norm, hidden)  # (S', hidden)

    def layer(
        self, layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, place: Placement, kept: Tensor | None
    ) -> Tensor:
        """One decoder layer. (T, hidden) -> (T, hidden), or (S', hidden) where `kept` names the rows that are read"""
        attended = self.attention(layer.self_attn, self.norm(layer.input_layernorm, hidden), cos, sin, place)
        if kept is not None:
            attended, hidden = attended.index_select(0, kept), hidden.index_select(0, kept)
        hidden = hidden + linear(attended, layer.self_attn.o_proj, self.policy)
        gate, up = project(  # (T, ffn), both
            self.norm(layer.post_attention_layernorm, hidden), (layer.mlp.gate_proj, layer.mlp.up_proj), self.policy
        )
        return hidden + linear(self.policy.swiglu(gate, up), layer.mlp.down_proj, self.policy)

    def attention(self, attn: Any, x: Tensor, cos: Tensor, sin: Tensor, place: Placement) -> Tensor:
        """Causal attention without its output projection. (T, hidden) -> (T, heads * head_dim)"""
        projections = project(x, (attn.q_proj, attn.k_proj, attn.v_proj), self.policy)
        query, key, value = (y.unflatten(-1, (-1, attn.head_dim)) for y in projections)  # (T, heads, head_dim)
        if self.family.qk_norm:
            query, key = self.norm(attn.q_norm, query), self.norm(attn.k_norm, key)
        query, key = (self.policy.rotate(rotated, cos, sin).to(value.dtype) for rotated in (query, key))
        return packed_attention(query, key, value, place, attn.scaling, self.policy.device_type).flatten(1)

    def norm(self, norm: Any, x: Tensor) -> Tensor:
        """RMSNorm with the weight of a module. (..., hidden) -> (..., hidden)"""
        return self.policy.rms_norm(x, norm.weight, norm.variance_epsilon)


def embedding_noise(embedded: Tensor, layout: Layout, alpha: float) -> Tensor:
    """NEFTune's noise (arXiv:2310.05914): uniform within alpha / sqrt(L * hidden), L the input tokens of each example.

    embedded: (T, hidden) -> (T, hidden) of its dtype, drawn from the current seed. A shared prefix stands there once,
    so its examples share one draw, of the mean of the variances that each would have given it.
    """
    inverse = 1 / (layout.prefix + np.array(layout.lengths))  # 1 / L of each example
    own = np.repeat(inverse, layout.lengths)
    inverse = np.concatenate([np.full(layout.prefix, inverse.mean()), own, np.zeros(layout.padding)])  # (T,)
    most = torch.tensor(alpha * np.sqrt(inverse / embedded.shape[-1]), dtype=torch.float32, device=embedded.device)
    noise = torch.empty(embedded.shape, dtype=torch.float32, device=embedded.device).uniform_(-1, 1)
    return noise.mul_(most[:, None]).to(embedded.dtype)
