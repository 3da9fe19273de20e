"""Token ids -> hidden states of a packed batch; the lean forms of norm, MLP and attention."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora import attention
from minilora.attention import packed_attention
from minilora.batching import Batch
from minilora.distributed.world import gathered
from minilora.kernels import Policy, _RMSNorm, _Rotary, _SwiGLU, compiled, eager
from minilora.lora import project

ATTENTIONS = ("Qwen2Attention", "Qwen3Attention", "LlamaAttention")
NORMS = ("Qwen2RMSNorm", "Qwen3RMSNorm", "LlamaRMSNorm")
MLPS = ("Qwen2MLP", "Qwen3MLP", "LlamaMLP")


@contextmanager
def packed(model: Any) -> Iterator[None]:
    """Inside, attention is that of packed examples without a mask; outside it is transformers' own."""
    before = model.config._attn_implementation
    model.set_attn_implementation(attention.PACKED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        attention.forget_layouts()


def hidden_states(model: Any, batch: Batch, noise_alpha: float = 0.0) -> Tensor:
    """Final hidden states at the supervised positions of a packed batch. (S, hidden)

    noise_alpha: of NEFTune, in training; 0: no noise
    """
    if noise_alpha:
        embedded = model.get_input_embeddings()(batch.input_ids)
        inputs = {"inputs_embeds": embedded + embedding_noise(embedded, batch.layout, noise_alpha)}
    else:
        inputs = {"input_ids": batch.input_ids}
    output = model.get_decoder()(**inputs, position_ids=batch.position_ids, layout=batch.layout, use_cache=False)
    return output.last_hidden_state[0].index_select(0, batch.rows)


def embedding_noise(embedded: Tensor, layout: attention.Layout, alpha: float) -> Tensor:
    """NEFTune's noise (arXiv:2310.05914): uniform within alpha / sqrt(L * hidden), L the input tokens of each example.

    embedded: (1, T, hidden) -> (1, T, hidden) of its dtype, drawn from the current seed. A shared prefix stands there
    once, so its examples share one draw, of the mean of the variances that each would have given it.
    """
    inverse = 1 / (layout.prefix + np.array(layout.lengths))  # 1 / L of each example
    own = np.repeat(inverse, layout.lengths)
    inverse = np.concatenate([np.full(layout.prefix, inverse.mean()), own, np.zeros(layout.padding)])  # (T,)
    most = torch.tensor(alpha * np.sqrt(inverse / embedded.shape[-1]), dtype=torch.float32, device=embedded.device)
    noise = torch.empty(embedded.shape, dtype=torch.float32, device=embedded.device).uniform_(-1, 1)
    return noise.mul_(most[:, None]).to(embedded.dtype)


def head_weight(model: Any) -> Tensor:
    """The output head's weight, whole; for tied models it is the embedding. (vocabulary, hidden)"""
    return gathered(model.get_output_embeddings().weight)


def speed_up(model: nn.Module, torch_compile: bool = False) -> None:
    """Replace the forward of every module that is known here by one that saves less; others keep their own.

    torch_compile: run their elementwise chains as kernels of torch.compile
    """
    wrap = compiled if torch_compile else eager
    for module in model.modules():
        kind = type(module).__name__
        if kind in NORMS:
            module.forward = MethodType(_norm_forward, module)
        elif kind in MLPS and _is_silu(module.act_fn):
            module.forward = MethodType(_mlp_forward, module)
        elif kind in ATTENTIONS:
            module.forward = MethodType(_attention_forward, module)
        else:
            continue
        module.wrap = wrap  # type: ignore[assignment]  # no parameter and no module, but nn.Module takes it


def _is_silu(function: Any) -> bool:
    probe = torch.linspace(-4, 4, 9)
    return bool(torch.equal(function(probe), F.silu(probe)))


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, self.wrap)


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    gate, up = project(x, (self.gate_proj, self.up_proj), Policy(x.device.type))
    return self.down_proj(_SwiGLU.apply(gate, up, self.wrap))


def _attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attention in packed training; every other call goes to the class's own forward."""
    if "layout" not in kwargs:
        return type(self).forward(
            self, hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs
        )
    tokens = hidden_states.shape[1]
    shape = (1, tokens, -1, self.head_dim)
    policy = Policy(hidden_states.device.type)
    projections = project(hidden_states, (self.q_proj, self.k_proj, self.v_proj), policy)
    query, key, value = (projection.view(shape) for projection in projections)
    if hasattr(self, "q_norm"):
        query, key = self.q_norm(query), self.k_norm(key)
    cos, sin = position_embeddings
    query, key = (_Rotary.apply(rotated, cos, sin, self.wrap) for rotated in (query, key))
    query, key = query.to(value.dtype), key.to(value.dtype)  # norms whose weights are in fp32 widen them
    out, _ = packed_attention(
        self,
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None,
        scaling=self.scaling,
        layout=kwargs["layout"],
    )
    return self.o_proj(out.reshape(1, tokens, -1)), None
