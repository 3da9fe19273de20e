"""`minilora doctor`: is everything there that a run needs? What fails is named, with what mends it.

Nothing but the standard library is imported at the top: what is missing or broken is what this is here to find.
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

OUTPUT_BYTES, DOWNLOAD_BYTES = 2**30, 2 * 2**30  # free bytes that a run and a download of a small model take at most
END = "<|im_end|>"
MAX_HEADER_BYTES = 2**26  # of a weights file
DOWNLOAD = "hf download OWNER/NAME --local-dir FOLDER gets the model again; Qwen2, Qwen2.5 and Qwen3 are trained here"

OTHER_MODEL = "give another --model: Qwen2, Qwen2.5 and Qwen3 are trained here, for example Qwen/Qwen3-0.6B"


@dataclass(frozen=True)
class Finding:
    """What a check found; FAIL: a run needs it, note: it works without. fix: what to do, on one line."""

    state: Literal["ok", "note", "FAIL"]
    name: str
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Asked:
    """What is to be examined: a model (a folder or a hub name) or none, and the folder that runs are to go to."""

    model: str | None
    output_dir: str

    @property
    def name(self) -> str:
        """The model that would be trained."""
        return self.model or TrainConfig.model

    def folder(self) -> Path | None:
        """Where that model is: the folder itself, or a complete copy in the cache; None when it is in neither."""
        from minilora.models.load import cached_model

        path = Path(os.path.expanduser(self.name))
        return path if self.is_folder else cached_model(self.name)

    @property
    def is_folder(self) -> bool:
        """Whether the model needs no hub."""
        return os.path.isdir(os.path.expanduser(self.name))


def doctor(asked: Asked) -> int:
    """Examine everything, print the findings; 0 when all that is needed is there, else 1."""
    name = asked.model or ""
    if name and not asked.is_folder and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ModelError(f"model {name!r}: there is no such folder, and it is no hub name (OWNER/NAME).")
    findings = []
    for finding in examine(asked):
        findings.append(finding)
        print(f"{finding.state:<5} {finding.name:<17} {printable(finding.text)}")
        if finding.fix:
            print(f"{'':<5} {'  fix':<17} {printable(finding.fix)}", flush=True)
    failed = sum(finding.state == "FAIL" for finding in findings)
    print(f"\n{failed} of {len(findings)} checks failed." if failed else "\nAll that is needed is there.")
    return 1 if failed else 0


def examine(asked: Asked) -> Iterator[Finding]:
    """The findings of all checks; one that breaks is a finding too."""
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
            what = f"could not be examined: {type(error).__name__}: {error}"
            yield Finding("FAIL", name, what, "report it to the project, with this line")


# ---------------------------------------------------------------------------------------- Python and packages


def declared() -> tuple[str, dict[str, list[str]]]:
    """(the least Python, requirements by extra, "" for those always needed), of clone or package, or nothing."""
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
    """The leading numbers of a version, to compare it by; 5.17 and 5.17.0 are the same."""
    found = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in found[0].split(".")] if found else []
    while parts[1:] and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def project(requirement: str) -> str:
    """The name in a requirement."""
    found = re.match(r"[\w.-]+", requirement)
    return found[0] if found else requirement


def lacking(requirement: str) -> str:
    """Why `name>=version` is not met, empty when it is."""
    name, least = project(requirement), requirement.partition(">=")[2]
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"{name} is not installed"
    return f"{name} {installed} is older than {least}" if numbers(installed) < numbers(least) else ""


def python(asked: Asked) -> Iterator[Finding]:
    """This Python."""
    least = declared()[0].removeprefix(">=")
    mine = ".".join(map(str, sys.version_info[:3]))
    if numbers(mine) < numbers(least):
        fix = f"make an environment of a newer Python: python{least} -m venv venv"
        yield Finding("FAIL", "python", f"{mine} is older than {least}", fix)
    else:
        yield Finding("ok", "python", mine)


def packages(asked: Asked) -> Iterator[Finding]:
    """What every run imports, and the extras."""
    needed = declared()[1]
    if not needed:
        what = "which versions are needed is not known: this is neither a clone nor installed"
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
            yield Finding("note", f"extra {extra}", f"{', '.join(missing.values())}; no run needs it", fix)
        else:
            yield Finding("ok", f"extra {extra}", "is there")


# ---------------------------------------------------------------------------------------- the device


def device(asked: Asked) -> Iterator[Finding]:
    """Whether torch's build and the driver fit each other."""
    import torch

    from minilora.utils.device import cuda_problem, driver_cuda

    build, driver = torch.version.cuda, driver_cuda()
    what, fix = cuda_problem()
    if getattr(torch.version, "hip", None):
        yield Finding("ok", "device", f"torch {torch.__version__} for ROCm {torch.version.hip}: not examined further")
    elif what:
        yield Finding("FAIL", "device", what, fix)
    elif driver is None:
        what = f"built for CUDA {build}" if build else "built for the CPU"
        fix = "where there is an NVIDIA card: install its driver; nvidia-smi must list the card" if build else ""
        yield Finding("note" if build else "ok", "device", f"torch is {what}; no NVIDIA driver: the CPU trains", fix)
    else:
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        named = ", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards)
        yield Finding("ok", "device", f"{named}; torch for CUDA {build}, driver for {driver[0]}.{driver[1]}")


def bf16(asked: Asked) -> Iterator[Finding]:
    """Whether the device multiplies in bfloat16."""
    import torch

    from minilora.utils.device import pick_device, pick_dtype

    place = pick_device("auto")
    if pick_dtype("auto", place) == torch.bfloat16:
        yield Finding("ok", "bf16", f"{place.type} multiplies in bfloat16")
    else:
        fix = "nothing to mend; a card of NVIDIA's Ampere generation or later, or a CPU with avx512_bf16, has it"
        yield Finding("note", "bf16", f"{place.type} has no bfloat16: float32, slower and twice as large", fix)


def bitsandbytes(asked: Asked) -> Iterator[Finding]:
    """Whether bitsandbytes, where it is installed, has a library for torch's CUDA."""
    import torch

    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or not spec.submodule_search_locations:
        yield Finding("note", "bitsandbytes", "not installed: no 4-bit bases", "pip install -U bitsandbytes")
        return
    version = importlib.metadata.version("bitsandbytes")
    folder, build = Path(spec.submodule_search_locations[0]), torch.version.cuda
    library = f"libbitsandbytes_cuda{(build or '').replace('.', '')}.so"
    if build and not (folder / library).exists():
        what = f"{version} has no library for torch's CUDA {build} ({library})"
        yield Finding("note", "bitsandbytes", what, "pip install -U bitsandbytes, or torch's build for another CUDA")
    else:
        yield Finding("ok", "bitsandbytes", f"{version}" + ("" if build else ", on the CPU"))


# ---------------------------------------------------------------------------------------- folders and the hub


def cannot_write(folder: Path) -> str:
    """Why files cannot be written to a folder, or one cannot be made; empty when they can. Leaves nothing behind."""
    place = standing(folder)
    if not place.is_dir():
        return f"{place} is no folder"
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        return f"{place}: {error.strerror}"
    return ""


def standing(folder: Path) -> Path:
    """The nearest of a path and what is above it that exists."""
    folder = Path(os.path.abspath(os.path.expanduser(folder)))
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def little_space(folder: Path, needed: int) -> str:
    """Says how much is free where less than `needed` bytes are."""
    free = shutil.disk_usage(standing(folder)).free
    return f"{free / 2**30:.2f} GiB free, {needed / 2**30:g} GiB needed" if free < needed else ""


def output(asked: Asked) -> Iterator[Finding]:
    """Whether a run can be written."""
    folder = Path(asked.output_dir)
    fix = "choose another place: --output_dir DIR"
    if why := cannot_write(folder):
        yield Finding("FAIL", "output folder", f"{folder} cannot be written: {why}", fix)
    elif why := little_space(folder, OUTPUT_BYTES):
        yield Finding("FAIL", "output folder", f"{folder}: {why}", f"free some space, or {fix}")
    else:
        free = shutil.disk_usage(standing(folder)).free
        yield Finding("ok", "output folder", f"{folder} can be written, {free / 2**30:.0f} GiB free")


def compile_cache(asked: Asked) -> Iterator[Finding]:
    """Whether the folder for compiled code, where one is named, can be written: without it transformers is unusable."""
    from minilora.utils.device import compile_cache_problem

    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if named and (compile_cache_problem() or cannot_write(Path(named))):
        what = f"TORCHINDUCTOR_CACHE_DIR = {named!r} cannot be written"
        yield Finding("FAIL", "compile cache", what, "unset TORCHINDUCTOR_CACHE_DIR, or set it to another folder")


def cache(asked: Asked) -> Iterator[Finding]:
    """Whether a model can be downloaded: the cache can be written and has space. A note where none has to be."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    failed: Literal["note", "FAIL"] = "FAIL" if asked.folder() is None else "note"
    fix = "export HF_HOME=FOLDER chooses another place"
    if why := cannot_write(folder):
        yield Finding(failed, "cache", f"{folder} cannot be written: {why}", fix)
    elif why := little_space(folder, DOWNLOAD_BYTES):
        yield Finding(failed, "cache", f"{folder}: {why}", f"free some space, or {fix}")
    else:
        yield Finding("ok", "cache", f"{folder} can be written")


def hub(asked: Asked) -> Iterator[Finding]:
    """Whether the model can be had: from its folder, the cache or the hub."""
    from minilora.models.load import hub_answers

    if asked.folder() is not None:
        yield Finding("ok", "hub", f"not needed: {asked.name} is here")
        return
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
    if why := "HF_HUB_OFFLINE is set" if offline else hub_answers(asked.name):
        fix = "--model FOLDER, or unset HF_HUB_OFFLINE" if offline else "--model FOLDER, or HF_ENDPOINT=URL of a mirror"
        what = f"{asked.name} is not in the cache, and {why}"
        state: Literal["note", "FAIL"] = "FAIL" if asked.model else "note"
        yield Finding(state, "hub", what + ("" if asked.model else "; the demo needs no hub"), fix)
    else:
        yield Finding("ok", "hub", f"answers; the first run downloads {asked.name}")


# ---------------------------------------------------------------------------------------- the model's files


def tokenizer(asked: Asked) -> Iterator[Finding]:
    """Whether text becomes tokens, the pad token is not the end token, and answers end where they should."""
    if (folder := asked.folder()) is None:
        return
    from minilora.data.markup import ChatMarkup
    from minilora.models.load import load_tokenizer, read_config_json, what_else

    try:
        embedded = read_config_json(folder).get("vocab_size")
    except ModelError:
        return  # the check of the weights reports it
    if what_else(folder):
        return
    loaded = load_tokenizer(folder)
    markup = ChatMarkup(loaded)
    if (written := written_pad(folder)) != loaded.pad_token:
        what = f"{written} in the files; runs here pad with {loaded.pad_token}, others may never learn the end"
        fix = f'"pad_token": "{loaded.pad_token}" in {folder / "tokenizer_config.json"}'
        yield Finding("note", "pad token", what, fix)
    else:
        yield Finding("ok", "pad token", f"{loaded.pad_token} ({loaded.pad_token_id}), not the end token")
    if isinstance(embedded, int) and markup.end >= embedded:
        what = f"{END} has id {markup.end}, of {embedded} that the model embeds: the tokenizer is not this model's"
        yield Finding("FAIL", "end token", what, DOWNLOAD)
    else:
        yield end_token(folder, markup.end)


def written_pad(folder: Path) -> str | None:
    """The pad token that tokenizer_config.json names. Raises ValueError for a file that is no JSON."""
    from minilora.utils import files

    path = folder / "tokenizer_config.json"
    pad = files.read_json(path).get("pad_token") if path.exists() else None
    pad = pad.get("content") if isinstance(pad, dict) else pad
    return pad if isinstance(pad, str) else None


def end_token(folder: Path, end: int) -> Finding:
    """Whether programs that follow generation_config.json stop where the answer ends."""
    from minilora.utils import files

    path = folder / "generation_config.json"
    ends: Any = files.read_json(path).get("eos_token_id") if path.exists() else None
    if end in (ends if isinstance(ends, list) else [ends]):
        return Finding("ok", "end token", f"{END} ({end})")
    what = f"{path.name} does not name {END} ({end}): answers here stop there, those of other programs may not"
    return Finding("note", "end token", what, f'"eos_token_id": [{end}] in {path}')


def weights(asked: Asked) -> Iterator[Finding]:
    """Whether the model is of a kind that is trained here, and its weights are whole."""
    if (folder := asked.folder()) is None:
        what = f"not examined: {asked.name} is not here" if asked.model else "none given: --model NAME examines one"
        yield Finding("ok", "model", what)
        return
    from minilora.models.load import num_layers, weight_files, what_else

    if hint := what_else(folder):
        yield Finding("FAIL", "model", f"{folder} is no model folder", hint)
        return
    layers = num_layers(folder)
    paths = weight_files(folder)
    problems = [f"{path.name}: {why}" for path in paths if (why := not_whole(path))]
    problems += [] if problems else misplaced(folder)
    if problems:
        pickled = any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors"))
        fix = "only .bin files are there: get the model's safetensors files" if pickled else DOWNLOAD
        yield Finding("FAIL", "weights", f"{folder}: {'; '.join(problems[:3])}", fix)
    else:
        size = sum(path.stat().st_size for path in paths)
        yield Finding("ok", "weights", f"{layers} layers in {len(paths)} file(s), {size / 2**30:.2f} GiB, whole")


def not_whole(path: Path) -> str:
    """What is wrong with a safetensors file, by its header and its size."""
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
    """Tensors that the index places in a file that does not have them; nothing where there is no index."""
    from minilora.utils import files

    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return []
    places: dict[str, str] = files.read_json(index)["weight_map"]
    headers = {name: files.safetensors_header(folder / name, MAX_HEADER_BYTES) for name in set(places.values())}
    return [f"{name}: {tensor} is missing" for tensor, name in places.items() if tensor not in headers[name]]


CHECKS: tuple[Callable[[Asked], Iterator[Finding]], ...] = (
    *(python, packages, device, compile_cache, bf16, bitsandbytes, output, cache, hub, tokenizer, weights),
)
