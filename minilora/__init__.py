"""minilora: LoRA fine-tuning of Qwen models, written by hand.

The names below are the ones to build on; each is imported when it is first used, so that `import minilora` is quick.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minilora.adapter import AdapterConfig
    from minilora.adapters import Adapters
    from minilora.api import add_adapter, load_adapter, merge_adapter, save_adapter
    from minilora.config import TrainConfig
    from minilora.errors import MiniloraError
    from minilora.finish import Summary
    from minilora.loop import train
    from minilora.lora import LoRALinear, disabled

__version__ = "0.1.0"
__all__ = [
    "AdapterConfig",
    "Adapters",
    "LoRALinear",
    "MiniloraError",
    "Summary",
    "TrainConfig",
    "add_adapter",
    "disabled",
    "load_adapter",
    "merge_adapter",
    "save_adapter",
    "train",
]
_HOMES = {
    "adapter": ("AdapterConfig",),
    "adapters": ("Adapters",),
    "api": ("add_adapter", "load_adapter", "merge_adapter", "save_adapter"),
    "config": ("TrainConfig",),
    "errors": ("MiniloraError",),
    "finish": ("Summary",),
    "lora": ("LoRALinear", "disabled"),
    "loop": ("train",),
}

if not TYPE_CHECKING:  # a type checker would take every name for one that this function finds

    def __getattr__(name: str) -> Any:
        """One of the names above, from the room where it is at home."""
        import importlib

        for room, names in _HOMES.items():
            if name in names:
                return getattr(importlib.import_module(f"minilora.{room}"), name)
        raise AttributeError(f"module 'minilora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
