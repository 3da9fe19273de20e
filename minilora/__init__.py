"""minilora: LoRA fine-tuning of Qwen models, written by hand.

The names below are the ones to build on; each is imported when it is first used, so that `import minilora` is quick.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minilora.adapters.api import add_adapter, load_adapter, merge_adapter, save_adapter
    from minilora.adapters.format import AdapterConfig
    from minilora.config import TrainConfig
    from minilora.errors import MiniloraError
    from minilora.inference.multi_adapter import Adapters
    from minilora.loop import train
    from minilora.lora import LoRALinear, disabled
    from minilora.training.finish import Summary

__version__ = "0.2.0.dev0"
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
    "adapters.api": ("add_adapter", "load_adapter", "merge_adapter", "save_adapter"),
    "adapters.format": ("AdapterConfig",),
    "config": ("TrainConfig",),
    "errors": ("MiniloraError",),
    "inference.multi_adapter": ("Adapters",),
    "loop": ("train",),
    "lora": ("LoRALinear", "disabled"),
    "training.finish": ("Summary",),
}

if not TYPE_CHECKING:  # a type checker would take every name for one that this function finds

    def __getattr__(name: str) -> Any:
        """One of the names above, from the module that defines it."""
        import importlib

        for module, names in _HOMES.items():
            if name in names:
                return getattr(importlib.import_module(f"minilora.{module}"), name)
        raise AttributeError(f"module 'minilora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
