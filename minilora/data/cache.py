"""A large training file is tokenised once: its examples stay in files, and are found again by all that made them.

Small files are tokenised in memory, each time anew.
"""

import fcntl
import gc
import hashlib
import json
import os
import resource
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import tokenizers
from tqdm import tqdm

from minilora.data import dataset, rows
from minilora.data.dataset import DTYPES, Columns, Dataset, FileColumn, describe, of_file, tokenized
from minilora.data.markup import ChatMarkup
from minilora.data.report import DataReport
from minilora.data.rows import stream_rows
from minilora.errors import DataError, StorageError
from minilora.utils import files
from minilora.utils.terminal import is_quiet

CACHE_FROM_BYTES = 16 * 2**20  # of a file: what is smaller takes seconds, and is not worth a copy on the disk
UNPACKED = 8  # bytes of text that a byte of a .gz may stand for
INDEX = "index.json"
MAX_INDEX_BYTES = 2**30  # it names every line that was left out
BLOCK_BYTES = 2**20


def is_large(path: str) -> bool:
    """Whether the examples of this file are to be kept in a cache."""
    try:
        return os.stat(path).st_size * (UNPACKED if path.endswith(".gz") else 1) >= CACHE_FROM_BYTES
    except OSError:
        return False  # reading it will say why


def cache_folder() -> Path:
    """Where caches lie: $XDG_CACHE_HOME/minilora/tokens, by default in ~/.cache. They may be deleted at any time."""
    asked = os.environ.get("XDG_CACHE_HOME", "")
    return Path(asked if os.path.isabs(asked) else os.path.expanduser("~/.cache")) / "minilora" / "tokens"


def cached(report: DataReport, markup: ChatMarkup, on_bad_rows: str, how: Mapping[str, Any]) -> Dataset:
    """All examples of the file `report.file`, whose hash is known; how: the settings that `tokenized` takes.

    `report` gets what happened to its lines. Raises DataError, as reading and tokenising do, and StorageError where
    the cache cannot be written.
    """
    made_of = {"code": _code(), "file": report.sha256, "tokenizer": markup.sha256, "on_bad_rows": on_bad_rows, **how}
    made_of["packed"] = report.file.endswith(".gz")
    place = cache_folder() / hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a file has six columns, and there may be many files
    if (found := _open(place, report)) is None:
        with _alone(place):  # of several processes one builds, the others wait for it
            if (found := _open(place, report)) is None:
                _build(place, report, tokenized(_progress(report, on_bad_rows), markup, report, **how))
                found = _open(place, report)
    if found is None:
        raise StorageError(f"{place} cannot be read back: the disk may be damaged")
    return found


def _code() -> str:
    """What turns a file into examples, as it is now: after a change of it old caches are not taken."""
    sources = [Path(module.__file__ or "").read_bytes() for module in (rows, dataset)]
    return hashlib.sha256(b"".join([tokenizers.__version__.encode(), *sources])).hexdigest()


def _open(place: Path, report: DataReport) -> Dataset | None:
    """What the cache in this folder holds; `report` gets what was told when it was made. None: it is not whole."""
    try:
        content = json.loads(files.read_bytes(place / INDEX, MAX_INDEX_BYTES))
        told, sums = content["report"], [_checksum(place / name) for name in Columns._fields]
        if content != _index(told, sums):
            return None
        columns = _columns(place)
        before = told.pop("file")
        told["bad"] = [report.file + reason.removeprefix(before) for reason in told["bad"]]
        for name, value in told.items():
            setattr(report, name, Counter(value) if name == "unread" else value)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return of_file(report.file, columns)


def _columns(folder: Path) -> Columns:
    return Columns(*(FileColumn(folder / name, dtype) for name, dtype in zip(Columns._fields, DTYPES, strict=True)))


def _build(place: Path, report: DataReport, parts: Iterator[Columns]) -> None:
    """Write a cache aside and move it into place when it is whole."""
    expected, tokens = report.sha256, 0
    if place.is_file():  # something else in its place
        with files.storage_errors(place):
            os.unlink(place)
    with files.new_folder(place) as aside:
        with ExitStack() as opened:
            outs = [opened.enter_context(open(aside / name, "xb")) for name in Columns._fields]
            for part in _uncollected(parts):
                for out, column in zip(outs, part._replace(ends=part.ends[:] + tokens), strict=True):
                    out.write(column[:].tobytes())
                tokens += len(part.ids)
            for out in outs:
                _to_disk(out)
        if report.sha256 != expected:
            raise DataError(f"{report.file} was changed while it was read. Start again.")
        describe(of_file(report.file, _columns(aside)), report)
        index = _index(vars(report), [_checksum(aside / name) for name in Columns._fields])
        files.write_file(aside / INDEX, [json.dumps(index).encode()])  # escaped: names of fields may be no UTF-8


def _index(report: dict[str, Any], sums: list[int]) -> dict[str, Any]:
    """What stands beside the columns: what happened to the file's lines, and the checksum of this and of them."""
    text = json.dumps([report, sums], sort_keys=True)
    return {"report": report, "checksum": zlib.crc32(text.encode())}


def _uncollected(parts: Iterator[Columns]) -> Iterator[Columns]:
    """The parts, made without searching for cycles: there are none among millions of pieces of text."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield from parts
    finally:
        if before:
            gc.enable()


def _to_disk(out: BinaryIO) -> None:
    out.flush()
    os.fsync(out.fileno())


def _checksum(path: Path) -> int:
    found = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            found = zlib.crc32(block, found)
    return found


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """No other process builds this cache meanwhile; the kernel frees the lock of one that dies."""
    with files.storage_errors(place.parent):
        os.makedirs(place.parent.parent, exist_ok=True)
        place.parent.mkdir(mode=0o700, exist_ok=True)  # the rows may not be everyone's to read
        descriptor = os.open(place.with_name(f".{place.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        with files.storage_errors(place.parent):  # not every file system has locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _progress(report: DataReport, on_bad_rows: str) -> Iterator[Any]:
    """The rows of a file, with a bar where somebody looks."""
    rows = stream_rows(report, on_bad_rows)
    return iter(tqdm(rows, desc=f"tokenising {report.file}", unit=" rows", disable=is_quiet() or None, leave=False))
