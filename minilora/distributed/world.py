"""Connects the processes of a run: each computes its part of a step, and an error or a signal in one reaches all.

A run of one process is a world of size 1. There, this module does no communication.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from minilora import errors
from minilora.errors import ConfigError, MiniloraError, RankError, StoppedError

SAVE_TIMEOUT = timedelta(minutes=30)  # the longest save or verification in process 0; a dead process is noticed at once
START_TIMEOUT = timedelta(minutes=10)  # the longest time from the first process to the last one
CONNECT_TIMEOUT = timedelta(seconds=10)  # for a connection when all processes are present; gloo tries five times
MESSAGE_BYTES = 512  # enough for the messages of every step; longer messages need a second round


class World:
    """The processes of a run, and the communication between them.

    Every agreement uses the same exchange of messages on the CPU (gloo). So an error of one process reaches the other
    processes at whichever agreement they wait. Tensors are summed on their own device (NCCL on CUDA).
    rank, local_rank: the number of this process among all processes, and among those of this machine
    size: the number of processes
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.resume_hint = ""  # how to resume; added to the message that a process is gone
        self.sharded = False  # if true, all processes must run each micro-batch together, because shards are gathered
        self._agreed: Exception | None = None  # the error that all processes have raised
        self._message_group: Any = None  # the group that exchanges messages
        self._tensor_group: Any = None  # the group that sums tensors

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    def wait_long(self) -> None:
        """Make later calls wait for the others for as long as a save may take. A dead process is noticed at once."""
        self._message_group = self._tensor_group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)

    def connect(self, device: torch.device) -> torch.device:
        """Connect the devices of the processes. Returns the device of this process."""
        if self.size > 1 and device.type == "cuda":
            torch.cuda.set_device(device)
            self._tensor_group = dist.new_group(backend="nccl")
        return device

    def exchange(self, value: Any) -> list[Any]:
        """Give a JSON value, and return the values of all processes in the order of ranks.

        Raises the error that another process sent (see `raise_on_all_ranks`). Raises RankError if a process is gone.
        """
        return [value] if self.size == 1 else self._exchange({"value": value}, None)

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process."""
        return any(self.exchange(flag))

    def run_on_main(self, work: Callable[[], Any], on_others: Callable[[], object] | None = None) -> Any:
        """Call work() in process 0 only, and return its JSON value in all processes. All processes raise its error.

        The other processes wait. If the model is sharded and on_others is given, they call on_others() in the meantime.
        """
        if self.size == 1:
            return work()
        value = None
        try:
            if self.main:
                value = work()
            elif on_others and self.sharded:
                on_others()
        except Exception as error:
            if on_others and self.sharded:
                raise  # the others wait within on_others(), not here
            self._send_error(error)
        return self.exchange(value)[0]

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """An error that one process raises inside is raised by all processes at their next agreement."""
        if self.size == 1:
            yield
            return
        try:
            yield
            self.exchange(None)
        except Exception as error:
            if error is self._agreed:
                raise
            if not self.sharded:
                self._send_error(error)
            elif isinstance(error, dist.DistError) or "gloo" in str(error):
                raise self._lost() from error
            error.alone = True  # type: ignore[attr-defined]  # only this process knows it, so `cli` prints it here
            raise

    def _send_error(self, error: Exception) -> None:
        """Make all processes raise an error of this process. A class that is not minilora's becomes RankError."""
        if error is self._agreed:
            raise error
        kind, text = type(error).__name__, str(error)
        if not isinstance(error, (MiniloraError, BrokenPipeError)):
            kind, text = RankError.__name__, f"a mistake of ours: {kind}: {text}. --debug shows where"
        message = {"kind": kind, "text": text, "signal": getattr(error, "exit_code", 0) - 128}
        try:
            self._exchange(message, error)
        except RankError as lost:  # no process is left to receive it
            self._agreed = error
            raise error from lost

    def _exchange(self, message: dict[str, Any], own: Exception | None) -> list[Any]:
        try:
            received = _all_gather(json.dumps(message).encode(), self.size, self._message_group)
        except (RuntimeError, ValueError) as error:
            raise self._lost() from error
        messages = [json.loads(each) for each in received]
        for rank, each in enumerate(messages):
            if "kind" in each:
                self._agreed = own if own is not None and rank == self.rank else _error_of(rank, each)
                raise self._agreed
        return [each["value"] for each in messages]

    def _lost(self) -> RankError:
        text = "another process of this run is gone or does not answer. What was saved before is intact."
        lost = RankError(text + self.resume_hint)
        self._agreed = lost
        return lost

    def all_reduce_gradients(self, params: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """Sum the gradients of replicated parameters and the loss over the processes, in one flat buffer.

        The backward pass has already summed the gradients of shards. Returns the sum of the losses. Every process must
        call this directly after an agreement, so that no process waits for one that has stopped with an error.
        """
        if self.size == 1:
            return loss
        whole = [param for param in params if param.requires_grad and not isinstance(param, DTensor)]
        gradients = [param.new_zeros(param.shape) if param.grad is None else param.grad for param in whole]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), loss.view(1)])
        del gradients
        self._reduce(flat)
        for param, part in zip(whole, flat[:-1].split([param.numel() for param in whole]), strict=True):
            param.grad = part.view_as(param)
        return flat[-1]

    def _reduce(self, flat: Tensor) -> None:
        try:
            dist.all_reduce(flat, group=self._tensor_group)
        except RuntimeError as error:
            raise self._lost() from error

    def broadcast_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite replicated tensors with the tensors of process 0."""
        for tensor in tensors if self.size > 1 else ():
            if not isinstance(tensor, DTensor):
                dist.broadcast(tensor.data, 0, group=self._tensor_group)

    def mesh(self, device_type: str) -> Any:
        """A one-dimensional device mesh of all processes, for FSDP2."""
        from torch.distributed.device_mesh import DeviceMesh

        return DeviceMesh.from_group(self._tensor_group, device_type)

    def device_name(self, name: str) -> str:
        """The `device` setting of this process. On a machine with GPUs each process has its own GPU.

        Raises ConfigError if several processes would share a GPU.
        """
        if self.size == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return name
        cards, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", self.local_rank + 1))
        if not cards:
            raise ConfigError(f"device = {name!r}: this machine shows no CUDA device. Use --device cpu.")
        if name not in ("auto", "cuda"):
            raise ConfigError(
                f"device = {name!r} is one GPU for {self.size} processes: with --device cuda each process has its own."
            )
        if processes > cards:
            raise ConfigError(
                f"{processes} processes on a machine that shows {cards} CUDA device(s): start {cards}, or --device cpu."
            )
        return f"cuda:{self.local_rank}"

    def close(self) -> None:
        """Disconnect this process from the others."""
        if self.size > 1 and dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def join(held: ExitStack) -> World:
    """Connect this process to the world that the launcher (torchrun) describes. Without a launcher it is alone.

    `held` closes the world at the end of the run. Raises RankError if the other processes cannot be reached.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if any(not os.environ.get(name) for name in names):
        return World()
    try:
        rank, size = (int(os.environ[name]) for name in names[:2])
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE, LOCAL_RANK: torchrun sets them to numbers: {error}") from error
    world = World(rank, size, local_rank)
    if size > 1:
        try:
            store = _find_each_other(rank, size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=CONNECT_TIMEOUT)
            world.wait_long()
        except (RuntimeError, ValueError) as error:
            where = ":".join(os.environ[name] for name in names[2:])
            why = str(error).partition("\n")[0]
            raise RankError(f"the {size} processes of this run cannot connect at {where}: {why}") from error
        held.callback(world.close)
    return world


def _find_each_other(rank: int, size: int) -> Any:
    """Wait until all processes have written to one store, and return it. A signal can interrupt this wait."""
    until = time.monotonic() + START_TIMEOUT.total_seconds()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
    options: dict[str, Any] = {"is_master": serves, "wait_for_workers": False, "multi_tenant": True}
    while True:
        try:
            store = dist.TCPStore(host, port, size, timeout=timedelta(seconds=1), **options)  # type: ignore[attr-defined]
            break
        except RuntimeError:
            if serves or time.monotonic() > until:
                raise
    store.set_timeout(CONNECT_TIMEOUT)
    store.set(f"minilora/{rank}", "here")
    while missing := [other for other in range(size) if not store.check([f"minilora/{other}"])]:
        if time.monotonic() > until:
            raise RuntimeError(f"processes {missing} have not started")
        time.sleep(0.05)
    return store


def _all_gather(message: bytes, size: int, group: Any) -> list[bytes]:
    """The messages of all processes. One round is enough if all messages are short, else there are two."""
    head = len(message).to_bytes(8, "little") + message[: MESSAGE_BYTES - 8]
    received = _all_gather_bytes(head, MESSAGE_BYTES, size, group)
    lengths = [int.from_bytes(each[:8], "little") for each in received]
    longest = max(lengths)
    if longest > MESSAGE_BYTES - 8:
        received = _all_gather_bytes(bytes(8) + message, 8 + longest, size, group)
    return [each[8 : 8 + length] for each, length in zip(received, lengths, strict=True)]


def _all_gather_bytes(message: bytes, num_bytes: int, size: int, group: Any) -> list[bytes]:
    sent = torch.frombuffer(bytearray(message.ljust(num_bytes, b"\0")), dtype=torch.uint8)
    received = [torch.empty_like(sent) for _ in range(size)]
    dist.all_gather(received, sent, group=group)
    return [each.numpy().tobytes() for each in received]


def _error_of(rank: int, message: dict[str, Any]) -> Exception:
    """The error that another process has reported."""
    text = message["text"] if rank == 0 else f"process {rank}: {message['text']}"
    if message["kind"] == StoppedError.__name__:
        return StoppedError(message["text"], message["signal"])
    if message["kind"] == BrokenPipeError.__name__:
        return BrokenPipeError(text)
    kind = getattr(errors, message["kind"], RankError)
    return kind(text) if issubclass(kind, MiniloraError) else RankError(text)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor. A sharded tensor is gathered from its shards, so every process must call this."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """`full_tensor` with a backward pass, which sums gradients over the processes and scatters them to the shards."""
    return tensor.full_tensor(grad_placements=[Partial()]) if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: its shard or the whole tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(model: Tensor, tensor: Tensor) -> Tensor:
    """Shard a whole tensor in the way that `model`, a tensor of the same shape, is sharded."""
    if not isinstance(model, DTensor) or tensor.shape != model.shape:
        return tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def collect(tensors: Iterable[Tensor]) -> None:
    """Take part in gathering sharded tensors, one after the other, while process 0 writes them."""
    for tensor in tensors:
        full_tensor(tensor)
