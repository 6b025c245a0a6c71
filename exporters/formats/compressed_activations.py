"""compressed-tensors' input_activations: how a quantised layer's input is rounded before it is multiplied.

Source: compressed-tensors 0.20 (quantization/quant_args, quantization/lifecycle/forward). A static scale is stored as
``input_scale`` with ``input_zero_point``; NVFP4's groups have theirs below a static ``input_global_scale``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.activations import Activation
from exporters.errors import QuantizationError
from exporters.formats import scheme
from exporters.formats.scheme import AGAIN, SCALES, Layout, Read, Scheme, Shape

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint

_ONE = ((1,), (), (1, 1), (1, 1, 1))
#: (type, bits) -> encoding
ENCODINGS: Mapping[tuple[Any, Any], str] = {
    ("int", 4): "int4",
    ("int", 8): "int8",
    ("float", 8): "float8_e4m3fn",
    ("float", 4): "float4_e2m1fn",
}
SUPPORTED = (
    "Supported: int8, int4 and fp8 per token, in groups or with a static scale of the tensor, and NVFP4's groups of 16"
)


@dataclass(frozen=True)
class Rounding:
    """What the scheme says of every layer; the numbers are the layer's own.

    Attributes:
        encoding, group, symmetric: see Activation.
        static: a tensor holds the scale.
        below_global: ``input_global_scale`` holds what scales of groups are multiplied by.
        names: of the static scale and its zero point.
    """

    encoding: str
    group: int = 0
    symmetric: bool = True
    static: bool = False
    below_global: bool = False
    names: tuple[str, str] = ("input_scale", "input_zero_point")

    def layout(self) -> Layout:
        """Tensors of a layer beside those of its weight."""
        found: Layout = {}
        if self.static:
            found[self.names[0]] = (SCALES, _ONE)
            if not self.symmetric:
                found[self.names[1]] = (frozenset({"I8"}), _ONE)
        if self.below_global:
            found["input_global_scale"] = (frozenset({"F32"}), _ONE)
        return found

    def check(self, module: str, columns: int) -> None:
        """Refuses groups that do not divide K, which the library refuses when it runs."""
        if self.group and columns % self.group:
            raise QuantizationError(
                f"its input is rounded in groups of {self.group}, which do not divide K = {columns}",
                where=module,
                way_out="Quantise this module with a group size that divides it, or per token",
            )

    def leftovers(self, module: str, stored: Checkpoint) -> Iterator[str]:
        """Zero points of symmetric inputs, which are all zero."""
        name = f"{module}.{self.names[1]}"
        if self.symmetric and name in stored.tensors:
            if stored.tensor(name).float().any():
                raise QuantizationError(
                    "holds zero points, but input_activations says symmetric",
                    where=name,
                    way_out="State symmetric: false, or drop the tensor",
                )
            yield name

    def activation(self, read: Read, module: str) -> Activation:
        """The layer's own."""
        scale, whole, zero = 0.0, 0.0, 0
        if self.static:
            scale = _positive(read, f"{module}.{self.names[0]}")
            if not self.symmetric:
                zero = int(read(f"{module}.{self.names[1]}").reshape(-1)[0])
        if self.below_global:
            whole = _positive(read, f"{module}.input_global_scale")
        return Activation(self.encoding, self.group, self.symmetric, scale, zero, whole)


class Rounded(Scheme):
    """A scheme whose layers' inputs may be rounded, as its ``rounding`` says."""

    rounding: Rounding | None

    def check(self, module: str, shape: Shape) -> None:
        """See Scheme."""
        if self.rounding is not None:
            self.rounding.check(module, shape[1])

    @property
    def rounds_input(self) -> bool:
        """See Scheme."""
        return self.rounding is not None

    def activation(self, read: Read, module: str) -> Activation | None:
        """See Scheme."""
        return None if self.rounding is None else self.rounding.activation(read, module)

    def leftovers(self, module: str, stored: Checkpoint) -> Iterator[str]:
        """See Scheme."""
        if self.rounding is not None:
            yield from self.rounding.leftovers(module, stored)


def _positive(read: Read, name: str) -> float:
    return float(scheme.positive_scales(read(name), name).reshape(-1)[0])


def rounding(args: Any, at: str) -> Rounding | None:
    """``input_activations`` of a config group, None for none.

    Raises QuantizationError for what is not known, and for one scale taken from all tokens that are run together:
    then what a token becomes would depend on how a prompt is cut.
    """
    if args is None:
        return None
    at = f"{at}.input_activations"
    if not isinstance(args, dict):
        scheme.refuse(f"is {args!r:.80}", at, "Write the scheme out, or null")
    kind, bits = args.get("type", "int"), args.get("num_bits", 8)
    encoding = None if isinstance(bits, bool) or not isinstance(bits, int) else ENCODINGS.get((kind, bits))
    if encoding is None:
        scheme.refuse(f"{kind!r:.40} of {bits!r:.40} bits", at, SUPPORTED)
    symmetric = args.get("symmetric", True)
    if not isinstance(symmetric, bool) or (kind == "float" and not symmetric):
        scheme.refuse(f"symmetric is {symmetric!r:.40} for {kind}", at, SUPPORTED)
    dynamic, size = args.get("dynamic", False), args.get("group_size")
    strategy = args.get("strategy") or ("tensor" if size is None else "group")
    if "uint8" in str(args.get("scale_dtype")):
        scheme.refuse("has scales that are powers of two (MX)", at, SUPPORTED)
    if strategy in ("group", "tensor_group") and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        scheme.refuse(f"group_size is {size!r:.40}", at, "Give a positive whole number")
    if encoding == "float4_e2m1fn" or strategy == "tensor_group":
        if (encoding, strategy, dynamic) != ("float4_e2m1fn", "tensor_group", "local"):
            scheme.refuse(f"{strategy} of {kind} {bits}, dynamic {dynamic!r:.40}", at, SUPPORTED)
        return Rounding(encoding, size, below_global=True)
    if dynamic is True and strategy == "tensor":
        scheme.refuse(
            "takes one scale from all tokens that are run together, so that a token's result would depend on them",
            at,
            'Quantise with strategy "token", or with a static scale',
        )
    if dynamic is True and strategy in ("token", "group"):
        return Rounding(encoding, size if strategy == "group" else 0, symmetric)
    if not dynamic and strategy == "tensor":
        return Rounding(encoding, symmetric=symmetric, static=True)
    scheme.refuse(f"strategy {strategy!r:.40}, dynamic {dynamic!r:.40}", at, f"{SUPPORTED}. {AGAIN}")


def spread_rows(values: np.ndarray, rows: int, each: int) -> np.ndarray:
    """[ceil(N/each), ...] -> [N, ...]."""
    return np.ascontiguousarray(np.repeat(values, each, 0)[:rows])
