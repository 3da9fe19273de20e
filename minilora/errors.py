"""Every error that a user can act on, with its exit code. `cli.py` prints it as one message."""


class MiniloraError(Exception):
    """A problem the user can act on: the text says what was given, what is possible and what to do."""

    exit_code = 2


class ConfigError(MiniloraError, ValueError):
    """A key, value or combination of settings that cannot be obeyed."""


class DataError(MiniloraError, ValueError):
    """A training or evaluation file that cannot be read as examples."""


class ModelError(MiniloraError, ValueError):
    """A base model or tokenizer that is not available, or that this library cannot train exactly."""


class UnsupportedModelError(ModelError):
    """A model of a kind that this library cannot train; another copy of the same model does not help."""


class AdapterError(MiniloraError, ValueError):
    """An adapter that does not fit the base it is put on, or whose files are not what they claim."""


class CheckpointError(MiniloraError, ValueError):
    """A checkpoint that is damaged, or that belongs to another run."""


class StorageError(MiniloraError, OSError):
    """A folder or disk that does not take what has to be written; `reason` is the message without its advice."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


class DivergedError(MiniloraError, ArithmeticError):
    """Loss or gradient stayed non-finite for several steps in a row."""

    exit_code = 3


class OutOfMemoryError(MiniloraError, MemoryError):
    """Not even one example fits the device's memory."""

    exit_code = 4


class RankError(MiniloraError, RuntimeError):
    """Another process of the run has failed, or is gone."""

    exit_code = 1


class StoppedError(MiniloraError, InterruptedError):
    """A signal asked the run to stop; the training so far is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, with the next one if it ends in a colon; or its name."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first


def printable(text: str, longest: int = 600) -> str:
    """A message without control characters (a file may have put them there), its lines cut to a readable length."""
    lines = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in line[:longest]) for line in text.split("\n")]
    return "\n".join(line + ("..." if len(line) >= longest else "") for line in lines[:80])
