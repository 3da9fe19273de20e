"""A file that is wrong as a whole gets one line that says what it is, and a command that mends it."""

import gzip
import io
import json
import os
import pickle
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from minilora import cli, demo
from minilora.data.rows import read_rows
from minilora.errors import DataError
from minilora.inference.answer_file import read_questions

ROWS = [{"instruction": "红", "output": "大 stone"}, {"instruction": "天气，好", "output": "水 火"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PROSE = "Once upon a time, there was a river.\n\nIt was cold.\n[1] A note.\n" * 40


def packed_as(kind: str) -> bytes:
    """A file of this kind that holds rows or anything else."""
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            file.writestr("rows.jsonl", JSONL)
    elif kind == "xlsx":
        with zipfile.ZipFile(out, "w") as file:
            entry = zipfile.ZipInfo("[Content_Types].xml", (1980, 1, 1, 0, 0, 20))  # a time with the byte of a line end
            file.writestr(entry, "<x/>")
    elif kind == "tar":
        with tarfile.open(fileobj=out, mode="w") as file:
            entry = tarfile.TarInfo("rows.jsonl")
            entry.size = len(JSONL)
            file.addfile(entry, io.BytesIO(JSONL))
    elif kind == "numpy":
        np.save(out, np.arange(3))
    elif kind == "sqlite":
        base = sqlite3.connect(":memory:")
        base.execute("create table a (b)")
        return base.serialize()
    return out.getvalue()


BINARY = {
    "a gzip file": gzip.compress(JSONL),
    "a zip archive": packed_as("zip"),
    "an Office file": packed_as("xlsx"),
    "a tar archive": packed_as("tar"),
    "a NumPy file": packed_as("numpy"),
    "a pickle": pickle.dumps(ROWS),
    "an SQLite database": packed_as("sqlite"),
    "a PNG image": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "a PDF file": b"%PDF-1.7\n%\xe2\xe3\n1 0 obj\n",
    "a zstd file": b"\x28\xb5\x2f\xfd\x24\x10",
    "a safetensors file": (demo.DEMO_DIR / "model.safetensors").read_bytes()[:5000],
    "a GGUF model": b"GGUF\x03\0\0\0\x01",
    "a binary file": b"\x13\x8a\0\x01" * 300 + b"\n" + b"\x9f\0\x02" * 50,
    "a Parquet file": b"PAR1\x15\x04\x15\n\0\x8a\n",
}


def said_of(path, read=read_rows, *more):
    with pytest.raises(DataError) as caught:
        read(path, *more)
    return str(caught.value)


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("read", [read_rows, lambda path: read_rows(path, "skip"), read_questions])
def test_a_binary_file_is_called_what_it_is(name, read, tmp_path):
    """A Parquet file was once "not UTF-8, where the file is GBK", with a command that makes nothing of it."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(BINARY[name])
    message = said_of(file, read)
    assert message.startswith(f"{file}: this is {name}")
    assert "JSONL is needed, one JSON object a line" in message
    assert "\n" not in message


def test_no_text_is_called_binary(tmp_path):
    for content in (JSONL, JSONL.decode().encode("gb18030"), b"\x1b[31m" + JSONL, b"PK\n" + JSONL, PROSE.encode()):
        file = tmp_path / "rows.jsonl"
        file.write_bytes(content)
        try:
            read_rows(file, "skip")
        except DataError as error:
            assert "this is a binary file" not in str(error)
            assert "archive" not in str(error)


def mended(command, folder):
    """The rows that the command of a message makes."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    subprocess.run(command, shell=True, check=True, cwd=folder, env=os.environ | {"PATH": path})
    rows, _ = read_rows(folder / "new.jsonl")
    return [[turn.content for turn in row.turns] for row in rows]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream", "messages", "packed"])
def test_parquet_and_arrow_are_converted_by_the_command(kind, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, ipc, parquet

    file = tmp_path / "my rows.parquet"
    table = pyarrow.Table.from_pylist([{"messages": TALK}] if kind == "messages" else ROWS)
    if kind == "arrow":
        feather.write_feather(table, file)
    elif kind == "stream":
        with ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table)
    else:
        parquet.write_table(table, file)
    if kind == "packed":
        file = Path(f"{file}.gz")
        file.write_bytes(gzip.compress((tmp_path / "my rows.parquet").read_bytes()))
        (tmp_path / "my rows.parquet").unlink()
    message = said_of(file)
    command = re.search(r": ((?:gunzip|python) .*) converts it \(it needs: pip install pyarrow\)$", message)[1]
    texts = ["a", "b"] if kind == "messages" else None
    assert mended(command, tmp_path) == ([texts] if texts else [list(row.values()) for row in ROWS])


@pytest.mark.parametrize(
    ("name", "tool"), [("a gzip file", "mv"), ("a zip archive", "unzip"), ("a tar archive", "tar")]
)
def test_what_is_packed_is_unpacked_by_the_command(name, tool, tmp_path):
    file = tmp_path / "my file"
    file.write_bytes(BINARY[name])
    command = re.search(rf": ({tool} .*) (?:gives it its name|unpacks it)$", said_of(file))[1]
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    made = {"mv": "my file.gz"}.get(tool, "rows.jsonl")
    assert len(read_rows(tmp_path / made)[0]) == 2


INSIDE = {
    "data": ({"data": ROWS}, "in 'data'"),
    "beside others": ({"version": 1, "license": "x", "rows": ROWS}, "in 'rows'"),
    "the longest": ({"test": ROWS[:1], "train": ROWS}, "in 'train' (others: test)"),
    "values": (dict(zip("01", ROWS, strict=True)), "as its values"),
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
@pytest.mark.parametrize("name", INSIDE)
def test_rows_inside_one_object_are_found(name, encoding, indent, tmp_path):
    """`{"data": [...]}` was once answered with `jq -c .`, which gives the same object back."""
    value, words = INSIDE[name]
    file = tmp_path / "my rows.json"
    file.write_bytes(json.dumps(value, ensure_ascii=False, indent=indent).encode(encoding))
    for read in (read_rows, read_questions):
        message = said_of(file, read)
        assert f"this is one JSON object with the rows {words}; one object a line is needed" in message
        assert "\n" not in message
    command = re.search(r": (python .*) converts it$", message)[1]
    assert mended(command, tmp_path) == [list(row.values()) for row in ROWS]


@pytest.mark.parametrize(
    "value", [{"messages": TALK}, {"conversations": [{"from": "human", "value": "a"}] * 2}, ROWS[0]]
)
def test_one_conversation_is_not_taken_for_a_file_of_rows(value, tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(value, indent=1))
    assert "each of its objects has several lines; one object a line is needed: jq" in said_of(file)


def test_a_file_of_prose_gets_one_line(tmp_path):
    """There was once a line of "not one JSON value" for each of its lines."""
    file = tmp_path / "story.txt"
    file.write_text(PROSE)
    for read in (read_rows, read_questions):
        message = said_of(file, read)
        assert message.startswith(
            f"{file}: this is not JSONL; its first line is 'Once upon a time, there was a river.'. One"
        )
        assert "\n" not in message
    file.write_text('{"instruction": "a", "output": "b"\n{"instruction": "a", "output": "b"\n')  # damaged rows
    assert said_of(file).count("not one JSON value") == 2


def test_generate_recognises_an_array(tmp_path, tiny_folder, capsys):
    """`generate --input_file` once gave a bad line for each of its lines."""
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS, indent=1))
    flags = ["--model", tiny_folder, "--input_file", file, "--output_file", tmp_path / "out.jsonl"]
    assert cli.main(list(map(str, ["generate", *flags]))) == 2
    assert "this is a JSON array; one object a line is needed: python -c" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["preview"], ["eval", "--eval_file"]])
@pytest.mark.parametrize("name", ["*.jsonl", "a.jsonl,b.jsonl"])
def test_a_pattern_where_one_file_is_read_is_named(verb, name, tmp_path, tiny_folder, capsys):
    for each in ("a.jsonl", "b.jsonl"):
        (tmp_path / each).write_bytes(JSONL)
    assert cli.main([*verb, f"{tmp_path}/{name}", "--model", str(tiny_folder)]) == 2
    message = capsys.readouterr().err
    assert f"'{tmp_path}/{name}' may mean several files: give one." in message
