"""What the fault-injection tests share: processes to be killed, faults at the n-th file operation, watched folders.

Run as a program (`python faults.py`) it is a fork server: it imports torch, transformers and minilora once, then forks
a child for each trial, so that a trial costs its training and not five seconds of imports.
"""

import atexit
import builtins
import contextlib
import ctypes
import errno
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(os.environ.get("MINILORA_TEST_PACKAGE", Path(__file__).parent.parent))  # where the package under test lies
REAL_OS = {name: getattr(os, name) for name in dir(os)}


def count(name: str, default: int) -> int:
    """How many trials: the environment variable MINILORA_SOAK_<name>, or the default."""
    return int(os.environ.get(f"MINILORA_SOAK_{name}", default))


# ---------------------------------------------------------------------------------------- faults at file operations

# What changes a disk, forces it, or finds out what is there.
OPERATIONS = (
    *("open", "write", "fsync", "close", "replace", "rename", "mkdir", "unlink", "rmdir", "ftruncate"),
    *("stat", "lstat", "listdir", "scandir"),
)
EXIT_CRASHED = 77


class Injector:
    """While it stands, every file operation through Python's `os` and `open` is counted; at the n-th `strike` acts.

    Meant for forked children: it changes the module `os` itself, so that shutil and pathlib are seen too.
    strike(name, args, real) may raise, end the process, or make the call in another way; n = 0 only counts.
    """

    def __init__(self, n: int, strike, inside: Path | None = None):
        self.n, self.strike, self.seen, self.hit = n, strike, 0, ""
        self.parts: list[str] = []  # of each call so far, the first part of its path within `inside`
        self._inside = str(inside) if inside else ""
        self._busy = False
        self._descriptors: dict[int, str] = {}
        self.spares: dict[str, int] = {}  # written and not yet forced: path -> a descriptor that outlives renames
        self.written: dict[str, int] = {}  # all files made, with their number
        self.renames: list[tuple[str, str, bytes | None]] = []  # made and not yet forced

    def stand(self):
        for name in OPERATIONS:
            setattr(os, name, self._counted(name, REAL_OS[name]))
        self._real_open = builtins.open
        builtins.open = self._counted("open", builtins.open)
        return self

    def fall(self) -> None:
        for name in OPERATIONS:
            setattr(os, name, REAL_OS[name])
        builtins.open = self._real_open

    def _concerns(self, args) -> bool:
        if not args:
            return False
        first = self._descriptors.get(args[0], "") if isinstance(args[0], int) else os.fspath(args[0])
        return str(first).startswith(self._inside)

    def _part(self, args) -> str:
        path = self._descriptors.get(args[0], "") if isinstance(args[0], int) else os.fspath(args[0])
        return str(path).removeprefix(self._inside).strip("/").partition("/")[0]

    def _counted(self, name, real):
        def call(*args, **kwargs):
            if self._busy or (kwargs.get("dir_fd") is None and not self._concerns(args)):
                return real(*args, **kwargs)
            self.seen += 1
            self.parts.append(self._part(args))
            if self.seen == self.n:
                self.hit = f"{name} {args[0]}"
                return self.strike(self, name, args, lambda: real(*args, **kwargs))
            return self.perform(name, args, lambda: real(*args, **kwargs))

        return call

    def perform(self, name, args, real):
        """Make the call, and remember what a loss of power would undo."""
        replaced = None
        if name in ("rename", "replace") and REAL_OS["path"].isfile(args[1]):
            self._busy = True  # this reading is none of the program's
            replaced = Path(args[1]).read_bytes()
            self._busy = False
        result = real()
        if name == "open" and isinstance(result, int):
            self._descriptors[result] = os.fspath(args[0])
            if args[1] & os.O_CREAT:
                self.spares[os.fspath(args[0])] = os.dup(result)
                self.written[os.fspath(args[0])] = len(self.written)
        elif name == "fsync":
            path = self._descriptors.get(args[0], "")
            if path in self.spares:
                REAL_OS["close"](self.spares.pop(path))
            self.renames = [rename for rename in self.renames if os.path.dirname(rename[1]) != path]
        elif name in ("rename", "replace"):
            self.renames.append((os.fspath(args[0]), os.fspath(args[1]), replaced))
        elif name == "close":
            self._descriptors.pop(args[0], None)
        return result

    def lose_power(self) -> None:
        """What was never forced to the disk is gone: files are empty, renames are undone."""
        for descriptor in self.spares.values():
            REAL_OS["ftruncate"](descriptor, 0)
        for before, after, replaced in reversed(self.renames):
            if os.path.lexists(after) and not os.path.lexists(before):
                REAL_OS["rename"](after, before)
                if replaced is not None:
                    Path(after).write_bytes(replaced)


def crash(injector, name, args, real):
    """The process dies before the call, in the middle of it when it writes."""
    if name == "write":
        REAL_OS["write"](args[0], bytes(args[1])[: len(args[1]) // 2])
    os._exit(EXIT_CRASHED)


def power_loss(injector, name, args, real):
    """The machine goes dark after the call: all that was not forced is lost."""
    injector.perform(name, args, real)
    injector.fall()
    injector.lose_power()
    os._exit(EXIT_CRASHED)


def kill_self(number: int, delay_s: float = 0.0, times: int = 1):
    """A signal, truly sent, at the call or so much later, once or more."""

    def send():
        Path(os.environ["MINILORA_SENT"]).write_text(repr(time.monotonic()))
        for _ in range(times):
            os.kill(os.getpid(), number)

    def strike(injector, name, args, real):
        if delay_s:
            threading.Timer(delay_s, send).start()
        else:
            send()
        return real()

    return strike


def fail_with(code: int):
    """The call reports an error. A write has then written a part, a close has closed (one of a file just written)."""

    def strike(injector, name, args, real):
        if name == "close" and injector._descriptors.get(args[0]) not in injector.written:
            return real()
        if name == "write" and len(args[1]) > 1:
            REAL_OS["write"](args[0], bytes(args[1])[: len(args[1]) // 2])
        if name == "close":
            real()
        path = args[0] if not isinstance(args[0], int) else None
        raise OSError(code, os.strerror(code), path)

    return strike


CODES = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES}
STRIKES = {"crash": crash, "power loss": power_loss} | {name: fail_with(code) for name, code in CODES.items()}


def forked(work):
    """work() in a forked child: (exit code, what it returned as JSON, or the text of what it raised)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        code = 0
        try:
            answer = work()
        except BaseException as error:
            code, answer = 1, {"type": type(error).__name__, "text": str(error)}
        REAL_OS["write"](writing, json.dumps(answer).encode())
        os._exit(code)
    os.close(writing)
    with open(reading, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), json.loads(text) if text else None


# ---------------------------------------------------------------------------------------- the fork server


class ForkServer:
    """`minilora` commands in forked children, one at a time; close() ends it."""

    def __init__(self):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, argv, log, **options) -> dict:
        """One command; its output goes to the file `log`. Keys of `how`:

        signal, after_s: this signal after so many seconds
        signal, at_call, delay_s, times: this signal so long after the n-th file operation inside the folder `inside`,
            once or more often; n = 0 only counts
        threads, plain_root: threads of torch; without root's right to pass over permissions
        full: this file, when it is written, is on a full disk
        silent: the models are not let speak at the end, nor memory predicted, which is most of a short run's time
        Returns code (negative: died by that signal), seconds, to_exit_s (from the signal to the exit, None when the
        process had ended before), calls (of each file operation inside `inside`, the part of it that it concerned).
        """
        request = {"argv": [str(word) for word in argv], "log": str(log)} | options
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


_servers: "queue.Queue[ForkServer]" = queue.Queue()


def start_servers(workers: int) -> None:
    """Have at least so many fork servers; they end with this process."""
    while _servers.qsize() < workers:
        server = ForkServer()
        atexit.register(server.close)
        _servers.put(server)


def minilora(argv, log, **options) -> dict:
    """`minilora ARGV` in a fork of a server that is free (see ForkServer.run)."""
    server = _servers.get()
    try:
        return server.run(argv, log, **options)
    finally:
        _servers.put(server)


def in_parallel(trial, things, workers: int) -> list:
    """trial(thing) for each, `workers` at a time, in order."""
    start_servers(workers)
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(trial, things))


def _serve() -> None:
    """Requests in, results out, as JSON lines, until the other side closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers goes to the other side
    import transformers.models.qwen2.modeling_qwen2
    import transformers.models.qwen2.tokenization_qwen2  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer  # noqa: F401

    import minilora.cli
    import minilora.loop

    assert Path(minilora.cli.__file__).parent.parent == ROOT, "another copy of the package is under test"
    for line in sys.stdin:
        request = json.loads(line)
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(request)
        print(json.dumps(_watch(pid, started, request)), file=answers, flush=True)


def _watch(pid: int, started: float, request: dict) -> dict:
    """Send what is asked for at its time, wait for the end."""
    status, sent = None, None
    if request.get("after_s") is not None:
        status = _wait_until(pid, started + request["after_s"])
        if status is None:
            sent = time.monotonic()
            os.kill(pid, request["signal"])
    if status is None:
        status = os.waitpid(pid, 0)[1]
    ended = time.monotonic()
    beside = Path(request["log"] + ".sent")
    if beside.exists():
        sent = float(beside.read_text())
    calls = Path(request["log"] + ".calls")
    counted = calls.read_text() if calls.exists() else ""  # empty: killed while it was written
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": ended - started,
        "to_exit_s": None if sent is None else ended - sent,
        "calls": json.loads(counted) if counted else None,
    }


def _wait_until(pid: int, moment: float) -> int | None:
    """The status of a child that ends before the moment, else None."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        left = moment - time.monotonic()
        if left <= 0:
            return None
        time.sleep(min(left, 0.002))


def _child(request: dict) -> None:
    """The command itself, in the forked child; does not return."""
    code = 99
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell has it ignored
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        import torch

        from minilora import cli

        torch.set_num_threads(request.get("threads", 1))
        if request.get("plain_root"):
            give_up_overriding_permissions()
        if request.get("silent"):
            from minilora.inference import generate
            from minilora.models import probe
            from minilora.training import memory_estimate
            from minilora.training import setup as training_setup

            generate.sample_answers = lambda chat_model: [""] * len(probe.SAMPLE_PROMPTS)
            training_setup.choose_cut = lambda setup, rows, schedule, asked, most: memory_estimate.Choice(
                asked or most, False, None
            )
        if "full" in request:
            fill(request["full"])
        injector = None
        if "at_call" in request:
            os.environ["MINILORA_SENT"] = request["log"] + ".sent"
            options = {key: request[key] for key in ("delay_s", "times") if key in request}
            strike = kill_self(request.get("signal", signal.SIGKILL), **options)
            injector = Injector(request["at_call"], strike, Path(request["inside"])).stand()
        code = cli.main(request["argv"])
        if injector:
            injector.fall()
            Path(request["log"] + ".calls").write_text(json.dumps(injector.parts))
        sys.stdout.flush()
        sys.stderr.flush()
    except KeyboardInterrupt:  # outside of main: Python itself would die of the signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


def fill(path: str) -> None:
    """Opened for writing, this file is one on a full disk."""
    real_open, real_os_open = builtins.open, os.open

    def opened(file, mode="r", *args, **kwargs):
        return real_open("/dev/full" if file_is(file, path) and mode != "r" else file, mode, *args, **kwargs)

    def os_opened(file, flags, *args, **kwargs):
        return real_os_open(
            "/dev/full" if file_is(file, path) and flags & os.O_WRONLY else file, flags, *args, **kwargs
        )

    builtins.open, os.open = opened, os_opened


def file_is(file, path: str) -> bool:
    return not isinstance(file, int) and os.fspath(file) == path


def give_up_overriding_permissions() -> None:
    """Root without CAP_DAC_OVERRIDE: a read-only folder is read-only. Does nothing for other users."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    data = ctypes.create_string_buffer(24)
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    words = list(struct.unpack("6I", data.raw))
    for place in (0, 1):  # effective, permitted
        words[place] &= ~0b110  # DAC_OVERRIDE, DAC_READ_SEARCH
    if libc.capset(header, ctypes.create_string_buffer(struct.pack("6I", *words))):
        raise OSError(ctypes.get_errno(), "capset")


# ---------------------------------------------------------------------------------------- watching


class Watched:
    """Which files of some folders (not of those in them) were opened or changed, by whatever library (inotify)."""

    OPEN_OR_CHANGE = 0x20 | 0x2 | 0x100 | 0x200 | 0x40 | 0x80  # open, modify, create, delete, moved from, moved to

    def __init__(self, *folders: Path):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK)
        assert self._descriptor >= 0, "inotify is needed"
        self._names = {}
        for folder in folders:
            number = self._libc.inotify_add_watch(self._descriptor, os.fsencode(folder), self.OPEN_OR_CHANGE)
            assert number >= 0, folder
            self._names[number] = folder

    def events(self) -> list[str]:
        """What has happened since the last call: the paths."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while raw := os.read(self._descriptor, 65536):
                while raw:
                    number, _, _, length = struct.unpack("iIII", raw[:16])
                    name = raw[16 : 16 + length].rstrip(b"\0").decode()
                    found.append(str(self._names[number] / name))
                    raw = raw[16 + length :]
        return found

    def close(self) -> None:
        os.close(self._descriptor)


def memory_now() -> tuple[int, int]:
    """(resident bytes, the most since the last call of forget_peak)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


def forget_peak() -> None:
    """Start the peak of resident memory afresh."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    _serve()
