"""Several adapters on one base: each loaded once, switched by name, the base never loaded again."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from minilora.adapters import format as adapter_format
from minilora.errors import AdapterError
from minilora.inference.generate import ChatModel, load_chat_model
from minilora.lora import inject, lora_layers
from minilora.lora_variants import DoRA
from minilora.models.fingerprint import fingerprint
from minilora.models.trained import adapter_system_prompt


@dataclass(frozen=True)
class Loaded:
    """An adapter in memory: its settings, its system prompt, and the attributes of each LoRALinear by layer name."""

    config: adapter_format.AdapterConfig
    system_prompt: str | None
    values: dict[str, dict[str, Any]]


class Adapters:
    """The adapters of one base, of any ranks and targets, by name; one of them, or none, is active.

    Switching gives the model's LoRALinear layers the values of another adapter; a layer which that adapter does
    not change is disabled. They are for answering: `adapter.load` gives one to train on.
    """

    def __init__(self, model: nn.Module) -> None:
        if lora_layers(model):
            raise AdapterError("Adapters needs a base without an adapter on it")
        self.model = model
        self.active: str | None = None
        self._fingerprint = fingerprint(model)
        self._loaded: dict[str, Loaded] = {}

    @property
    def names(self) -> list[str]:
        """The names of what is loaded, in the order of loading."""
        return list(self._loaded)

    def load(self, name: str, folder: Path, allow_other_base: bool = False) -> Loaded:
        """Read an adapter, make it active, and return it. Raises AdapterError as `adapter.load` does."""
        if name in self._loaded:
            raise AdapterError(f"there is already an adapter {name!r}: give this one another name, NAME=DIR")
        config, updates = adapter_format.read(self.model, folder, self._fingerprint, allow_other_base)
        wrapped = {layer.rpartition(".")[2] for layer in lora_layers(self.model)}
        if new := [target for target in config.target_modules if target not in wrapped]:
            inject(self.model, new, config.rank, config.alpha, config.dropout, config.rslora)
            self.model.eval()
        values = {}
        for layer_name, layer in lora_layers(self.model).items():
            if update := updates.get(f"{layer_name}.weight"):
                parts = {"lora_A": update.A, "lora_B": update.B, **update.own}
                tensors = {key: nn.Parameter(part.to(layer.lora_A), requires_grad=False) for key, part in parts.items()}
                others = dict.fromkeys(DoRA.trained)  # no magnitudes stay from the adapter before
                values[layer_name] = {"scale": update.scale, "variant": update.variant, **others, **tensors}
        prompt = adapter_format.read_metadata(folder).get("system_prompt")
        self._loaded[name] = Loaded(config, prompt, values)
        self.use(name)
        return self._loaded[name]

    def use(self, name: str | None) -> Loaded | None:
        """Make an adapter active, or none. Raises AdapterError that lists the names when there is no such adapter."""
        if name is not None and name not in self._loaded:
            raise AdapterError(f"there is no adapter {name!r}; loaded: {', '.join(self._loaded) or 'none'}")
        chosen = None if name is None else self._loaded[name]
        for layer_name, layer in lora_layers(self.model).items():
            layer.enabled = chosen is not None and layer_name in chosen.values
            if chosen is not None and layer.enabled:
                for key, value in chosen.values[layer_name].items():
                    setattr(layer, key, value)
        self.active = name
        return chosen

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model answers as its base does."""
        active = self.active
        self.use(None)
        try:
            yield
        finally:
            self.use(active)


def named_folders(given: Sequence[str]) -> dict[str, Path]:
    """What stands after --adapter as names and folders: NAME=DIR, or DIR, named after the run it lies in.

    runs/mine/adapter is mine, runs/mine/best is mine/best. Raises AdapterError when two have one name.
    """
    named: dict[str, Path] = {}
    for text in given:
        before, equals, after = text.partition("=")
        whole = Path(text).expanduser()
        name, folder = (before, Path(after).expanduser()) if equals and not whole.is_dir() else ("", whole)
        if not name:
            *_, run, last = ("", *folder.absolute().parts)
            name = {"adapter": run, "best": f"{run}/best"}.get(last, last)
        if name in named:
            raise AdapterError(f"{named[name]} and {folder} are both named {name!r}: give --adapter NAME=DIR")
        named[name] = folder
    return named


def load_several(
    named: Mapping[str, Path],
    model_name: str | None,
    dtype: str = "auto",
    device: str = "auto",
    system_prompt: str | None = None,
    allow_other_base: bool = False,
) -> tuple[ChatModel, Adapters]:
    """A base (model_name, else that of the first adapter) with adapters on it, the first one active."""
    for folder in named.values():
        adapter_format.base_of(folder, model_name)  # mistakes before the base is loaded
    first_folder = next(iter(named.values()), None)
    base = str(adapter_format.find_base(model_name, first_folder)) if named else model_name
    chat_model = load_chat_model(base, None, dtype, device, system_prompt)
    adapters = Adapters(chat_model.model)
    for name, folder in named.items():
        adapters.load(name, folder, allow_other_base)
    if named:
        first = adapters.use(adapters.names[0])
        if system_prompt is None and first is not None:
            chat_model.system_prompt = adapter_system_prompt(first.system_prompt, chat_model.tokenizer)
    return chat_model, adapters
