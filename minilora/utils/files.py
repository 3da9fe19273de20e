"""Functions that write files atomically and read untrusted files."""

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
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes per element
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
    """The entry of a file in a manifest."""

    size: int
    sha256: str


@contextmanager
def storage_errors(path: Path, saved_before: bool = False) -> Iterator[None]:
    """Inside this block, an OSError becomes a StorageError that names the path and the reason.

    saved_before: whether there is something to lose, even if the path does not exist yet
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        failed, there = Path(str(error.filename or path)), os.path.lexists(path)
        # a copy that fails names its source first; a temporary name, or one in a folder to come, helps nobody
        if error.filename2 or aside_of(path).name in failed.parts or (failed.is_relative_to(path) and not there):
            failed = path
        reason = f"{failed}: cannot be written: {error.strerror}"
        intact = " What was saved before is intact." if saved_before or there else ""
        raise StorageError(f"{reason}.{intact}", reason) from error


def denied(path: Path) -> bool:
    """Whether the user may not even look whether a path exists."""
    try:
        os.stat(path)
    except PermissionError:
        return True
    except (OSError, ValueError):
        pass
    return False


def aside_of(path: Path) -> Path:
    """The temporary name under which a file or a folder is written before it is renamed to `path`."""
    return path.with_name(f".{path.name}.partial")


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file and flush it to the disk (fsync)."""
    digest, size = hashlib.sha256(), 0
    with suppress(FileNotFoundError):
        os.unlink(path)  # the path may be a link, and its target must not be overwritten
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
    """Write a temporary file and rename it into place. A reader sees the old content or the new, never a part."""
    temporary = aside_of(path)
    with storage_errors(path):
        try:
            record = write_file(temporary, chunks)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)
    return record


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder (creations, renames) to the disk (fsync)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: Path, saved_before: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill. If the block succeeds, it is renamed to `path`; else it is deleted.

    saved_before: as in `storage_errors`
    """
    temporary = aside_of(path)
    with storage_errors(path, saved_before):
        os.makedirs(path.parent, exist_ok=True)
        remove_folder(temporary)
        os.mkdir(temporary)
        try:
            yield temporary
            sync_folder(temporary)
            _exchange(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _exchange(new: Path, path: Path) -> None:
    """Replace a folder by another: with one atomic exchange where the system has it, else with two renames."""
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
    sync_folder(path.parent)  # the new name is on the disk before the old content is deleted
    shutil.rmtree(old, ignore_errors=True)


def _swap(one: Path, other: Path) -> bool:
    """Exchange two names atomically (Linux: renameat2(2), RENAME_EXCHANGE). Returns False where that fails."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, exchange = -100, 2
    return rename is not None and rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0


def remove_folder(path: Path) -> None:
    """Delete a folder and its content. It is renamed first, so no reader finds a half-deleted folder."""
    if not path.is_dir():
        return
    renamed = path.with_name(f".{path.name.lstrip('.')}.removed")
    shutil.rmtree(renamed, ignore_errors=True)
    os.rename(path, renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Delete the half-written and half-deleted entries that killed processes left in a folder."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name.startswith(".") and entry.name.endswith((".partial", ".removed")):
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else os.unlink(entry)


def read_bytes(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a regular file of at most max_bytes. Never waits for a pipe. Raises ValueError with the reason."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("not a regular file")
            content = file.read(min(status.st_size, max_bytes) + 1)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    if len(content) > max_bytes:
        raise ValueError(f"larger than {max_bytes:,} bytes")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of limited size and depth. Raises ValueError with the reason."""
    content = read_bytes(path)
    depth = deepest = 0
    for byte in content:  # brackets inside strings count too, so this is an upper bound
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
    """The header of a safetensors file, at most max_bytes long. Raises ValueError with the reason."""
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
        raise ValueError("not a safetensors file: its header is not a JSON object")
    return header


def read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The floating-point tensors of a safetensors file that must hold exactly these names and shapes.

    Raises ValueError before any tensor is read. The message lists missing and extra tensors and wrong shapes.
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
        f"dtype of {name}: {dtype}, not floating-point" for name, (dtype, _) in found.items() if dtype not in FLOATS
    ]
    if wrong:
        more = [f"... and {len(wrong) - 20} more"] if len(wrong) > 20 else []
        raise ValueError("does not fit this model:\n  " + "\n  ".join(wrong[:20] + more))
    expected = sum(math.prod(shape) * FLOATS[found[name][0]] for name, shape in shapes.items())
    try:
        if path.stat().st_size > 2**21 + 1024 * len(shapes) + expected:
            raise ValueError("the file is larger than its tensors")
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise ValueError(str(error)) from error


def json_chunks(value: object) -> Iterator[bytes]:
    """A value as indented JSON."""
    yield (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def safetensors_chunks(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Iterator[bytes | memoryview]:
    """These tensors as a safetensors file. `gather` makes each a full tensor just before it is written."""
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return lazy_safetensors_chunks(specs, lambda name: gather(tensors[name]), metadata)


def lazy_safetensors_chunks(
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    fetch: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> Iterator[bytes | memoryview]:
    """A safetensors file of tensors with these dtypes and shapes. Each tensor is fetched just before it is written.

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
