"""Recognises files that are not text by their first bytes, and says how to convert them to JSONL."""

import re
import shlex

_ARROW = "import json, sys, pyarrow%s; [print(json.dumps(row, default=str)) for row in %s.to_pylist()]"
PARQUET = "python -c " + shlex.quote(_ARROW % (".parquet", "pyarrow.parquet.read_table(sys.argv[1])"))
ARROW_FILE = "python -c " + shlex.quote(_ARROW % (".feather", "pyarrow.feather.read_table(sys.argv[1])"))
ARROW_STREAM = "python -c " + shlex.quote(_ARROW % ("", "pyarrow.ipc.open_stream(sys.argv[1]).read_all()"))
NEEDS_PYARROW = " (it needs: pip install pyarrow)"

KINDS: tuple[tuple[bytes, str, str], ...] = (  # (first bytes, what it is, what to do)
    (rb"PAR1", "a Parquet file", PARQUET + " {file} > new.jsonl converts it" + NEEDS_PYARROW),
    (rb"ARROW1", "an Arrow file", ARROW_FILE + " {file} > new.jsonl converts it" + NEEDS_PYARROW),
    (rb"\xff{4}.{3}\0", "an Arrow stream", ARROW_STREAM + " {file} > new.jsonl converts it" + NEEDS_PYARROW),
    (rb"\x1f\x8b", "a gzip file without the ending .gz", "mv {file} {file}.gz gives it its name"),
    (rb"PK\x03\x04.{26}(\[Content_Types\]|_rels/|xl/|docProps/)", "an Office file", "save its table as CSV (UTF-8)"),
    (rb"PK\x03\x04", "a zip archive", "unzip {file} unpacks it"),
    (rb"\x28\xb5\x2f\xfd", "a zstd file", "zstd -dc {file} > new.jsonl unpacks it"),
    (rb"\xfd7zXZ\0", "an xz file", "xz -dc {file} > new.jsonl unpacks it"),
    (rb"BZh[1-9]1AY&SY", "a bzip2 file", "bzip2 -dc {file} > new.jsonl unpacks it"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x {file} unpacks it"),
    (rb".{257}ustar", "a tar archive", "tar -xf {file} unpacks it"),
    (rb"SQLite format 3\0", "an SQLite database", "export the table as JSON, one object a line"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office file", "save its table as CSV (UTF-8)"),
    (rb"%PDF-", "a PDF file", ""),
    (rb"\x89PNG\r\n", "a PNG image", ""),
    (rb"\xff\xd8\xff", "a JPEG image", ""),
    (rb"GIF8[79]a", "a GIF image", ""),
    (rb"\x93NUMPY", "a NumPy file", ""),
    (rb"\x89HDF\r\n", "an HDF5 file", ""),
    (rb"\x80[\x02-\x05]", "a pickle, which is never read", ""),
    (rb"GGUF[\x01-\x0f]\0\0\0", "a GGUF model", ""),
    (rb".{2,4}\0{4,6}\{\"", "a safetensors file", ""),
    (rb"\x7fELF", "a program", ""),
)
NOT_IN_TEXT = re.compile(rb"[\0-\x08\x0e-\x1a]")  # no UTF-8, GBK or Latin-1 text holds these


def binary_file(path: str, start: bytes) -> str:
    """A message that says what a file with these first bytes is and what to do. Empty if it may be text."""
    for pattern, kind, advice in KINDS:
        if re.match(pattern, start, re.DOTALL):
            return needs_text(path, kind, advice)
    return ""


def unpacked(path: str) -> tuple[str, str]:
    """(a command that unpacks a .gz file or an empty text, the name of the unpacked file), quoted for a shell."""
    return f"gunzip -k {shlex.quote(path)} && " * path.endswith(".gz"), shlex.quote(path.removesuffix(".gz"))


def needs_text(path: str, kind: str, advice: str) -> str:
    """The message for a file that is not JSONL."""
    unpack, name = unpacked(path)
    end = f": {unpack * ('{file}' in advice)}{advice.format(file=name)}" if advice else "."
    return f"{path}: this is {kind}; JSONL is needed, one JSON object a line{end}"
