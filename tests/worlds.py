"""Several processes of one run, forked: a world is gloo on the CPU."""

import faulthandler
import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from minilora.errors import MiniloraError
from minilora.objectives import sft

LIMIT_S = 60.0  # for the end of a world that has lost a process


class Child:
    """A forked process of a world: its exit code and what it returned, once it has ended."""

    def __init__(self, rank: int, size: int, port: int, work, log: Path):
        self.log, self.running = log, True
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            _in_child(rank, size, port, work, log, writing)
        os.close(writing)
        self._pipe = reading

    def end(self, until: float) -> tuple[int, object]:
        """(exit code, or minus the signal it died by; what it returned). Fails when it goes on beyond the moment."""
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.running = False
                break
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGUSR1)
                time.sleep(1)
                self.kill()
                pytest.fail(f"a process hangs; its output: {self.log.read_text()[:3000]}")
            time.sleep(0.005)
        with open(self._pipe, "rb") as pipe:
            text = pipe.read()
        return os.waitstatus_to_exitcode(status), json.loads(text) if text else None

    def kill(self) -> None:
        """End it, if it has not ended yet."""
        if self.running:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.running = False


def _in_child(rank: int, size: int, port: int, work, log: Path, writing: int) -> None:
    code, answer = 99, None
    try:
        gc.freeze()  # looking through what the parent has would copy it
        torch.set_num_threads(1)  # makes torch's thread pool anew: threads that load a model would do so all at once
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)  # pytest's own are not those of the process
        sys.stderr = os.fdopen(2, "w", closefd=False)
        faulthandler.register(signal.SIGUSR1, file=output)
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the parent, which `cli.main` may have started
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        answer, code = work(rank), 0
    except MiniloraError as error:
        answer, code = f"{type(error).__name__}: {error}", error.exit_code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(writing, json.dumps(answer).encode())
    os._exit(code)


def start(size: int, work, folder: Path, number: int) -> list[Child]:
    """work(rank) in so many forked processes that find each other; their output goes into the folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [Child(rank, size, port, work, folder / f"world{number}-rank{rank}.log") for rank in range(size)]


def spoilt(calls_of, fault, real=sft.token_nats):
    """token_nats that in this process goes wrong at these calls (from 1)."""
    calls = [0]

    def token_nats(*args):
        calls[0] += 1
        if calls[0] not in calls_of:
            return real(*args)
        if fault == "nan":
            return real(*args) * float("nan")
        raise fault

    return token_nats


def told_to_stop(config, real=sft.token_nats):
    """token_nats that sends this process SIGTERM once the run has logged two lines."""
    log = Path(config.output_dir) / "metrics.jsonl"

    def token_nats(*args):
        if log.exists() and len(log.read_text().splitlines()) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    return token_nats
