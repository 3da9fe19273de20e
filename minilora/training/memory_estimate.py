"""The prediction of the memory of a run before its start: one optimizer step runs on fake tensors.

The step runs with 3 layers and with 4 layers, which takes a second or less. The first layer differs from the others
(nothing below it needs a gradient), and so does the last (only supervised rows go through all of it). The others are
equal, so each further layer adds as much as the fourth did.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from minilora.batching import Batch, collate, micro_batches, shares_prefix
from minilora.config import TrainConfig
from minilora.data.dataset import Dataset
from minilora.data.sampler import Schedule
from minilora.decoder import Decoder, once, recomputed
from minilora.errors import MiniloraError, first_line
from minilora.models.families import family_of
from minilora.models.load import empty_model, num_layers
from minilora.models.trainable import make_trainable
from minilora.objectives.sft import SFT
from minilora.optim import make_optimizer
from minilora.training.memory_trace import Watch, autograd_unchanged, policy_as_on, to_fake
from minilora.utils.device import autocast, gib

LAYERS = (3, 4)
PHASES = ("forward", "loss", "loss's backward", "backward", "first layer's backward", "update")  # each has its peak
STEPS_SEARCHED = 64  # for the largest micro-batch
GATHERED = 3  # full layers that a process holds: the current one, its receive buffer, and the previous one
USABLE = 0.9  # of the free memory: allocators round sizes up, and kernels need workspace
# On a CPU the resident memory counts. Two measured terms are added to the tensors (test_memory_estimate.py):
CPU_FIRST_USE_BYTES = 60 * 2**20  # code and buffers that kernels load at their first use
CPU_HEAP_SHARE = 0.3  # of a micro-batch's tensors: fragmentation of glibc's heap, which holds blocks below 32 MiB


@dataclass(frozen=True)
class Setup:
    """The settings on which memory depends, apart from the micro-batch. device_type: cpu | cuda."""

    config: TrainConfig
    base_folder: Path
    dtype: torch.dtype  # of the matrix products
    device_type: str
    checkpointing: bool
    shards: int = 1  # number of processes that split the parameters (--fsdp)
    base_dtype: torch.dtype | None = None  # of the base in memory; None: that of the products


@dataclass(frozen=True)
class Memory:
    """Bytes by part. peaks: one for each of PHASES, without the parts that exist during the whole step."""

    weights: float  # method full: the fp32 masters
    adapter: float
    optimizer: float  # AdamW's moments
    gradients: float
    saved: float  # activations kept for the backward pass
    peaks: tuple[float, ...]

    @property
    def beyond(self) -> float:
        """The most bytes of a micro-batch beyond its saved activations: chunks of logits and intermediate tensors."""
        return max(self.peaks) - self.saved

    @property
    def total(self) -> float:
        """The peak of all tensors together, without the memory of interpreter and libraries."""
        return self.weights + self.adapter + self.optimizer + self.gradients + max(self.peaks)

    def peak(self, device_type: str, before: float) -> float:
        """The most bytes in use, `before` of them already now: allocated on a CUDA device, resident on a CPU."""
        slack = CPU_FIRST_USE_BYTES + CPU_HEAP_SHARE * max(self.peaks) if device_type == "cpu" else 0
        return before + self.total + slack


def predict(setup: Setup, batch: Batch) -> Memory:
    """The memory of a step whose largest micro-batch is `batch`."""
    layers = num_layers(setup.base_folder)
    if layers <= LAYERS[1]:
        return step_memory(setup, batch, layers)
    return along((step_memory(setup, batch, LAYERS[0]), step_memory(setup, batch, LAYERS[1])), LAYERS, layers)


def along(points: tuple[Memory, Memory], at: tuple[int, int], position: int) -> Memory:
    """Each part and each peak at `position` on the line through two points, which are at positions `at`."""
    share = (position - at[0]) / (at[1] - at[0])
    low, high = (np.array([*dataclasses.astuple(point)[:-1], *point.peaks]) for point in points)
    weights, adapter, optimizer, gradients, saved, *peaks = (low + share * (high - low)).tolist()
    return Memory(weights, adapter, optimizer, gradients, saved, tuple(peaks))


def step_memory(setup: Setup, batch: Batch, layers: int) -> Memory:
    """The memory of one step of a model with `layers` layers: a micro-batch as in `loop.gradients`, then AdamW.

    Gradients and moments exist from the start, as in all micro-batches except the first one of a run.
    """
    config, full = dataclasses.replace(setup.config, torch_compile=False), setup.config.method == "full"
    model = empty_model(setup.base_folder, torch.float32 if full else setup.base_dtype or setup.dtype, layers)
    make_trainable(model, config)
    model.train()
    with torch.random.fork_rng(devices=[]), FakeTensorMode(), autograd_unchanged():
        to_fake(model)
        fakes: dict[str, Any] = {
            name: torch.empty(value.shape, dtype=value.dtype) for name, value in tensors_of(batch).items()
        }
        batch = dataclasses.replace(batch, **fakes)
        trained = [param for param in model.parameters() if param.requires_grad]
        for param in trained:
            param.grad = torch.empty_like(param)
        optimizer = make_optimizer(model, config.weight_decay, config.loraplus_lr_ratio)
        optimizer.step()
        moments = [value for state in optimizer.state.values() for value in state.values()]
        gradients = [param.grad for param in trained if param.grad is not None]
        existing = [*model.parameters(), *model.buffers(), *moments, *gradients, *fakes.values()]
        with Watch(existing) as watch:
            decoder = MarkedDecoder(
                model,
                family_of(model.config),
                policy_as_on(setup.device_type),
                recomputed(preserve_rng_state=False) if setup.checkpointing else once,  # fake tensors draw no numbers
                config.neftune_noise_alpha,
                setup.dtype,
                watch=watch,
            )
            with autocast(torch.device("cpu"), setup.dtype):
                nats = SFT().loss(decoder, batch)
            saved = watch.alive_bytes
            watch.mark()
            (nats / len(batch.targets)).backward()
            watch.mark()
            nn.utils.clip_grad_norm_(trained, config.max_grad_norm or 1.0)
            optimizer.step()
    if len(watch.peaks_bytes) != len(PHASES):
        raise RuntimeError(f"a step of {len(watch.peaks_bytes)} phases")
    adapter = 0 if full else num_bytes(trained)
    weights = num_bytes([*model.parameters(), *model.buffers()]) - adapter
    memory = Memory(weights, adapter, num_bytes(moments), num_bytes(gradients), saved, tuple(watch.peaks_bytes))
    return in_parts(memory, setup, model) if setup.shards > 1 else memory


def in_parts(memory: Memory, setup: Setup, model: Any) -> Memory:
    """The memory of one of setup.shards processes, each of which holds a part of every layer (see `shard`)."""
    full, shards = setup.config.method == "full", setup.shards
    layer = num_bytes(p for p in model.get_decoder().layers[-1].parameters() if full or not p.requires_grad)
    layers = layer * len(model.get_decoder().layers)
    if not full:
        return dataclasses.replace(memory, weights=memory.weights - layers + layers / shards + GATHERED * layer)
    narrow = setup.dtype.itemsize / torch.float32.itemsize  # layers are gathered in the dtype of the matrix products
    casts = layers * narrow if narrow < 1 else 0.0  # autocast copies; an unsharded model keeps them until the loss
    kept = 0.0 if setup.checkpointing else casts  # and until the backward pass has used them
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # gathered in fp32, one by one, even if tied
    embedding, head = (num_bytes([end.weight]) for end in ends)
    tied: bool = model.config.tie_word_embeddings
    gathered = GATHERED * layer * narrow  # in the backward pass: two layers, and the gradients of one
    added_up = layer + head / shards  # in fp32: a layer's gradients before they are split, and a part of the head's
    backward = gathered + added_up + embedding * (not tied)  # a tied unsharded model also keeps the head's gradient
    more = (
        gathered + embedding - casts,
        head - casts,
        head / shards - kept,
        backward - kept,
        backward - embedding * tied,  # at its end a tied unsharded model also holds the sum of both gradients
        0.0,
    )
    return Memory(
        memory.weights / shards,
        memory.adapter,
        memory.optimizer / shards,
        (memory.gradients + embedding * tied) / shards,  # the last norm's is a view of the embedding's buffer
        memory.saved - kept,
        tuple(peak + own for peak, own in zip(memory.peaks, more, strict=True)),
    )


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch by name."""
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors; a shared storage counts once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@dataclass(kw_only=True)
class MarkedDecoder(Decoder):
    """A decoder that begins a new phase of `watch` after its forward pass, and when the backward pass reaches it.

    The backward pass of layer 0 is a phase of its own, whose peak does not grow with the number of layers.
    """

    watch: Watch

    def __call__(self, batch: Batch) -> Tensor:
        """Final hidden states at the supervised positions of a packed batch. (S, hidden)"""
        hidden = super().__call__(batch)
        hidden.register_hook(lambda _: self.watch.mark())
        self.watch.mark()
        return hidden

    def layer(self, layer: Any, *inputs: Any) -> Tensor:
        """One decoder layer. (T, hidden) -> (T, hidden), or (S', hidden) in the last layer"""
        hidden = super().layer(layer, *inputs)
        if layer is self.model.get_decoder().layers[0]:
            hidden.register_hook(lambda _: self.watch.mark())
        return hidden


def predict_for(setup: Setup, dataset: Dataset, schedule: Schedule, max_tokens: int) -> Memory:
    """The memory of a run over these rows, with micro-batches of up to max_tokens tokens."""
    return predict(setup, largest_batch(setup, dataset, schedule, max_tokens))


def largest_batch(setup: Setup, dataset: Dataset, schedule: Schedule, max_tokens: int) -> Batch:
    """The micro-batch with most tokens in the first STEPS_SEARCHED steps, or the longest row alone."""
    share = shares_prefix(setup.config, setup.device_type)
    batches = [collate([dataset[int(np.argmax(dataset.lengths))]])]
    for step in range(min(schedule.num_steps, STEPS_SEARCHED)):
        batches += micro_batches([dataset[i] for i in schedule.examples_of(step)], max_tokens, share)
    return max(batches, key=lambda batch: batch.input_ids.numel())


@dataclass(frozen=True)
class Choice:
    """The token budget and checkpointing of a run. memory: their prediction, or None if it failed."""

    max_tokens: int
    checkpointing: bool
    memory: Memory | None
    notes: tuple[str, ...] = ()


def choose_cut(
    setup: Setup, dataset: Dataset, schedule: Schedule, asked: int, most: int, free: float = math.inf
) -> Choice:
    """The requested budget, or (asked: 0) the largest one up to `most` tokens that is predicted to fit `free` bytes.

    Checkpointing is used if it is requested, or if it is left open and not even one example fits without it.
    A prediction that fails becomes a note, and the run continues.
    """
    try:
        return fitting_cut(setup, dataset, schedule, asked, most, free * USABLE)
    except MiniloraError:
        raise  # a mistake in the settings, or a signal
    except Exception as error:
        note = f"memory could not be predicted: {type(error).__name__}: {first_line(error)}"
        return Choice(asked or most, setup.checkpointing, None, (note,))


def fitting_cut(setup: Setup, dataset: Dataset, schedule: Schedule, asked: int, most: int, usable: float) -> Choice:
    """The choice of `choose_cut` within `usable` bytes. A prediction that fails raises its error."""
    longest = int(dataset.lengths.max()) - 1
    left_open = setup.config.gradient_checkpointing is None
    for checkpointing in (False, True) if left_open else (setup.checkpointing,):
        setup, budget = dataclasses.replace(setup, checkpointing=checkpointing), asked or most
        memory = predict_for(setup, dataset, schedule, budget)
        while not asked and memory.total > usable and budget > longest:
            tried, budget = budget, budget // 2
            while budget > longest and memory.total - max(memory.peaks) * (1 - budget / tried) > usable:
                budget //= 2  # memory falls at most in proportion to the tokens, so this budget cannot fit
            memory = predict_for(setup, dataset, schedule, budget)
        if memory.total <= usable:
            return Choice(budget, checkpointing, memory)
    note = f"the run may not fit: it is predicted to need {gib(memory.total)}, and {gib(usable)} are usable"
    return Choice(budget, checkpointing, memory, (note,))
