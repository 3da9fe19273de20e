"""`minilora doctor` checks everything that a run needs, and prints a fix for each check that fails.

Only the standard library and modules without dependencies are imported at the top, so that a missing or broken package
is reported by a check.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minilora.config import TrainConfig
from minilora.errors import ConfigError, MiniloraError, ModelError, UnsupportedModelError, printable

OUTPUT_BYTES, DOWNLOAD_BYTES = 2**30, 2 * 2**30  # free bytes for a run, and for the download of a small model
END = "<|im_end|>"
MAX_HEADER_BYTES = 2**26  # of a file of weights
DOWNLOAD = "download the model again: hf download OWNER/NAME --local-dir FOLDER"
OTHER_MODEL = "give another --model, for example Qwen/Qwen3-0.6B"


@dataclass(frozen=True)
class Finding:
    """The result of a check. FAIL: a run cannot start; note: a run works anyway. fix: what to do, in one line."""

    state: Literal["ok", "note", "FAIL"]
    name: str
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Asked:
    """What the user asks to check: a model (a folder, a hub name or none) and the output folder of runs."""

    model: str | None
    output_dir: str

    @property
    def name(self) -> str:
        """The model that a run would train."""
        return self.model or TrainConfig.model

    def folder(self) -> Path | None:
        """The folder of that model: the given one, or a complete copy in the cache; None if there is neither."""
        from minilora.models.load import cached_model

        path = Path(os.path.expanduser(self.name))
        return path if self.is_folder else cached_model(self.name)

    @property
    def is_folder(self) -> bool:
        """Whether the model is a local folder."""
        return os.path.isdir(os.path.expanduser(self.name))


def doctor(asked: Asked) -> int:
    """Run all checks and print the findings. Returns 0 if no check failed, else 1."""
    if asked.model and not asked.is_folder:
        from minilora.models.load import check_hub_name

        check_hub_name(asked.model)
    findings = []
    for finding in examine(asked):
        findings.append(finding)
        print(f"{finding.state:<5} {finding.name:<17} {printable(finding.text)}")
        if finding.fix:
            print(f"{'':<5} {'  fix':<17} {printable(finding.fix)}", flush=True)
    failed = sum(finding.state == "FAIL" for finding in findings)
    print(f"\n{failed} of {len(findings)} checks failed." if failed else "\nAll checks passed.")
    return 1 if failed else 0


def examine(asked: Asked) -> Iterator[Finding]:
    """The findings of all checks. A check that raises an error gives a finding too."""
    for check in CHECKS:
        name = check.__name__
        try:
            yield from check(asked)
        except ImportError as error:
            package = (error.name or "the package").partition(".")[0]
            yield Finding("FAIL", name, f"{package} cannot be imported: {error}", f"pip install -U {package}")
        except UnsupportedModelError as error:
            yield Finding("FAIL", name, str(error), OTHER_MODEL)
        except MiniloraError as error:
            yield Finding("FAIL", name, str(error), "" if isinstance(error, ConfigError) else DOWNLOAD)
        except Exception as error:
            what = f"the check raised {type(error).__name__}: {error}"
            yield Finding("FAIL", name, what, "report this line to the project")


# ---------------------------------------------------------------------------------------- Python and packages


def declared() -> tuple[str, dict[str, list[str]]]:
    """(minimum Python, requirements by extra; "" for those of every run), from the clone or the installed package."""
    clone = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if clone.is_file() and (table := tomllib.loads(clone.read_text("utf-8"))["project"])["name"] == "minilora":
        return table["requires-python"], {"": table["dependencies"], **table["optional-dependencies"]}
    try:
        about = importlib.metadata.metadata("minilora")
    except importlib.metadata.PackageNotFoundError:
        return "", {}
    needed: dict[str, list[str]] = {}
    for line in about.get_all("Requires-Dist") or []:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", marker)
        needed.setdefault(extra[1] if extra else "", []).append(requirement.strip())
    return about["Requires-Python"], needed


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparison; 5.17 and 5.17.0 are equal."""
    found = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in found[0].split(".")] if found else []
    while parts[1:] and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def project(requirement: str) -> str:
    """The package name in a requirement."""
    found = re.match(r"[\w.-]+", requirement)
    return found[0] if found else requirement


def lacking(requirement: str) -> str:
    """The reason why `name>=version` is not met; empty if it is met."""
    name, least = project(requirement), requirement.partition(">=")[2]
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"{name} is not installed"
    return f"{name} {installed} is older than {least}" if numbers(installed) < numbers(least) else ""


def python(asked: Asked) -> Iterator[Finding]:
    """Check the version of Python."""
    least = declared()[0].removeprefix(">=")
    mine = ".".join(map(str, sys.version_info[:3]))
    if numbers(mine) < numbers(least):
        fix = f"make an environment with a newer Python: python{least} -m venv venv"
        yield Finding("FAIL", "python", f"{mine} is older than {least}", fix)
    else:
        yield Finding("ok", "python", mine)


def packages(asked: Asked) -> Iterator[Finding]:
    """Check the packages that every run imports, and those of the extras."""
    needed = declared()[1]
    if not needed:
        what = "the required versions are not known: minilora is neither a clone nor installed"
        yield Finding("note", "packages", what, "pip install . in the clone")
    for requirement in needed.pop("", []):
        name = project(requirement)
        if why := lacking(requirement):
            yield Finding("FAIL", name, why, f'pip install -U "{requirement}"')
        else:
            yield Finding("ok", name, importlib.metadata.version(name))
    for extra, requirements in needed.items():
        missing = {requirement: why for requirement in requirements if (why := lacking(requirement))}
        if missing:
            fix = "pip install -U " + " ".join(f'"{requirement}"' for requirement in missing)
            yield Finding("note", f"extra {extra}", f"{', '.join(missing.values())}; this extra is optional", fix)
        else:
            yield Finding("ok", f"extra {extra}", "installed")


# ---------------------------------------------------------------------------------------- the device


def device(asked: Asked) -> Iterator[Finding]:
    """Check that the build of torch and the driver are compatible."""
    import torch

    from minilora.utils.device import cuda_problem, driver_cuda

    build, driver = torch.version.cuda, driver_cuda()
    what, fix = cuda_problem()
    if getattr(torch.version, "hip", None):
        yield Finding("ok", "device", f"torch {torch.__version__} for ROCm {torch.version.hip}: not checked further")
    elif what:
        yield Finding("FAIL", "device", what, fix)
    elif driver is None:
        what = f"built for CUDA {build}" if build else "built for the CPU"
        fix = "for an NVIDIA card, install its driver; nvidia-smi must list the card" if build else ""
        yield Finding("note" if build else "ok", "device", f"torch is {what}; no NVIDIA driver: runs use the CPU", fix)
    else:
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        named = ", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards)
        yield Finding("ok", "device", f"{named}; torch for CUDA {build}, driver for {driver[0]}.{driver[1]}")


def arithmetic(asked: Asked) -> Iterator[Finding]:
    """Report what `dtype auto` takes: a card has bfloat16 or not, a CPU is measured with the shapes of a 0.5B Qwen."""
    import torch

    from minilora.training.arithmetic import EXAMPLE_SHAPES, chosen, measure
    from minilora.utils.device import pick_device, pick_dtype

    place = pick_device("auto")
    if place.type == "cpu":
        words = chosen(measure(EXAMPLE_SHAPES), float32_fits=lambda: True).in_words
        yield Finding("ok", "arithmetic", f"dtype auto takes {words}")
    elif pick_dtype("auto", place) == torch.bfloat16:
        yield Finding("ok", "arithmetic", f"{place.type} supports bfloat16")
    else:
        what = f"{place.type} has no bfloat16; float32 is slower and twice as large"
        yield Finding("note", "arithmetic", what, "none; NVIDIA cards since Ampere support it")


def bitsandbytes(asked: Asked) -> Iterator[Finding]:
    """Check that bitsandbytes, if it is installed, has a library for the CUDA version of torch."""
    import torch

    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or not spec.submodule_search_locations:
        yield Finding("note", "bitsandbytes", "not installed: no base in 4 bits", "pip install -U bitsandbytes")
        return
    version = importlib.metadata.version("bitsandbytes")
    folder, build = Path(spec.submodule_search_locations[0]), torch.version.cuda
    library = f"libbitsandbytes_cuda{(build or '').replace('.', '')}.so"
    if build and not (folder / library).exists():
        what = f"{version} has no library for torch's CUDA {build} ({library})"
        yield Finding("note", "bitsandbytes", what, "pip install -U bitsandbytes, or a build of torch for another CUDA")
    else:
        yield Finding("ok", "bitsandbytes", f"{version}" + ("" if build else ", on the CPU"))


# ---------------------------------------------------------------------------------------- folders and the hub


def cannot_write(folder: Path) -> str:
    """The reason why a folder cannot be written or created; empty if it can. It leaves no file behind."""
    place = nearest_existing(folder)
    if not place.is_dir():
        return f"{place} is not a folder"
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        return f"{place}: {error.strerror}"
    return ""


def nearest_existing(folder: Path) -> Path:
    """The path itself if it exists, else its nearest parent that exists."""
    folder = Path(os.path.abspath(os.path.expanduser(folder)))
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def little_space(folder: Path, needed: int) -> str:
    """The free and the needed space as text; empty if at least `needed` bytes are free."""
    free = shutil.disk_usage(nearest_existing(folder)).free
    return f"{free / 2**30:.2f} GiB free, {needed / 2**30:g} GiB needed" if free < needed else ""


def output(asked: Asked) -> Iterator[Finding]:
    """Check that the output folder of a run can be written."""
    folder = Path(asked.output_dir)
    fix = "choose another folder: --output_dir DIR"
    if why := cannot_write(folder):
        yield Finding("FAIL", "output folder", f"{folder} cannot be written: {why}", fix)
    elif why := little_space(folder, OUTPUT_BYTES):
        yield Finding("FAIL", "output folder", f"{folder}: {why}", f"free some space, or {fix}")
    else:
        free = shutil.disk_usage(nearest_existing(folder)).free
        yield Finding("ok", "output folder", f"{folder} can be written, {free / 2**30:.0f} GiB free")


def compile_cache(asked: Asked) -> Iterator[Finding]:
    """Check that TORCHINDUCTOR_CACHE_DIR, if it is set, can be written. Otherwise transformers is unusable."""
    from minilora.utils.device import compile_cache_problem

    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if named and (compile_cache_problem() or cannot_write(Path(named))):
        what = f"TORCHINDUCTOR_CACHE_DIR = {named!r} cannot be written"
        yield Finding("FAIL", "compile cache", what, "unset TORCHINDUCTOR_CACHE_DIR, or set it to another folder")


def cache(asked: Asked) -> Iterator[Finding]:
    """Check that the cache can be written and has space. It is a note if the model is local already."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    failed: Literal["note", "FAIL"] = "FAIL" if asked.folder() is None else "note"
    fix = "choose another folder: export HF_HOME=FOLDER"
    if why := cannot_write(folder):
        yield Finding(failed, "cache", f"{folder} cannot be written: {why}", fix)
    elif why := little_space(folder, DOWNLOAD_BYTES):
        yield Finding(failed, "cache", f"{folder}: {why}", f"free some space, or {fix}")
    else:
        yield Finding("ok", "cache", f"{folder} can be written")


def hub(asked: Asked) -> Iterator[Finding]:
    """Check that the model is available: in a folder, in the cache or on the hub."""
    from minilora.models.load import hub_answers

    if asked.folder() is not None:
        yield Finding("ok", "hub", f"not needed: {asked.name} is local")
        return
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
    if why := "HF_HUB_OFFLINE is set" if offline else hub_answers(asked.name):
        fix = "--model FOLDER, or unset HF_HUB_OFFLINE" if offline else "--model FOLDER, or HF_ENDPOINT=URL of a mirror"
        what = f"{asked.name} is not in the cache, and {why}"
        state: Literal["note", "FAIL"] = "FAIL" if asked.model else "note"
        yield Finding(state, "hub", what + ("" if asked.model else "; the demo needs no hub"), fix)
    else:
        yield Finding("ok", "hub", f"the hub answers; the first run downloads {asked.name}")


# ---------------------------------------------------------------------------------------- the model's files


def tokenizer(asked: Asked) -> Iterator[Finding]:
    """Check the tokenizer: the pad token is not the end token, and other programs stop at the end token."""
    if (folder := asked.folder()) is None:
        return
    from minilora.data.markup import ChatMarkup
    from minilora.models.load import load_tokenizer, read_config_json, what_else

    try:
        embedded = read_config_json(folder).get("vocab_size")
    except ModelError:
        return  # the check `weights` reports it
    if what_else(folder):
        return
    loaded = load_tokenizer(folder)
    markup = ChatMarkup(loaded)
    if (configured := configured_pad(folder)) != loaded.pad_token:
        what = f"{configured} in the files; minilora pads with {loaded.pad_token}, others may never learn to stop"
        fix = f'"pad_token": "{loaded.pad_token}" in {folder / "tokenizer_config.json"}'
        yield Finding("note", "pad token", what, fix)
    else:
        yield Finding("ok", "pad token", f"{loaded.pad_token} ({loaded.pad_token_id}), not the end token")
    if isinstance(embedded, int) and markup.end >= embedded:
        what = f"{END} has id {markup.end}, but the model has {embedded} embeddings: wrong tokenizer"
        yield Finding("FAIL", "end token", what, DOWNLOAD)
    else:
        yield end_token(folder, markup.end)


def configured_pad(folder: Path) -> str | None:
    """The pad token that tokenizer_config.json names. Raises ValueError for a file that is not JSON."""
    from minilora.utils import files

    path = folder / "tokenizer_config.json"
    pad = files.read_json(path).get("pad_token") if path.exists() else None
    pad = pad.get("content") if isinstance(pad, dict) else pad
    return pad if isinstance(pad, str) else None


def end_token(folder: Path, end: int) -> Finding:
    """Check that generation_config.json names the end token, so that other programs stop at it."""
    from minilora.utils import files

    path = folder / "generation_config.json"
    ends: Any = files.read_json(path).get("eos_token_id") if path.exists() else None
    if end in (ends if isinstance(ends, list) else [ends]):
        return Finding("ok", "end token", f"{END} ({end})")
    what = f"{path.name} does not name {END} ({end}): minilora stops there, other programs may not"
    return Finding("note", "end token", what, f'"eos_token_id": [{end}] in {path}')


def weights(asked: Asked) -> Iterator[Finding]:
    """Check that the model type is supported and that the weights are complete."""
    if (folder := asked.folder()) is None:
        what = f"not checked: {asked.name} is not local" if asked.model else "none given: --model NAME checks one"
        yield Finding("ok", "model", what)
        return
    from minilora.models.load import num_layers, weight_files, what_else

    if hint := what_else(folder):
        yield Finding("FAIL", "model", f"{folder} is no model folder", hint)
        return
    layers = num_layers(folder)
    paths = weight_files(folder)
    problems = [f"{path.name}: {why}" for path in paths if (why := incomplete(path))]
    problems += [] if problems else misplaced(folder)
    if problems:
        pickled = any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors"))
        fix = "only .bin files are there: get the model's safetensors files" if pickled else DOWNLOAD
        yield Finding("FAIL", "weights", f"{folder}: {'; '.join(problems[:3])}", fix)
    else:
        size = sum(path.stat().st_size for path in paths)
        yield Finding("ok", "weights", f"{layers} layers in {len(paths)} file(s), {size / 2**30:.2f} GiB, complete")


def incomplete(path: Path) -> str:
    """What is wrong with a safetensors file, judged by its header and size; empty if nothing is."""
    from minilora.utils import files

    if not path.exists():
        return "missing"
    try:
        header = files.safetensors_header(path, MAX_HEADER_BYTES)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        with open(path, "rb") as file:
            expected = 8 + int.from_bytes(file.read(8), "little") + max(ends)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        return f"not readable: {error}"
    size = path.stat().st_size
    return "" if size == expected else f"{size:,} bytes of {expected:,}"


def misplaced(folder: Path) -> list[str]:
    """The tensors that the index expects in a file but that are missing there; empty if there is no index."""
    from minilora.utils import files

    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return []
    places: dict[str, str] = files.read_json(index)["weight_map"]
    headers = {name: files.safetensors_header(folder / name, MAX_HEADER_BYTES) for name in set(places.values())}
    return [f"{name}: {tensor} is missing" for tensor, name in places.items() if tensor not in headers[name]]


CHECKS: tuple[Callable[[Asked], Iterator[Finding]], ...] = (
    *(python, packages, device, compile_cache, arithmetic, bitsandbytes, output, cache, hub, tokenizer, weights),
)
