"""`Objective`: what a step minimises, (sum over its units) / (number of units of the whole step)."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from minilora.batching import Batch
from minilora.data.dataset import Example
from minilora.decoder import Decoder


class Objective(Protocol):
    """The part of a step that the loop does not know. The loop divides each loss by the units of the whole step."""

    def count(self, rows: Sequence[Example]) -> int:
        """The units of a step of these rows: for supervised fine-tuning, the supervised tokens."""
        ...

    def loss(self, model: Decoder, batch: Batch) -> Tensor:
        """The loss summed over the units of a micro-batch. A scalar, in nats"""
        ...

    def metrics(self) -> dict[str, float]:
        """What the objective adds to the record of the step in metrics.jsonl."""
        ...
