"""`Run`: everything that one training run holds."""

import gc
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minilora.batching import Batch, collate, micro_batches, pack_examples, shares_prefix, split_across_ranks
from minilora.config import TrainConfig
from minilora.data.build import Sets
from minilora.data.dataset import Example
from minilora.data.markup import ChatMarkup
from minilora.data.sampler import Schedule
from minilora.decoder import Decoder
from minilora.distributed.world import World
from minilora.models.load import file_dtype
from minilora.models.trained import common_system_prompt
from minilora.objectives import Objective
from minilora.training.arithmetic import Arithmetic, is_measured
from minilora.training.checkpoint import Identity, TrainState
from minilora.training.log import NullLog, RunLog
from minilora.training.signals import StopRequest
from minilora.utils.device import autocast, trim_heap


@dataclass
class Run:
    """Everything one training run holds."""

    config: TrainConfig
    folder: Path
    base_folder: Path
    device: torch.device
    arithmetic: Arithmetic
    tokenizer: Any
    markup: ChatMarkup
    model: Any
    decoder: Decoder  # its training forward
    objective: Objective
    optimizer: torch.optim.Optimizer
    data: Sets
    schedule: Schedule
    state: TrainState
    identity: Identity
    stop: StopRequest
    world: World
    checkpointing: bool  # activations are recomputed in the backward pass
    log: RunLog | NullLog = field(default_factory=NullLog)
    predicted_peak_bytes: int | None = None
    saved_step: int = -1  # the step of the newest checkpoint that this run wrote or was resumed from; -1: none
    saved_result: Path | None = None  # the adapter or model, when the run is over
    before_skipped: TrainState | None = None  # the state before the first of several skipped steps

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix products."""
        return self.arithmetic.dtype

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype of the base under an adapter, or of a fully trained model.

        Where the products are measured, their speed does not change the file: a model keeps the dtype of its base.
        """
        if self.config.method == "lora":
            return self.arithmetic.base_dtype
        return file_dtype(self.base_folder) if is_measured(self.config, self.device) else self.dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 matrix products where the run computes in bf16."""
        return autocast(self.device, self.dtype)

    @property
    def stop_reason(self) -> str:
        """Why no step is left to train; empty while there is one."""
        if self.state.step >= self.schedule.num_steps:
            return "completed"
        patience = self.config.early_stopping_patience
        return "early stopping" if patience and self.state.evals_since_best >= patience else ""

    @property
    def share_prefix(self) -> bool:
        """Whether a micro-batch computes what all its rows begin with only once."""
        return shares_prefix(self.config, self.device.type)

    @cached_property
    def system_prompt(self) -> str:
        """What is trained with: the system turn that all rows have, whoever brought it; else that of the settings."""
        common = common_system_prompt(self.data.train, self.markup, self.tokenizer)
        return self.config.system_prompt if common is None else common

    @property
    def resume_command(self) -> str:
        """The command that goes on with this run on this machine. torchrun gives each of several machines its own."""
        env, launcher = os.environ, ["python"]
        script = Path(sys.argv[0])  # a clone's train.py, or the module of an installed package
        program = [str(script.absolute())] if script.name == "train.py" else ["-m", "minilora", "train"]
        if self.world.size > 1:
            launcher = ["torchrun"]
            if env.get("GROUP_WORLD_SIZE", "1") != "1":
                launcher += ["--nnodes", env["GROUP_WORLD_SIZE"], "--node-rank", env.get("GROUP_RANK", "0")]
                launcher += ["--master-addr", env["MASTER_ADDR"], "--master-port", env["MASTER_PORT"]]
            launcher += ["--nproc-per-node", env.get("LOCAL_WORLD_SIZE", str(self.world.size))]
        return shlex.join([*launcher, *program, "--resume", str(self.folder.absolute())])

    def batches(self, examples: Sequence[Example]) -> Iterator[Batch]:
        """The micro-batches that this process takes of the examples of a step, on its device."""
        cut = (self.state.max_tokens, self.share_prefix)
        lengths = [len(example.input_ids) - 1 for example in examples]
        shares = [[examples[i] for i in part] for part in split_across_ranks(lengths, self.world.size)]
        for batch in micro_batches(shares[self.world.rank], *cut):
            yield batch.to(self.device)
        if self.world.sharded:  # every process must go through the same number of micro-batches
            counts = [len(pack_examples(each, *cut)) for each in shares]
            shortest = collate([min(examples, key=lambda example: len(example.input_ids))]).unsupervised()
            for _ in range(counts[self.world.rank], max(counts)):
                yield shortest.to(self.device)

    def check(self) -> None:
        """Raise StoppedError if a signal has come; among shards, if it has come to any process."""
        if self.world.sharded:
            self.stop.signal_number = max(self.world.exchange(self.stop.signal_number))
        self.stop.check()

    def release(self) -> None:
        """Free the memory of model and optimizer; after that the run can only be reported."""
        del self.model, self.decoder, self.optimizer
        gc.collect()
        trim_heap(self.device)
