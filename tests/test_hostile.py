"""Files that someone made to do harm: one error of ours that names the file, soon, without much memory, and no more.

Nothing is read or written outside of the folders that were named, and nothing that lies in a file is ever run.
"""

import copy
import dataclasses
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import faults
import pytest
import torch
from conftest import CPU, save_random_adapter, write_jsonl
from safetensors.torch import load_file, save_file
from torch import nn

from minilora import cli, loop
from minilora.adapters import format as adapter_format
from minilora.adapters import merge
from minilora.config import FIELDS, TrainConfig, resolve
from minilora.data.formats import Turn
from minilora.data.rows import read_rows
from minilora.errors import AdapterError, CheckpointError, ConfigError, MiniloraError, ModelError
from minilora.inference.generate import Sampling, answer, load_chat_model
from minilora.lora import inject
from minilora.models import fingerprint
from minilora.models import load as loading
from minilora.optim import make_optimizer
from minilora.training import checkpoint, rundir
from minilora.training.checkpoint import MANIFEST, MOMENTS, STATE, WEIGHTS, Identity, TrainState
from minilora.utils import files

MAX_SECONDS = 1.0  # of this process's CPU: a busy machine is no fault of ours
MAX_BYTES = 200 * 2**20
MUTATIONS = 1000
IDENTITY = Identity(
    dataclasses.asdict(TrainConfig()) | {"target_modules": [], "train_weights": []}, "b" * 64, "d" * 64, {"torch": "2"}
)


def attempt(work, kinds=(MiniloraError,)) -> tuple[Exception | None, list[str]]:
    """(the error, what is wrong with it): it must be one of ours, within the limits of time and memory."""
    faults.forget_peak()
    before, started = faults.memory_now()[0], time.process_time()
    error, wrong = None, []
    try:
        work()
    except Exception as raised:
        error = raised
    seconds, more = time.process_time() - started, faults.memory_now()[1] - before
    if error is not None and not isinstance(error, kinds):
        wrong.append(f"{type(error).__name__}: {str(error)[:200]}")
    if seconds > MAX_SECONDS:
        wrong.append(f"took {seconds:.1f} s")
    if more > MAX_BYTES:
        wrong.append(f"took {more / 2**20:.0f} MB")
    return error, wrong


def guarded(work, seconds=2) -> dict:
    """work() in a child that is ended when it hangs and cannot take much memory: {"error", "kinds"}."""

    def limited():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + MAX_BYTES,) * 2)  # mapping a file takes no memory
        try:
            work()
        except Exception as error:
            return {"error": str(error), "kinds": [kind.__name__ for kind in type(error).__mro__]}
        return {"error": None, "kinds": []}

    code, answer = faults.forked(limited)
    return answer if code == 0 else {"error": f"ended with {code}: {answer}", "kinds": ["hung" if code < 0 else "died"]}


# ---------------------------------------------------------------------------------------- what is attacked


class Small:
    """A small model under AdamW and its checkpoint, signed anew after each change."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)
        self.optimizer = make_optimizer(self.model, 0.0)
        self.model(torch.ones(1, 4)).sum().backward()
        self.optimizer.step()

    def save(self, run: Path) -> Path:
        run.mkdir(parents=True, exist_ok=True)
        return checkpoint.save(run, self.model, self.optimizer, TrainState(step=1), IDENTITY, 0)

    def load(self, path: Path) -> TrainState:
        return checkpoint.load(path, self.model, self.optimizer, IDENTITY)


def sign(path: Path, manifest: dict | None = None, **changes) -> None:
    """Make the manifest agree with the files, as whoever made them would."""
    manifest = dict(manifest or json.loads((path / MANIFEST).read_text())) | changes
    if isinstance(manifest.get("files"), dict):
        for name in set(manifest["files"]) & {WEIGHTS, MOMENTS, STATE}:
            file = path / name
            if isinstance(manifest["files"][name], dict) and file.is_file():
                content = file.read_bytes() if file.stat().st_size < 2**24 else b""
                record = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                manifest["files"][name] = record | {k: v for k, v in changes.items() if k in record}
    manifest["sha256"] = checkpoint._own_sha256(manifest)
    (path / MANIFEST).write_bytes(b"".join(files.json_chunks(manifest)))


@pytest.fixture(scope="module")
def base(tiny_folder):
    return loading.load_model(tiny_folder, torch.float32, CPU)


@pytest.fixture(scope="module")
def good_adapter(tiny_folder, tmp_path_factory) -> Path:
    """The adapter of a tiny model, rank 2 on q_proj: 4 small tensors."""
    tiny = loading.load_model(tiny_folder, torch.float32, CPU)
    folder = tmp_path_factory.mktemp("good") / "adapter"
    save_random_adapter(tiny, folder, tiny_folder, ("q_proj",), rank=2, alpha=4)
    return folder


@pytest.fixture
def hostile(good_adapter, tmp_path) -> Path:
    """A copy of the adapter to be spoilt."""
    return Path(shutil.copytree(good_adapter, tmp_path / "hostile"))


def read_adapter(folder: Path, base) -> None:
    """Everything that loading an adapter reads, but for putting it into the model."""
    config = adapter_format.read_config(folder)
    adapter_format.check_base(folder, config, fingerprint.fingerprint(base), False)
    shapes = {
        f"{n}.weight": (m.out_features, m.in_features) for n, m in base.named_modules() if isinstance(m, nn.Linear)
    }
    adapter_format.read_updates(folder, config, shapes)


# ---------------------------------------------------------------------------------------- safetensors


def packed(header, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def spoilt_safetensors(whole: bytes, names: int = 100_000) -> dict[str, bytes]:
    """Hostile versions of a good file, by what is wrong with them."""
    size = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    tensors = sorted((n for n in header if n != "__metadata__"), key=lambda n: len(header[n]["shape"]) != 2)
    first, second = tensors[0], tensors[1]

    def changed(name=first, **keys) -> bytes:
        return packed(header | {name: header[name] | keys}, data)

    start, end = header[first]["data_offsets"]
    doubled = json.dumps(header)[:-1] + f", {json.dumps(first)}: {json.dumps(header[second])}}}"
    million = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(names)}
    return {
        "empty": b"",
        "one byte": b"\x00",
        "seven bytes": whole[:7],
        "a length and nothing": whole[:8],
        "header length 2^63": packed(header, data, 2**63),
        "header length 2^64 - 1": packed(header, data, 2**64 - 1),
        "header length 90 MB": packed(header, data, 90 * 2**20),
        "header length 0": packed(header, data, 0),
        "header longer than the file": packed(header, b"", len(whole)),
        "header is no JSON": packed(b"{" * size, data),
        "header is a list": packed(b"[1]", data),
        "header is null": packed(b"null", data),
        "header is no UTF-8": packed(b'{"\xff\xfe": 1}', data),
        "header nested 100,000 deep": packed(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, data),
        "header with NaN": packed(b'{"a": NaN}', data),
        "very many tensors": packed(million, b""),
        "20 MB of metadata": packed(header | {"__metadata__": {"base_fingerprint": "x" * 20_000_000}}, data),
        "metadata of numbers": packed(header | {"__metadata__": {"base_fingerprint": 7}}, data),
        "metadata is a list": packed(header | {"__metadata__": []}, data),
        "offsets out of range": changed(data_offsets=[start, 2**40]),
        "offsets beyond 64 bits": changed(data_offsets=[start, 2**70]),
        "offsets overlap": changed(second, data_offsets=[start, start + 4]),
        "offsets reversed": changed(data_offsets=[end, start]),
        "offsets negative": changed(data_offsets=[-4, end]),
        "offsets are text": changed(data_offsets=["0", "8"]),
        "offsets missing": packed(header | {first: {"dtype": "F32", "shape": [2, 64]}}, data),
        "a hole between tensors": packed(header, data + bytes(8)).replace(
            b'"data_offsets": [0, ', b'"data_offsets": [8, ', 1
        ),
        "bytes behind the last tensor": whole + b"\0" * 8,
        "truncated": whole[:-1],
        "half": whole[: len(whole) // 2],
        "dtype unknown": changed(dtype="F99"),
        "dtype is a number": changed(dtype=32),
        "dtype of another size": changed(dtype="F64"),
        "dtype of whole numbers": changed(dtype="I32"),
        "dtype of unsigned numbers": changed(dtype="U32"),
        "shape overflows": changed(shape=[2**62, 2**62]),
        "shape of 2^40 numbers": changed(shape=[2**20, 2**20]),
        "shape negative": changed(shape=[-2, -64]),
        "shape is text": changed(shape="2,64"),
        "shape transposed": changed(shape=[*header[first]["shape"][::-1], 1]),
        "shape of 100,000 dimensions": changed(shape=[1] * 100_000),
        "a name twice": packed(doubled.encode(), data),
        "a tensor missing": packed({k: v for k, v in header.items() if k != tensors[-1]}, data),
        "a tensor more": packed(header | {"evil": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, data),
        "a tensor renamed": packed({("evil" if k == first else k): v for k, v in header.items()}, data),
        "a pickle": pickle.dumps({"a": [1, 2, 3]}),
        "compressed zeros": zlib.compress(bytes(10**7)),
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    }


def places_in_its_stead(path: Path) -> dict:
    """What is no regular file, by name: functions that put it in the place of `path`."""
    return {
        "a folder": path.mkdir,
        "a link to /etc/passwd": lambda: path.symlink_to("/etc/passwd"),
        "a link to nothing": lambda: path.symlink_to("nowhere"),
        "a link to itself": lambda: path.symlink_to(path.name),
        "a pipe": lambda: os.mkfifo(path),
        "a link to /dev/zero": lambda: path.symlink_to("/dev/zero"),
        "a link to /dev/tty": lambda: path.symlink_to("/dev/tty"),
        "20 GB of nothing": lambda: (path.touch(), os.truncate(path, 20 * 2**30)),
        "nothing": lambda: None,
    }


def test_hostile_safetensors_as_an_adapter(hostile, base):
    path = hostile / adapter_format.WEIGHTS
    cases = spoilt_safetensors(path.read_bytes())
    read_adapter(hostile, base)
    bad = {}
    for what, content in cases.items():
        path.write_bytes(content)
        error, wrong = attempt(lambda: read_adapter(hostile, base), AdapterError)
        if error is None:
            wrong.append("loaded")
        elif str(path) not in str(error) and str(hostile) not in str(error):
            wrong.append(f"does not name the file: {str(error)[:200]}")
        if wrong:
            bad[what] = wrong
    print(f"\nhostile safetensors as an adapter: {len(cases) - len(bad)} of {len(cases)} refused")
    assert len(cases) >= 30
    assert not bad


def test_hostile_safetensors_in_a_checkpoint(tmp_path):
    """With a manifest that agrees with them."""
    small = Small()
    path = small.save(tmp_path)
    small.load(path)
    total, bad = 0, {}
    for name in (WEIGHTS, MOMENTS):
        whole = (path / name).read_bytes()
        for what, content in spoilt_safetensors(whole, names=20_000).items():
            total += 1
            (path / name).write_bytes(content)
            sign(path)
            before = small.model.weight.tolist()
            error, wrong = attempt(lambda: small.load(path), CheckpointError)
            if error is None:
                wrong.append("loaded")
            elif str(path) not in str(error):
                wrong.append(f"does not name the file: {str(error)[:200]}")
            if small.model.weight.tolist() != before:
                wrong.append("the model was changed")
            if wrong:
                bad[f"{name}: {what}"] = wrong
        (path / name).write_bytes(whole)
        sign(path)
        small.load(path)
    print(f"\nhostile safetensors in a checkpoint: {total - len(bad)} of {total} refused")
    assert not bad


def test_hostile_safetensors_as_a_base(tiny_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    harmless = ("dtype of whole numbers", "dtype of unsigned numbers", "20 MB of metadata", "a tensor more")
    bad = {}
    cases = {what: content for what, content in spoilt_safetensors(whole, names=3000).items() if what not in harmless}
    for what, content in cases.items():
        path.write_bytes(content)
        error, wrong = attempt(lambda: loading.load_model(folder, torch.float32, CPU), ModelError)
        if error is None:
            wrong.append("loaded")
        elif str(folder) not in str(error):
            wrong.append(f"does not name the folder: {str(error)[:200]}")
        if wrong:
            bad[what] = wrong
    print(f"\nhostile safetensors as a base: {len(cases) - len(bad)} of {len(cases)} refused")
    assert not bad


def test_what_is_no_file(hostile, base, tmp_path):
    """Pipes never end and /dev/zero neither: both once would have been read to their end."""
    small = Small()
    saved = small.save(tmp_path / "run")
    toml = tmp_path / "settings.toml"
    toml.write_text("seed = 1\n")
    run = tmp_path / "old"
    run.mkdir()
    (run / "config.json").write_text("{}")
    readers = {
        hostile / adapter_format.CONFIG: lambda: read_adapter(hostile, base),
        hostile / adapter_format.WEIGHTS: lambda: read_adapter(hostile, base),
        saved / MANIFEST: lambda: small.load(saved),
        saved / STATE: lambda: small.load(saved),
        saved / WEIGHTS: lambda: small.load(saved),
        toml: lambda: resolve(str(toml), {}),
        run / "config.json": lambda: rundir.saved_config(run),
    }
    bad, total = {}, 0
    for path, read in readers.items():
        whole = path.read_bytes()
        for what, place in places_in_its_stead(path).items():
            total += 1
            path.unlink()
            place()
            if path.parent == saved and path.name != MANIFEST and what in ("a pipe", "a link to /dev/zero"):
                manifest = json.loads((saved / MANIFEST).read_text())
                manifest["files"][path.name]["size"] = 0
                sign(saved, manifest)
            outcome = guarded(read)
            if "MiniloraError" not in outcome["kinds"]:
                bad[f"{path.name} is {what}"] = f"{outcome['kinds'][:1]} {str(outcome['error'])[:150]}"
            elif str(path.parent) not in outcome["error"]:
                bad[f"{path.name} is {what}"] = f"does not name it: {outcome['error'][:150]}"
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            path.write_bytes(whole)
            if path.parent == saved:
                sign(saved)
    print(f"\nwhat is no file: {total - len(bad)} of {total} refused")
    assert not bad, "\n".join(f"{key}: {value}" for key, value in bad.items())


# ---------------------------------------------------------------------------------------- mutated JSON and TOML


def nested(depth: int):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


ODD_VALUES = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 1.5, 1e308, -1e308, 1e-320),
    *("", "x", "\0", "\ud800", "../../x", "/etc/passwd", "x" * 10_000, "\x1b[2J", "NaN", "１２", [], {}, [[]], [None]),
    *([1] * 1000, {"a": {"b": {}}}, {"": ""}, ["q_proj", 7], [["q_proj"]], {"q_proj": 1}, [0.5], ["x" * 10_000]),
    *(nested(50), nested(400), nested(900), nested(960)),
]
LITERALS = [
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b"[" * 3000 + b"]" * 3000,
    b"[" * 10**5,
    b'"\\ud800"',
]


def paths_in(value, at=()):
    """Where something can be changed in a JSON value."""
    found = [at] if at else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += paths_in(inner, (*at, key))
    return found


def mutate(value: dict, rng: random.Random, places=None) -> bytes | dict:
    """A JSON object with a few seeded changes: as an object, or as bytes where JSON cannot say it."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = [place for place in paths_in(value) if places is None or place[0] in places]
        if not found:
            break
        *parents, key = rng.choice(found)
        holder = value
        for parent in parents:
            holder = holder[parent]
        mutation = rng.randrange(5)
        if mutation == 0:
            del holder[key]
        elif mutation == 1:
            holder[rng.choice(("extra", "", "../x", key + "x"))] = holder.pop(key)
        elif mutation == 2 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
            holder[key] = rng.choice((str(holder[key]), [holder[key]], -holder[key], holder[key] + 0.5, 10**5000))
        else:
            holder[key] = rng.choice(ODD_VALUES)
    return value


def as_bytes(value: dict, rng: random.Random) -> bytes:
    """The object's JSON, one time in three damaged as text."""
    limits = sys.getrecursionlimit(), sys.get_int_max_str_digits()
    sys.setrecursionlimit(10_000)
    sys.set_int_max_str_digits(0)
    try:
        text = json.dumps(value, separators=rng.choice(((",", ":"), (", ", ": ")))).encode()
    finally:
        sys.setrecursionlimit(limits[0])
        sys.set_int_max_str_digits(limits[1])
    mutation = rng.randrange(18)
    place = rng.randrange(len(text))
    if mutation == 0:
        return text[:place]
    if mutation == 1:
        return text[:place] + bytes([rng.randrange(256)]) + text[place + 1 :]
    if mutation == 2:
        return text[:place] + rng.choice((b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\0")) + text[place:]
    if mutation == 3:
        return rng.choice((b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"), text + text, b"[" + text + b"]"))
    if mutation == 4:
        colon = text.find(b":", place)
        comma = text.find(b",", colon)
        return text[: colon + 1] + rng.choice(LITERALS) + text[comma:] if 0 < colon < comma else text + b","
    if mutation == 5:
        return text[:-1] + b", " + text[1:]  # every key twice
    return text


class Tally:
    """The outcomes of many mutated files: each is refused by an error of ours that names the place, or is harmless."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.refused, self.bad = what, total, 0, []

    def judge(self, i: int, work, names: tuple[str, ...], kinds, odd=lambda result: "") -> None:
        """work() on file i; one of `names` must stand in its error, odd(what it returns) must be empty."""
        results = []
        error, wrong = attempt(lambda: results.append(work()), kinds)
        self.refused += error is not None
        if error is not None and not wrong and not any(name in str(error) for name in names):
            wrong.append(f"does not say where: {str(error)[:200]}")
        if error is None and (words := odd(results[0])):
            wrong.append(f"accepted: {words}")
        self.bad += [f"{i}: {words}" for words in wrong[:1]]

    def report(self) -> None:
        right = self.total - len(self.bad)
        print(f"\n{self.what}: {right} of {self.total} right, {self.refused} of them refused")
        self.bad.sort(key=lambda words: words.partition(": ")[2])
        assert not self.bad, f"{len(self.bad)} of {self.total}:\n" + "\n".join(self.bad[:40])
        assert self.refused > self.total // 2, "most mutations must matter"


READ_BY_US = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "base_model_name_or_path")


def odd_adapter(config: adapter_format.AdapterConfig) -> str:
    fields = (config.base_model, config.rank, config.alpha, config.dropout, config.rslora, *config.target_modules)
    kinds = (str, int, int, float, bool, *(str for _ in config.target_modules))
    fine = all(type(value) is kind for value, kind in zip(fields, kinds, strict=True))
    return "" if fine else repr(config)[:200]


def test_mutated_adapter_config(hostile, base):
    path = hostile / adapter_format.CONFIG
    good, rng = json.loads(path.read_text()), random.Random(1)
    tally = Tally("mutated adapter_config.json", MUTATIONS * 3 // 10)

    def work():
        read_adapter(hostile, base)
        return adapter_format.read_config(hostile)

    for i in range(tally.total):
        path.write_bytes(as_bytes(mutate(good, rng, (*READ_BY_US, *adapter_format.NEUTRAL)), rng))
        tally.judge(i, work, (str(hostile),), AdapterError, odd_adapter)
    tally.report()


def odd_state(state: TrainState) -> str:
    """Which fields of a loaded state are not of their kind."""
    odd = []
    for field in dataclasses.fields(TrainState):
        value = getattr(state, field.name)
        if value is None and "None" in str(field.type):
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63
        if not number or ("float" not in str(field.type) and not isinstance(value, int)):
            odd.append(f"{field.name} = {value!r}"[:80])
    return ", ".join(odd)


def test_mutated_state(tmp_path):
    """With a manifest that agrees with it: what a run counts with is checked before it is used."""
    small = Small()
    path = small.save(tmp_path)
    good, rng = json.loads((path / STATE).read_text()), random.Random(2)
    tally = Tally("mutated state.json", MUTATIONS * 2 // 10)
    for i in range(tally.total):
        (path / STATE).write_bytes(as_bytes(mutate(good, rng), rng))
        sign(path)
        tally.judge(i, lambda: small.load(path), (str(path),), CheckpointError, odd_state)
    tally.report()


def test_mutated_manifest(tmp_path):
    """Half of them with a hash of themselves that is right; and no run stumbles over one while it looks for another."""
    small = Small()
    path = small.save(tmp_path)
    good, rng = json.loads((path / MANIFEST).read_text()), random.Random(3)
    tally = Tally("mutated manifest.json", MUTATIONS * 2 // 10)
    for i in range(tally.total):
        value = mutate(good, rng)
        content = as_bytes(value, rng)
        if i % 2:
            try:
                value["sha256"] = checkpoint._own_sha256(value)
                content = b"".join(files.json_chunks(value))
            except (ValueError, RecursionError):
                pass  # cannot be signed
        (path / MANIFEST).write_bytes(content)
        odd = odd_state if i % 2 else lambda state: "its hash of itself is not right"
        tally.judge(i, lambda: small.load(path), (str(path),), CheckpointError, odd)
        checkpoint.newest_valid(tmp_path)
    tally.report()


def odd_config(config: TrainConfig) -> str:
    """Which keys of a config are not of their type."""
    odd = []
    for name, field in FIELDS.items():
        value, kinds = getattr(config, name), (type(field.default),) if field.default is not None else (str, type(None))
        if not isinstance(value, kinds):
            odd.append(f"{name} = {value!r}"[:80])
    return ", ".join(odd)


def test_mutated_config_of_a_run(tmp_path):
    """config.json is read by --resume PATH; naming the key is enough, the folder was given."""
    path = tmp_path / "config.json"
    config = dataclasses.asdict(TrainConfig()) | {"target_modules": ["q_proj"]}
    good, rng = dataclasses.asdict(IDENTITY) | {"config": config}, random.Random(4)
    tally = Tally("mutated config.json", MUTATIONS // 10)
    for i in range(tally.total):
        path.write_bytes(as_bytes(mutate(good, rng, ("config",)), rng))
        work = lambda: resolve(None, {}, rundir.saved_config(tmp_path))  # noqa: E731
        tally.judge(i, work, (str(path), "config.json", *FIELDS), MiniloraError, odd_config)
    tally.report()


TOML_VALUES = [
    *("1", "-1", "0", "1.5", "1e999", "inf", "-inf", "nan", "9" * 400, "9" * 5000, "0x" + "f" * 1000, "1_0", "+1"),
    *("true", "[]", "{}", "[[]]", "[1]", '["q_proj", 1]', '["attn"]', "{a = 1}", "[" * 500 + "]" * 500),
    *("1979-05-27", "1979-05-27T07:32:00Z", "07:32:00", "[" * 5000 + "]" * 5000, "'" * 3 + "x", '"x', '""'),
    *('"\\u0000"', '"\\uD800"', '"' + "x" * 100_000 + '"', '"../../x"', '"/etc/passwd"', '"@demo/model"'),
    *('"auto"', '"none"', '"1"', '"１"', '"1_000"', '"lora"'),
]
TOML_LINES = ["[a]", "[[a]]", "a = {" * 300, "= 1", "\0", "x", "'a' = 1", '"" = 1', "[a.b", "#" * 9]


def test_mutated_toml(tmp_path):
    path = tmp_path / "settings.toml"
    good = {name: json.dumps(field.default) for name, field in FIELDS.items() if field.default is not None}
    rng, tally = random.Random(5), Tally("mutated TOML", MUTATIONS * 2 // 10)
    for i in range(tally.total):
        lines = [f"{name} = {text}" for name, text in rng.sample(sorted(good.items()), 8)]
        name, mutation = rng.choice(list(FIELDS)), rng.randrange(8)
        if mutation == 0:
            lines.append(f"{name}.{'a.' * rng.choice((1, 50, 3000))}b = 1")
        elif mutation == 1:
            lines.append(rng.choice(TOML_LINES))
        elif mutation == 2:
            lines += [f"{name} = 1", f"{name} = 2"]
        else:
            lines.append(f"{name} = {rng.choice(TOML_VALUES)}")
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        if mutation == 3:
            place = rng.randrange(len(content))
            content = content[:place] + rng.choice((b"\xff", b"\xc3", b"\0", b"\r", b"\xef\xbb\xbf")) + content[place:]
        path.write_bytes(content)
        tally.judge(i, lambda: resolve(str(path), {}), (str(path), *FIELDS), ConfigError, odd_config)
    tally.report()


@pytest.mark.parametrize("content", [b"[" * 4_000_000, b'"' * 4_000_000])
def test_a_large_file_is_refused_as_fast_as_a_small_one(hostile, base, content):
    """Four megabytes are still read; looking at them one byte after the other takes most of a second."""
    path = hostile / adapter_format.CONFIG
    path.write_bytes(content)
    error, wrong = attempt(lambda: read_adapter(hostile, base), AdapterError)
    assert str(path) in str(error) or str(hostile) in str(error)
    assert wrong == []


def test_what_is_said_of_a_hostile_file_is_short_and_printable(hostile, capsys):
    """Names in a file can hold what clears a terminal or renames its window; and they can be megabytes long."""
    messages = []

    def say():
        assert cli.main(["generate", "--adapter", str(hostile), "x"]) == 2
        messages.append(capsys.readouterr().err)

    path = hostile / adapter_format.CONFIG
    good, tensors, metadata = (
        path.read_text(),
        load_file(hostile / adapter_format.WEIGHTS),
        adapter_format.read_metadata(hostile),
    )
    for name in ("\x1b[2J\x1b]0;x\x07", "x" * 1_000_000):
        save_file(tensors | {name: torch.zeros(1)}, hostile / adapter_format.WEIGHTS, metadata)
        say()
        save_file(tensors, hostile / adapter_format.WEIGHTS, metadata | {"base_fingerprint": name})
        say()
        save_file(tensors, hostile / adapter_format.WEIGHTS, metadata)
        for key in ("target_modules", "bias", "base_model_name_or_path", "r"):
            path.write_text(json.dumps(json.loads(good) | {key: [name] if key == "target_modules" else {name: name}}))
            say()
        path.write_text(json.dumps(json.loads(good) | {"base_model_name_or_path": name}))
        say()
        path.write_text(good)
    bad = [f"{len(text):,} characters: {text[:100]}" for text in messages if len(text) > 20_000]
    bad += [repr(text[:100]) for text in messages if any(ord(c) < 32 and c != "\n" for c in text)]
    assert not bad


# ---------------------------------------------------------------------------------------- paths that lead out

OUT = [
    *("../outside/x", "../../outside/x", "a/../../outside/x", "./../outside/x", "..", ".", "", "/etc/passwd"),
    *("..\\outside\\x", "x\0y", "//outside/x", "~/x", "x/../../outside/x"),
]


@pytest.fixture
def outside(tmp_path):
    """A folder beside the attacked one in which nothing may be opened; [events] is asked at the end."""
    folder = tmp_path / "outside"
    folder.mkdir()
    watched = faults.Watched(folder)
    yield folder, watched
    watched.close()


def test_manifests_that_name_files_elsewhere(tmp_path, outside):
    folder, watched = outside
    small = Small()
    path = small.save(tmp_path)
    good = json.loads((path / MANIFEST).read_text())
    (folder / "x").write_bytes((path / WEIGHTS).read_bytes())
    watched.events()
    for name in OUT:
        for names in ({name: good["files"][WEIGHTS]}, good["files"] | {name: good["files"][WEIGHTS]}):
            sign(path, good | {"files": names})
            with pytest.raises(CheckpointError, match="manifest"):
                checkpoint.validate(path)
    assert watched.events() == []


def test_shards_elsewhere_are_not_read(tiny_folder, good_adapter, tmp_path, outside):
    """An index that names a file outside of the model's folder; what it names is a whole, loadable file."""
    folder, watched = outside
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    os.rename(base / "model.safetensors", folder / "x")
    names = load_file(folder / "x")
    read = {}
    for shard in ("../outside/x", "./../outside/x", str(folder / "x"), "a/../../outside/x", "..\\outside\\x", "", ".."):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        watched.events()
        for what, work in {
            "load_model": lambda: loading.load_model(base, torch.float32, CPU),
            "weight_files": lambda: loading.weight_files(base),
            "merge": lambda: merge.merge(good_adapter, tmp_path / "merged", str(base)),
        }.items():
            error, wrong = attempt(work)
            accepted = error is None and what != "weight_files"  # on Linux a backslash is a letter like others
            if accepted or wrong or watched.events():
                read[f"{what} {shard!r}"] = wrong or "was read"
    assert not read
    assert not (tmp_path / "merged").exists()


def test_an_index_that_is_none(tiny_folder, good_adapter, tmp_path):
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    bad = {}
    for content in (b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b"\xff", b"[" * 10**5):
        (base / "model.safetensors.index.json").write_bytes(content)
        for what, work in {
            "weight_files": lambda: loading.weight_files(base),
            "merge": lambda: merge.merge(good_adapter, tmp_path / "merged", str(base)),
        }.items():
            error, wrong = attempt(work)
            if error is None or wrong or str(base) not in str(error):
                bad[f"{what} {content[:30]!r}"] = wrong or f"accepted, or not named: {error}"
    assert not bad


def test_the_default_run_stays_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [*OUT, "../..", "a/..", "../../..", "runs/../..", "...", "x" * 50, "\n", "é/…"]
    for name in names:
        for key in ("model", "train_file"):
            if not name.strip() or "\0" in name:
                continue  # refused before a folder is named after it
            stem = rundir._stem(TrainConfig(**{key: name}))
            assert stem.parent == Path("runs"), f"{key} {name!r}: {stem}"
            assert stem.name not in ("", ".", "..")
            assert "\0" not in stem.name


def test_a_runs_config_cannot_send_it_elsewhere(make_config, tmp_path, outside, bare_run):
    """--resume PATH goes on in PATH, whatever config.json says of output_dir."""
    folder, watched = outside
    config = make_config(save_steps=2)
    loop.train(config)
    run = Path(config.output_dir)
    saved = json.loads((run / "config.json").read_text())
    saved["config"]["output_dir"] = str(folder / "run")
    (run / "config.json").write_text(json.dumps(saved))
    loop.train(resolve(None, {"resume": str(run)}, rundir.saved_config(run)))
    assert watched.events() == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", ".config.json.partial", ".summary.json.partial"])
def test_links_planted_in_a_run_are_not_followed(make_config, tmp_path, name, bare_run):
    """A run folder from elsewhere, gone on with: a link in it must not let us empty the user's files."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    config = make_config(output_dir=str(tmp_path / "planted"))
    Path(config.output_dir).mkdir()
    (Path(config.output_dir) / name).symlink_to(victim)
    try:
        loop.train(config)
    except MiniloraError as error:
        assert name in str(error)
    assert victim.read_text() == "mine"


def test_links_planted_where_files_are_written(tmp_path, hostile, base):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "inner").mkdir(parents=True)
    (elsewhere / "inner" / "file").write_text("mine")
    (hostile / f".{adapter_format.WEIGHTS}.partial").symlink_to(victim)
    (hostile / f".{adapter_format.CONFIG}.partial").symlink_to(victim)
    (hostile / "linked").symlink_to(victim)
    try:
        files.replace_file(hostile / adapter_format.WEIGHTS, [b"new"])
        files.replace_file(hostile / adapter_format.CONFIG, [b"new"])
    except MiniloraError:
        pass
    files.replace_file(hostile / "linked", [b"new"])  # the link itself is replaced
    run = tmp_path / "run"
    small = Small()
    small.save(run)
    for name in (".step-000001.partial", ".step-000001.removed", ".step-000007.partial", "step-000007"):
        (run / "checkpoints" / name).symlink_to(elsewhere / "inner", target_is_directory=True)
    try:
        checkpoint.save(run, small.model, small.optimizer, TrainState(step=7), IDENTITY, 1)
        checkpoint.remove_after(run, 0)
    except MiniloraError:
        pass
    assert victim.read_text() == "mine"
    assert (elsewhere / "inner" / "file").read_text() == "mine"
    assert [p.name for p in (elsewhere / "inner").iterdir()] == ["file"]


@pytest.mark.parametrize(
    "name", ["../../x", "q_proj/../x", "model.layers.0.self_attn.q_proj", "/etc/passwd", "", ".", "..", "q_proj\0"]
)
def test_target_modules_are_names_not_paths(hostile, base, tmp_path, name):
    path = hostile / adapter_format.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": [name]}))
    before = sorted(tmp_path.rglob("*"))
    error, wrong = attempt(lambda: read_adapter(hostile, base), AdapterError)
    assert error is not None
    assert wrong == []
    with pytest.raises(MiniloraError):
        inject(loading.load_model(Path(base.config._name_or_path), torch.float32, CPU), (name,), 2, 4)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name", ["../outside", "a/..", "../..", "a/../../outside", "..\\outside", "owner/na\0me", "a/b/c", "~x/y"]
)
def test_bases_that_an_adapter_names(hostile, outside, tmp_path, monkeypatch, name):
    """What is neither a folder nor a hub name is refused, and never looked for beside the cache."""
    folder, watched = outside
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = hostile / adapter_format.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    error, wrong = attempt(lambda: load_chat_model(None, str(hostile)))
    assert error is not None
    assert wrong == []
    assert [event for event in watched.events() if event != f"{folder}/"] == []


def test_an_output_folder_is_the_one_named(make_config, tmp_path, outside, bare_run, monkeypatch):
    """--output_dir with dots in it means what it means to the shell, and nothing is written beside it."""
    folder, watched = outside
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    config = make_config(output_dir="a/../b/./run", train_file=str(write_jsonl(tmp_path / "rows.jsonl", 8)))
    (tmp_path / "a").mkdir()
    loop.train(config)
    new = set(tmp_path.iterdir()) - before
    assert {path.name for path in new} <= {"a", "b", "rows.jsonl"}
    assert list((tmp_path / "a").iterdir()) == []
    assert (tmp_path / "b" / "run" / "summary.json").exists()
    assert watched.events() == []
    assert list(folder.iterdir()) == []


# ---------------------------------------------------------------------------------------- nothing is run

_connections: list[str] = []
_watching = [False]


def _audit(event: str, args) -> None:
    if _watching[0] and event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"):
        _connections.append(f"{event} {args}"[:200])


sys.addaudithook(_audit)


class Evil:
    """Unpickled, it leaves a mark."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return (Path.write_text, (self.canary, "ran"))


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A path that no attack may bring into being; no connection and no process may be started either."""
    path = tmp_path / "canary"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _connections.clear()
    _watching[0] = True
    yield path
    _watching[0] = False
    assert not path.exists(), "planted code was run"
    assert _connections == []


def evil_code(canary: Path) -> str:
    """A module that leaves its mark when it is imported, and would do for a model, a tokenizer, anything."""
    return (
        f"import pathlib\npathlib.Path({str(canary)!r}).write_text('ran')\n"
        "class Evil:\n    @classmethod\n    def from_pretrained(cls, *args, **kwargs): return cls()\n"
        "def generate(model, *args, **kwargs): return model\n"
    )


def jinja(canary: Path) -> str:
    return (
        "{{ cycler.__init__.__globals__.os.system('touch "
        + str(canary)
        + "') }}{{ ''.__class__.__mro__[1].__subclasses__() }}"
    )


def edit_json(path: Path, **keys) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | keys))


BASE_ATTACKS = {
    "auto_map in config.json": lambda f, c: edit_json(
        f / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    ),
    "auto_map and an unknown model type": lambda f, c: edit_json(
        f / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    ),
    "auto_map to another repository": lambda f, c: edit_json(
        f / "config.json", model_type="evil", auto_map={"AutoConfig": "evil/repo--evil.Evil"}
    ),
    "architectures that name a module": lambda f, c: edit_json(f / "config.json", architectures=["evil.Evil"]),
    "trust_remote_code in config.json": lambda f, c: edit_json(
        f / "config.json", trust_remote_code=True, auto_map={"AutoModelForCausalLM": "evil.Evil"}
    ),
    "auto_map in tokenizer_config.json": lambda f, c: edit_json(
        f / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    ),
    "trust_remote_code in tokenizer_config.json": lambda f, c: edit_json(
        f / "tokenizer_config.json", trust_remote_code=True, auto_map={"AutoTokenizer": ["evil.Evil", None]}
    ),
    "auto_map in processor_config.json": lambda f, c: edit_json(
        f / "processor_config.json", auto_map={"AutoProcessor": "evil.Evil"}
    ),
    "pytorch_model.bin beside model.safetensors": lambda f, c: (f / "pytorch_model.bin").write_bytes(
        pickle.dumps(Evil(c))
    ),
    "pytorch_model.bin alone": lambda f, c: (
        (f / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(c))),
        (f / "model.safetensors").unlink(),
    ),
    "an index of pickles": lambda f, c: (
        (f / "model.safetensors").unlink(),
        (f / "evil.bin").write_bytes(pickle.dumps(Evil(c))),
        edit_json(f / "pytorch_model.bin.index.json", metadata={}, weight_map={"model.norm.weight": "evil.bin"}),
    ),
    "an index of safetensors that names a pickle": lambda f, c: (
        (f / "model.safetensors").unlink(),
        (f / "evil.bin").write_bytes(pickle.dumps(Evil(c))),
        edit_json(f / "model.safetensors.index.json", metadata={}, weight_map={"model.norm.weight": "evil.bin"}),
    ),
    "a chat template": lambda f, c: (f / "chat_template.jinja").write_text(jinja(c)),
    "a chat template in tokenizer_config.json": lambda f, c: (
        (f / "chat_template.jinja").unlink(),
        edit_json(f / "tokenizer_config.json", chat_template=jinja(c)),
    ),
    "custom_generate": lambda f, c: (
        (f / "custom_generate").mkdir(),
        (f / "custom_generate" / "generate.py").write_text(evil_code(c)),
        edit_json(f / "generation_config.json", custom_generate="custom_generate", trust_remote_code=True),
    ),
    "a quantization method": lambda f, c: edit_json(f / "config.json", quantization_config={"quant_method": "evil"}),
    "attention from the hub": lambda f, c: edit_json(
        f / "config.json", attn_implementation="evil/kernel", _attn_implementation="evil/kernel"
    ),
    "a dtype that is code": lambda f, c: edit_json(
        f / "config.json", dtype=f"__import__('os').system('touch {c}')", torch_dtype="evil"
    ),
    "an activation that is code": lambda f, c: edit_json(f / "config.json", hidden_act="evil.Evil"),
    "a PEFT adapter within the base": lambda f, c: (
        edit_json(f / "adapter_config.json", peft_type="LORA", auto_mapping={"parent_library": "evil"}),
        (f / "adapter_model.bin").write_bytes(pickle.dumps(Evil(c))),
    ),
}


@pytest.mark.parametrize("attack", list(BASE_ATTACKS))
def test_nothing_in_a_base_is_run(tiny_folder, tmp_path, canary, attack, monkeypatch):
    """It is loaded as if the attack were not there, or refused by an error of ours; asked something if it loads."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    for name in ("evil.py", "modeling_evil.py"):
        (folder / name).write_text(evil_code(canary))
    BASE_ATTACKS[attack](folder, canary)
    monkeypatch.syspath_prepend(str(folder))  # the worst case: the folder can be imported from
    try:
        chat_model = load_chat_model(str(folder), None, "float32", "cpu")
        answer(chat_model, [[Turn("user", "hello")]], Sampling(max_new_tokens=2))
    except MiniloraError as error:
        assert str(folder) in str(error)
    sys.modules.pop("evil", None)


ADAPTER_ATTACKS = {
    "adapter_model.bin beside it": lambda f, c: (f / "adapter_model.bin").write_bytes(pickle.dumps(Evil(c))),
    "adapter_model.bin alone": lambda f, c: os.rename(
        f / adapter_format.WEIGHTS, f / "was" if (f / "adapter_model.bin").write_bytes(pickle.dumps(Evil(c))) else f
    ),
    "a pickle of the right name": lambda f, c: (f / adapter_format.WEIGHTS).write_bytes(pickle.dumps(Evil(c))),
    "a torch file of the right name": lambda f, c: torch.save(Evil(c), f / adapter_format.WEIGHTS),
    "auto_mapping and trust_remote_code": lambda f, c: edit_json(
        f / adapter_format.CONFIG,
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil"},
        trust_remote_code=True,
        auto_map={"AutoModel": "evil.Evil"},
    ),
    "a runtime_config": lambda f, c: edit_json(
        f / adapter_format.CONFIG, runtime_config={"x": "evil.Evil"}, layers_pattern="(a+)+$"
    ),
    "metadata": lambda f, c: save_file(
        load_file(f / adapter_format.WEIGHTS),
        f / adapter_format.WEIGHTS,
        adapter_format.read_metadata(f) | {"system_prompt": jinja(c), "format": "evil"},
    ),
    "a chat template": lambda f, c: (f / "chat_template.jinja").write_text(jinja(c)),
}


@pytest.mark.parametrize("attack", list(ADAPTER_ATTACKS))
def test_nothing_in_an_adapter_is_run(hostile, tmp_path, canary, attack, monkeypatch):
    (hostile / "evil.py").write_text(evil_code(canary))
    ADAPTER_ATTACKS[attack](hostile, canary)
    monkeypatch.syspath_prepend(str(hostile))
    try:
        chat_model = load_chat_model(None, str(hostile), "float32", "cpu")
        answer(chat_model, [[Turn("user", "hello")]], Sampling(max_new_tokens=2))
    except MiniloraError as error:
        assert str(hostile) in str(error)
    sys.modules.pop("evil", None)


def test_nothing_in_a_run_folder_is_run(make_config, tmp_path, canary, bare_run, monkeypatch):
    """Pickles under the names that Trainer gives them, beside a checkpoint and in place of its files."""
    config = make_config(save_steps=2)
    loop.train(config)
    run = Path(config.output_dir)
    newest = checkpoint.checkpoints(run)[0]
    evil = pickle.dumps(Evil(canary))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin", "model.pt"):
        for folder in (run, newest):
            (folder / name).write_bytes(evil)
    for name in ("sitecustomize.py", "evil.py", "torch.py"):
        (run / name).write_text(evil_code(canary))
    monkeypatch.chdir(run)
    loop.train(dataclasses.replace(config, resume="auto"))
    for name in (STATE, WEIGHTS, MOMENTS):
        small = Small()
        path = small.save(tmp_path / name)
        (path / name).write_bytes(evil)
        sign(path)
        assert attempt(lambda small=small, path=path: small.load(path))[1] == []
    edit_json(newest / STATE, __reduce__=["os.system", f"touch {canary}"], **{"py/object": "os.system"})
    sign(newest)
    with pytest.raises(MiniloraError):
        loop.train(dataclasses.replace(config, resume=str(newest)))


@pytest.mark.parametrize(
    "text",
    [
        "$(touch {})",
        "; touch {}",
        "| touch {}",
        "`touch {}`",
        "__import__('os').system('touch {}')",
        "!!python/object:{}",
    ],
)
def test_no_setting_is_run(tmp_path, canary, text, capsys):
    """Texts from TOML, flags and rows go to no shell, no eval, no template."""
    text = text.format(canary)
    toml = tmp_path / "settings.toml"
    toml.write_text(
        "".join(f"{key} = {json.dumps(text)}\n" for key in ("model", "train_file", "system_prompt", "output_dir"))
    )
    assert cli.main(["train", str(toml)]) == 2
    for key in ("model", "train_file", "eval_file", "resume", "device", "lora_r", "target_modules"):
        assert cli.main(["train", "demo", f"--{key}", text, "--output_dir", str(tmp_path / "run")]) == 2, key
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": text + jinja(canary), "output": text}) + "\n")
    assert read_rows(rows, "error")[0][0].turns[-1].content == text
    assert "Traceback" not in capsys.readouterr().err
