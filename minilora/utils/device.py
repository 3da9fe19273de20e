"""The device of a run: which one, which dtype, and how much of its memory is in use."""

import ctypes
import functools
import math
import os
import re
import resource
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch

from minilora.config import DEVICE
from minilora.errors import ConfigError, OutOfMemoryError

T = TypeVar("T")

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_malloc_trim, _mallopt = getattr(_libc, "malloc_trim", None), getattr(_libc, "mallopt", None)  # glibc only
M_MMAP_THRESHOLD, MAPPED_FROM_BYTES = -3, 2**20
OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # beside the class
# Of each shape of matrix product that it meets oneDNN keeps 0.6 MiB; a micro-batch has 20 to 40 shapes. It and torch in
# front of it keep 1,024 of them, by which a run grew step by step (as in github.com/pytorch/pytorch/issues/27971).
PRODUCTS_KEPT = 48
PRODUCT_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
KERNEL_DRIVER = Path("/proc/driver/nvidia/version")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
USUAL_CACHE_BYTES = {1: 48 * 2**10, 2: 2**20, 3: 32 * 2**20}  # where the system does not say
MICRO_BATCH_RANGE = (256, 1920)  # tokens: fewer make products slower; a server's large L3 is shared with other programs


def memory_bytes(device: torch.device) -> int:
    """Bytes in use now: allocated on a CUDA device, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return peak_memory_bytes(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes in use so far: allocated on a CUDA device, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_bytes(device: torch.device) -> int:
    """Bytes this process can still get: free on a CUDA device, available on the machine."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def cache_bytes(level: int) -> int:
    """The size of a CPU cache that holds data: level 1 and 2 of one core, level 3 as its cores share it."""
    for folder in sorted(CACHES.glob("index*")):
        try:
            kind, found, size = ((folder / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction" and found == str(level) and (number := re.fullmatch(r"(\d+)([KM]?)", size)):
            return int(number[1]) * {"": 1, "K": 2**10, "M": 2**20}[number[2]] or USUAL_CACHE_BYTES[level]
    return USUAL_CACHE_BYTES[level]


def block_rows(num_heads: int) -> int:
    """The most queries of a block of attention on a CPU: its fp32 scores and their gradients fill a core's L2.

    Both are num_heads x queries x queries numbers where a block sees as many keys.
    """
    rows = math.isqrt(cache_bytes(2) // (2 * 4 * num_heads))
    return max(16, rows // 8 * 8)


def wide_rows(vocabulary: int) -> int:
    """How many rows of logits a CPU converts to fp32 at a time: their 2 + 4 bytes a number fill a quarter of the L3.

    The rest of the cache is left to the weight of the head. A power of 2, so that it divides a chunk.
    """
    rows = min(max(1, cache_bytes(3) // (4 * (2 + 4) * vocabulary)), 256)
    return 1 << (rows.bit_length() - 1)


def micro_batch_tokens(ffn: int, dtype: torch.dtype) -> int:
    """The usual tokens of a micro-batch on a CPU: its gate, its up and their product fill 7/8 of the L3.

    The weights pass through the rest of the cache. ffn: intermediate_size; dtype: of the activations
    """
    tokens = cache_bytes(3) * 7 // (8 * 3 * ffn * dtype.itemsize)
    return min(max(tokens // 64 * 64, MICRO_BATCH_RANGE[0]), MICRO_BATCH_RANGE[1])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def free_cached(device: torch.device) -> None:
    """Give cached blocks back after an out-of-memory error."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def trim_heap(device: torch.device) -> None:
    """Give a CPU's freed blocks back to the system: glibc keeps what lies between live ones."""
    if device.type == "cpu" and _malloc_trim is not None:
        _malloc_trim(0)


def keep_few_products() -> None:
    """Bound what is kept of a CPU's matrix products, one for each shape; read before the first product only."""
    for name in PRODUCT_CACHES:
        os.environ.setdefault(name, str(PRODUCTS_KEPT))


def map_large_blocks(device: torch.device) -> None:
    """Let a CPU's large blocks go back to the system when they are freed; in glibc's heap they would leave holes."""
    if device.type == "cpu" and _mallopt is not None:
        _mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)


def gib(num_bytes: float) -> str:
    """A number of bytes for people."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def pick_device(name: str) -> torch.device:
    """auto | cpu | cuda | cuda:N as a device that is there. Raises ConfigError when it is not."""
    if not re.fullmatch(DEVICE, name):
        raise ConfigError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N.")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ConfigError(f"device {name}: this machine shows {found} CUDA device(s). Use --device auto or cpu.")
    return device


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the installed NVIDIA driver runs, as (major, minor); None without a driver."""
    try:
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def cuda_problem() -> tuple[str, str]:
    """Why torch does not use an NVIDIA card that seems to be there, and the fix; both empty where nothing is odd."""
    build, driver = torch.version.cuda, driver_cuda()
    if getattr(torch.version, "hip", None):
        return "", ""
    if driver is None:
        if not KERNEL_DRIVER.exists():
            return "", ""
        fix = "in a container, start it with --gpus all; on the machine itself, install the driver's libraries again"
        return "the kernel has an NVIDIA driver, but libcuda.so.1 is not found", fix
    runs = f"the NVIDIA driver runs CUDA {driver[0]}.{driver[1]}"
    if build is None:
        what = f"{runs}, but torch {torch.__version__} is built for the CPU"
        return what, f"install torch's build for CUDA {driver[0]}: its command is on pytorch.org/get-started"
    if int(build.partition(".")[0]) > driver[0]:  # a driver runs all minor versions of its CUDA
        fix = f"update the driver, or install torch's build for CUDA {driver[0]} (pytorch.org/get-started)"
        return f"torch is built for CUDA {build}, but {runs} at most", fix
    if torch.cuda.is_available():
        return "", ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    fix = f"CUDA_VISIBLE_DEVICES is {visible!r}: unset it" if visible is not None else "nvidia-smi must list a card"
    return "the driver fits torch, but torch finds no card", fix


def why_cpu() -> str:
    """One line that says why `--device auto` takes the CPU although an NVIDIA card seems to be there, and the fix."""
    what, fix = cuda_problem()
    return f"{what}; {fix}" if what else ""


def compile_cache_problem() -> str:
    """One line that says why transformers cannot be imported here: torch makes its folder for compiled code then."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not folder:
        return ""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        return (
            f"TORCHINDUCTOR_CACHE_DIR = {folder!r} cannot be used ({error.strerror}): unset it, or give a folder that "
            "can be written."
        )
    return ""


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The base's dtype; auto is bfloat16 where the hardware multiplies in it, else float32, never float16."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32


def _cpu_multiplies_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16 "))


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Matrix products in bf16 where `dtype`, the type of a run's products, is bf16; else nothing changes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    count = torch.get_num_threads()
    return f"{device} ({count} thread{'s' * (count != 1)})"


def halve_until_fits(
    work: Callable[[int], T], size: int, least: int, device: torch.device, problem: str
) -> tuple[T, int]:
    """(work(size), size); the size is halved, down to `least`, each time that memory runs out.

    Raises OutOfMemoryError(problem) when `least` does not fit.
    """
    while True:
        try:
            return work(size), size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size <= least:
                raise OutOfMemoryError(problem) from error
        size = max(least, size // 2)
        free_cached(device)  # outside of the except block, whose error holds on to what did not fit
