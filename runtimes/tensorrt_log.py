"""What TensorRT says when it fails: kept for the message, and read for the one cause that has a way out of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtimes.errors import Fault
from runtimes.session import OutOfDeviceMemory

# Letters and digits of "Cuda Runtime (out of memory)", of "Requested amount of GPU memory (N bytes) could not be
# allocated. There may not be enough free memory for allocation to succeed", and of CUDA's own name for the error.
_OUT_OF_MEMORY = ("outofmemory", "enoughfreememory", "cudaerrormemoryallocation", "memoryallocationfailed")
_LINES = 5


def logger(tensorrt: Any) -> Any:
    """A logger of the vendor's kind whose `errors` are the messages that it calls errors."""

    class Log(tensorrt.ILogger):
        """Keeps what the vendor calls an error."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (tensorrt.ILogger.Severity.ERROR, tensorrt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def failure(errors: Sequence[str], stage: str, where: str, otherwise: Fault) -> Fault:
    """OutOfDeviceMemory, naming the stage, where the messages speak of memory; else the given fault."""
    plain = "".join(character for character in " ".join(errors).lower() if character.isalnum())
    if any(sign in plain for sign in _OUT_OF_MEMORY):
        way_out = "Close what else uses the device, or use a smaller model"
        return OutOfDeviceMemory(f"out of memory while {stage}: {summary(errors)}", where, way_out)
    return otherwise


def summary(errors: Sequence[str]) -> str:
    """The first few messages, as one line."""
    return "; ".join(" ".join(error.split()).rstrip(".") for error in errors[:_LINES]) or "TensorRT gives no reason"
