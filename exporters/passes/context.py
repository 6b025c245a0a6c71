"""What a model pass may need to know besides the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from exporters.program import Program


@dataclass(frozen=True)
class Context:
    """The facts behind a model.

    Attributes:
        program: where the model came from.
        origins: name of a lowered node -> name of the Program's node.
    """

    program: Program
    origins: dict[str, str] = field(default_factory=dict)


ModelPass = Callable[[ir.Model, Context], None]
