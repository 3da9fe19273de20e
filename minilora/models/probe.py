"""Computes the logits of a short fixed prompt, on which two models are compared."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.data.formats import Turn
from minilora.data.markup import ChatMarkup
from minilora.distributed.fsdp import all_trained
from minilora.distributed.world import gathered, local_part


@torch.no_grad()
def logits_of_shards(model: Any, ids: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`probe_logits` of a sharded model whose trained weights are rounded to dtype. Every process must call this.

    (tokens, vocabulary), fp32 on the CPU
    """
    if all_trained(model):
        for param in model.parameters():
            local_part(param).copy_(local_part(param).to(dtype))  # in place, because layers are gathered from these
    model.eval()
    tokens = torch.tensor([list(ids)], device=next(model.parameters()).device)
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[0]
    head = gathered(model.get_output_embeddings().weight)
    return F.linear(hidden, head.to(hidden.dtype)).float().cpu()


@torch.no_grad()
def probe_logits(module: nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """The logits of a short sequence, to compare two models. (tokens, vocabulary), fp32 on the CPU"""
    device = next(module.parameters()).device
    was_training = module.training
    module.eval()
    logits = module(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0].float().cpu()
    module.train(was_training)
    return logits


SAMPLE_PROMPTS = ("你是谁？", "Who made you?", "“大”的反义词是什么？")
PROBE_TOKENS = 32


def probe(tokenizer_markup: ChatMarkup, system_prompt: str) -> list[int]:
    """The tokens on which a saved result is compared with the trained model."""
    return tokenizer_markup.prompt_ids([Turn("user", SAMPLE_PROMPTS[0])], system_prompt)[:PROBE_TOKENS]
