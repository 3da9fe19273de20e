"""Files: written so that no reader meets half of one, read as if a stranger had made them."""

import ctypes
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minilora.errors import StorageError

MAX_JSON_BYTES = 4 * 2**20
MAX_JSON_DEPTH = 64
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of a number
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of a file."""

    size: int
    sha256: str


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """An OSError inside becomes a StorageError that names the path and the reason."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        where = error.filename or path
        reason = f"{where}: cannot be written: {error.strerror}"
        raise StorageError(f"{reason}. What was saved before is intact.", reason) from error


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file and force it to the disk."""
    digest, size = hashlib.sha256(), 0
    with suppress(FileNotFoundError):
        os.unlink(path)  # it may be a link, planted or left over: what it points to is not ours
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # the umask applies
    try:
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            view = memoryview(chunk)
            while view:
                view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(size, digest.hexdigest())


def replace_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a file aside and move it into place: readers meet the old content or the new, never a part."""
    aside = path.with_name(f".{path.name}.partial")
    with storage_errors(path):
        try:
            record = write_file(aside, chunks)
            os.replace(aside, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(aside)
            raise
        sync_folder(path.parent)
    return record


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (creations, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder aside; when the block ends well it appears under `path` at once, else nothing does."""
    aside = path.with_name(f".{path.name}.partial")
    with storage_errors(path):
        os.makedirs(path.parent, exist_ok=True)
        remove_folder(aside)
        os.mkdir(aside)
        try:
            yield aside
            sync_folder(aside)
            _exchange(aside, path)
            sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def _exchange(new: Path, path: Path) -> None:
    """Put a folder in the place of another: at once where the system can, else by two renames."""
    if not path.is_dir():
        os.rename(new, path)
        return
    old = path.with_name(f".{path.name}.removed")
    shutil.rmtree(old, ignore_errors=True)
    if _swap(new, path):
        os.rename(new, old)
    else:
        os.rename(path, old)
        try:
            os.rename(new, path)
        except OSError:
            os.rename(old, path)
            raise
    sync_folder(path.parent)  # the new name is on the disk before the old content goes
    shutil.rmtree(old, ignore_errors=True)


def _swap(one: Path, other: Path) -> bool:
    """Let two names change places at once (Linux: renameat2(2), RENAME_EXCHANGE). False where that cannot be done."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, exchange = -100, 2
    return rename is not None and rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it; under its own name it is gone at once, not piece by piece."""
    if not path.is_dir():
        return
    doomed = path.with_name(f".{path.name.lstrip('.')}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left in a folder: half-written and half-removed entries."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name.startswith(".") and entry.name.endswith((".partial", ".removed")):
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else os.unlink(entry)


def read_bytes(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a regular file. Raises ValueError with the reason; never waits on a pipe, never fills the memory."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("not a regular file")
            content = file.read(min(found.st_size, max_bytes) + 1)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    if len(content) > max_bytes:
        raise ValueError(f"larger than {max_bytes:,} bytes")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of moderate size and depth. Raises ValueError with the reason."""
    content = read_bytes(path)
    depth = deepest = 0
    for byte in content:  # brackets in texts count too: a bound, not a measure
        depth += (byte in b"[{") - (byte in b"]}")
        deepest = max(deepest, depth)
    if deepest > MAX_JSON_DEPTH:
        raise ValueError("nested too deeply")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("a JSON object is needed")
    return value


def safetensors_header(path: Path, max_bytes: int) -> dict[str, Any]:
    """The header of a safetensors file that is no longer than max_bytes. Raises ValueError with the reason."""
    start = 8
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(start), "little")
            if size < start or length > size - start:
                raise ValueError("not a safetensors file: its header is longer than the file")
            if length > max_bytes:
                raise ValueError(f"its header has {length:,} bytes; at most {max_bytes:,} are read")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except RecursionError as error:
        raise ValueError("not a safetensors file: its header is nested too deeply") from error
    if not isinstance(header, dict):
        raise ValueError("not a safetensors file: its header is no object")
    return header


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The floating-point tensors of a safetensors file that must hold exactly these names and shapes.

    Raises ValueError that lists every missing, extra and misshapen tensor, before any of them is read.
    """
    header = safetensors_header(path, 2**18 + 1024 * len(shapes))
    header.pop("__metadata__", None)
    try:
        found = {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items()}
    except (TypeError, KeyError) as error:
        raise ValueError(f"not a safetensors file: {error!r}") from error
    wrong = [f"missing: {name} {shapes[name]}" for name in shapes if name not in found]
    wrong += [f"not of this model: {name} {found[name][1]}" for name in found if name not in shapes]
    wrong += [
        f"shape of {name}: {found[name][1]}, this model needs {shape}"
        for name, shape in shapes.items()
        if name in found and found[name][1] != shape
    ]
    wrong += [
        f"dtype of {name}: {dtype}, no floating point" for name, (dtype, _) in found.items() if dtype not in FLOATS
    ]
    if wrong:
        more = [f"... and {len(wrong) - 20} more"] if len(wrong) > 20 else []
        raise ValueError("does not fit this model:\n  " + "\n  ".join(wrong[:20] + more))
    expected = sum(math.prod(shape) * FLOATS[found[name][0]] for name, shape in shapes.items())
    try:
        if path.stat().st_size > 2**21 + 1024 * len(shapes) + expected:
            raise ValueError("it is larger than its tensors")
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise ValueError(str(error)) from error


def json_chunks(value: object) -> Iterator[bytes]:
    """A value as readable JSON."""
    yield (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def safetensors_chunks(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Iterator[bytes | memoryview]:
    """These tensors as a safetensors file; `gather` turns each into a whole one just before it is written."""
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return lazy_safetensors_chunks(specs, lambda name: gather(tensors[name]), metadata)


def lazy_safetensors_chunks(
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    fetch: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> Iterator[bytes | memoryview]:
    """A safetensors file of tensors with these dtypes and shapes, fetched one after the other as they are written.

    Format: https://github.com/huggingface/safetensors#format (8 bytes of header length, JSON header, raw data).
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in specs.items():
        size = math.prod(shape) * dtype.itemsize
        entry = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape)}
        header[name] = entry | {"data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name, spec in specs.items():
        tensor = fetch(name)
        assert (tensor.dtype, tuple(tensor.shape)) == spec, f"{name} is not what the header says"
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data
