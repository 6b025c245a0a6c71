"""Typed errors of the host side: what is wrong, where it is, and the way out.

`exporters.build` prints an ExportError as one message without a traceback; anything else that
reaches it is a fault of the program and keeps its traceback.
"""

from __future__ import annotations


class ExportError(Exception):
    """Base of every refusal on the host side.

    Args:
        what: the fact that was found, with the offending value.
        where: file, field or tensor it was found in ("" when there is none to name).
        way_out: what the reader can do about it.
    """

    def __init__(self, what: str, *, where: str = "", way_out: str = "") -> None:
        self.what, self.where, self.way_out = what, where, way_out
        message = f"{where}: {what}" if where else what
        super().__init__(f"{message}. {way_out}" if way_out else message)


class PackageError(ExportError):
    """The delivery package as a whole does not hold together."""


class UnsafePath(PackageError):
    """A path, link or special file that could reach outside the package."""


class ConfigError(PackageError):
    """A JSON document or a model configuration that cannot be used."""


class TokenizerError(PackageError):
    """Tokenizer files that cannot be used."""


class WeightsError(PackageError):
    """A safetensors or .pth file, or a set of them, that cannot be used."""


class QuantizationError(WeightsError):
    """A quantised checkpoint that cannot be carried over exactly."""
