"""Supervised fine-tuning: the nats of the supervised tokens."""

from collections.abc import Sequence

from torch import Tensor

from minilora.batching import Batch
from minilora.data.dataset import IGNORE, Example
from minilora.decoder import Decoder
from minilora.loss import token_nats


class SFT:
    """The cross-entropy of the supervised tokens. A unit is one supervised token."""

    def count(self, rows: Sequence[Example]) -> int:
        """The supervised tokens of the rows."""
        return sum(int((row.labels[1:] != IGNORE).sum()) for row in rows)

    def loss(self, model: Decoder, batch: Batch) -> Tensor:
        """The nats of all supervised tokens of a micro-batch, added up."""
        return token_nats(model(batch), model.head_weight, batch.targets, model.policy.device_type).sum()

    def metrics(self) -> dict[str, float]:
        """Nothing beside the loss."""
        return {}
