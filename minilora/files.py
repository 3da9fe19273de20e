"""Writing so that no reader meets half of a file or folder: a crash at any moment leaves the old or the new."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minilora.errors import StorageError

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
        raise StorageError(f"{where}: cannot be written: {error.strerror}. What was saved before is intact.") from error


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file and force it to the disk."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)  # the umask applies
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
    """Put a folder in the place of another, which comes back should that fail."""
    if not path.is_dir():
        os.rename(new, path)
        return
    old = path.with_name(f".{path.name}.removed")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it; under its own name it is gone at once, not piece by piece."""
    if not path.is_dir():
        return
    doomed = path.with_name(f".{path.name.lstrip('.')}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def json_chunks(value: object) -> Iterator[bytes]:
    """A value as readable JSON."""
    yield (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def safetensors_chunks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """These tensors as a safetensors file."""
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return lazy_safetensors_chunks(specs, tensors.__getitem__, metadata)


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
