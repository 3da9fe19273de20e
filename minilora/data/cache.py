"""Keeps the tokenised examples of large files on the disk, so that each large file is tokenised only once.

The key of a cache is a hash of everything that the examples depend on. Small files are tokenised in memory each time.
"""

import fcntl
import gc
import hashlib
import json
import os
import resource
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import tokenizers
from tqdm import tqdm

from minilora.data.dataset import (
    DTYPES,
    RENDER_VERSION,
    Columns,
    Dataset,
    FileColumn,
    describe,
    of_file,
    tokenized,
)
from minilora.data.formats import Row
from minilora.data.markup import ChatMarkup
from minilora.data.report import Cut, DataReport, Reading, Returned, put_together
from minilora.data.rows import stream_rows
from minilora.errors import DataError, StorageError
from minilora.utils import files
from minilora.utils.terminal import is_quiet

CACHE_FROM_BYTES = 16 * 2**20  # a smaller file is tokenised in seconds and needs no copy on the disk
UNPACKED = 8  # assumed bytes of text for each byte of a .gz file
INDEX = "index.json"
MAX_INDEX_BYTES = 2**30  # the index names every line that was left out
BLOCK_BYTES = 2**20


def is_large(path: str) -> bool:
    """Whether the examples of this file belong in a cache."""
    try:
        return os.stat(path).st_size * (UNPACKED if path.endswith(".gz") else 1) >= CACHE_FROM_BYTES
    except OSError:
        return False  # reading the file reports the reason


def cache_folder() -> Path:
    """The folder of the caches: $XDG_CACHE_HOME/minilora/tokens, by default in ~/.cache. You may delete it anytime."""
    asked = os.environ.get("XDG_CACHE_HOME", "")
    return Path(asked if os.path.isabs(asked) else os.path.expanduser("~/.cache")) / "minilora" / "tokens"


def cached(
    file: str, sha256: str, markup: ChatMarkup, on_bad_rows: str, settings: Mapping[str, Any]
) -> tuple[Dataset, DataReport]:
    """All examples of a file, and its report. They come from the cache, which is built first if it does not exist.

    sha256: the hash of the file; settings: those of `tokenized`
    Raises DataError as reading and tokenising do, and StorageError if the cache cannot be written.
    """
    made_of = {"render_version": RENDER_VERSION, "tokenizers": tokenizers.__version__, "tokenizer": markup.sha256}
    made_of |= {"file": sha256, "packed": file.endswith(".gz"), "on_bad_rows": on_bad_rows, **settings}
    place = cache_folder() / hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a file has six columns, and there may be many files
    if (found := _open(place, file)) is None:
        with _alone(place):  # one of several processes builds, the others wait for it
            if (found := _open(place, file)) is None:
                rows = Returned(stream_rows(file, on_bad_rows))
                parts = Returned(tokenized(_with_bar(rows, file), markup, file, **settings))
                _build(place, file, sha256, rows, parts)
                found = _open(place, file)
    if found is None:
        raise StorageError(f"{place} cannot be read back: the disk may be damaged")
    return found


def _open(place: Path, file: str) -> tuple[Dataset, DataReport] | None:
    """The content of the cache in this folder, with the present name of the file. None if the cache is not whole."""
    try:
        content = json.loads(files.read_bytes(place / INDEX, MAX_INDEX_BYTES))
        saved, sums = content["report"], [_checksum(place / name) for name in Columns._fields]
        if content != _index(saved, sums):
            return None
        columns = _columns(place)
        before = saved.pop("file")
        bad = tuple(file + reason.removeprefix(before) for reason in saved.pop("bad"))
        unread, notes = Counter(saved.pop("unread")), tuple(saved.pop("notes"))
        report = DataReport(file, bad=bad, unread=unread, notes=notes, **saved)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return of_file(file, columns), report


def _columns(folder: Path) -> Columns:
    return Columns(*(FileColumn(folder / name, dtype) for name, dtype in zip(Columns._fields, DTYPES, strict=True)))


def _build(place: Path, file: str, sha256: str, rows: Returned[Row, Reading], parts: Returned[Columns, Cut]) -> None:
    """Write a cache beside its place and move it there when it is whole. `parts` are made from `rows`."""
    tokens = 0
    if place.is_file():  # a file that is no cache
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
        if rows.result.sha256 != sha256:
            raise DataError(f"{file} was changed while it was read. Start again.")
        report = put_together(rows.result, parts.result, describe(of_file(file, _columns(aside))))
        index = _index(vars(report), [_checksum(aside / name) for name in Columns._fields])
        files.write_file(aside / INDEX, [json.dumps(index).encode()])  # ASCII: names of fields may not be valid UTF-8


def _index(report: dict[str, Any], sums: list[int]) -> dict[str, Any]:
    """The index beside the columns: the report of the file, and a checksum over the report and the columns."""
    text = json.dumps([report, sums], sort_keys=True)
    return {"report": report, "checksum": zlib.crc32(text.encode())}


def _uncollected(parts: Iterable[Columns]) -> Iterator[Columns]:
    """Yield the parts with the garbage collector off: the millions of pieces of text contain no reference cycles."""
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
    """Lock the cache, so that only one process builds it. If that process dies, the kernel releases the lock."""
    with files.storage_errors(place.parent):
        os.makedirs(place.parent.parent, exist_ok=True)
        place.parent.mkdir(mode=0o700, exist_ok=True)  # the rows may be private
        descriptor = os.open(place.with_name(f".{place.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        with files.storage_errors(place.parent):  # some file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _with_bar(rows: Iterable[Row], file: str) -> Iterable[Row]:
    """The rows of a file, with a progress bar in a terminal."""
    return tqdm(rows, desc=f"tokenising {file}", unit=" rows", disable=is_quiet() or None, leave=False)
