"""Settings of the whole process that a run changes, and puts back when it ends."""

import logging
import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from minilora.utils.device import PRODUCT_CACHES

ENVIRONMENT = (*PRODUCT_CACHES, "TOKENIZERS_PARALLELISM")
LOGGERS = ("bitsandbytes", "transformers")


@contextmanager
def settings_of_a_run() -> Iterator[None]:
    """Inside, fp32 products may use tensor cores. At the end every setting that a run changes is as it was before.

    These are the precision of products on CUDA, the state of torch's random generators, environment variables, the
    limit of open files and the levels of loggers.
    """
    with ExitStack() as before:
        for name in ENVIRONMENT:
            before.callback(_set_variable, name, os.environ.get(name))
        before.callback(_set_open_files, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        for name in LOGGERS:
            before.callback(logging.getLogger(name).setLevel, logging.getLogger(name).level)
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        before.callback(_set_random_state, torch.get_rng_state(), cuda)
        precision = torch.backends.cuda.matmul.fp32_precision
        if precision != "tf32":
            before.callback(_set_precision, precision)
            torch.backends.cuda.matmul.allow_tf32 = True
        yield


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _set_open_files(most: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def _set_random_state(cpu: torch.Tensor, cuda: list[torch.Tensor] | None) -> None:
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    elif torch.cuda.is_initialized():  # by the run; a later start of CUDA would have taken the seed of the CPU
        torch.cuda.manual_seed_all(torch.initial_seed())


def _set_precision(precision: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False  # torch has two interfaces, and both must agree
    torch.backends.cuda.matmul.fp32_precision = precision
