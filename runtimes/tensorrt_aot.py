"""TensorRT's ahead-of-time plugins (tensorrt.plugin, since 10.9): an engine that carries the PTX of its kernels.

TensorRT asks once, while it builds, for a kernel's name, PTX, launch and scalar arguments as expressions over symbolic
dimensions, and keeps them: the engine then needs neither our library nor Python. It passes a kernel the inputs, the
scalars (32-bit integers), the outputs (tensorrt.plugin.aot_impl); our kernels have an order of their own, and not every
input. So an entry point's parameters are put into TensorRT's order, which its code does not notice: PTX names them.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtimes.errors import DRIVER, MAKE_AGAIN, Fault
from runtimes.tensorrt_ops import Op, Tensor, bind, evaluate, kernel_name, output_shape

#: Dynamic shared memory that a kernel gets without the launcher raising its limit, which TensorRT is not known to do.
SHARED_BYTES = 48 * 1024
_MULTIPROCESSOR_COUNT = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
NAMESPACE = "edge"
_LIBRARY = "Use the plugin library, for which the device needs a C++ compiler"


class BrokenKernels(Fault):
    """A PTX file that does not have the kernel, or not with the parameters, that an op asks for."""


class NotAheadOfTime(Fault):
    """The op has no launch that can be settled before the shapes are known."""


# --- PTX ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Ptx:
    """A PTX text in parts: what stands outside of entry points, and each of those."""

    common: str
    entries: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> Ptx:
        """Raises BrokenKernels for a text without entry points, or with an unclosed one."""
        common, entries, at = [], {}, 0
        for match in re.finditer(r"^(?:\.visible\s+)?\.entry\s+(\w+)", text, re.MULTILINE):
            if match.start() < at:
                raise BrokenKernels("has an entry point inside of another", match[1], MAKE_AGAIN)
            common.append(text[at : match.start()])
            at = _end_of_body(text, match.end(), match[1])
            entries[match[1]] = text[match.start() : at]
        if not entries:
            raise BrokenKernels("has no entry point", "PTX", MAKE_AGAIN)
        return cls("".join([*common, text[at:]]), entries)

    def alone(self, kernel: str, given: Sequence[str], wanted: Sequence[str]) -> str:
        """A PTX of this kernel alone, its parameters reordered.

        Args:
            kernel: its name.
            given: names of its parameters as they are, in order.
            wanted: names in the order of the result; those that the kernel does not have become addresses it ignores.

        Raises:
            BrokenKernels: no such kernel, or it has another number of parameters.
        """
        entry = self.entries.get(kernel)
        if entry is None:
            raise BrokenKernels(f"there is no kernel {kernel}", "PTX", "Make the bundle again")
        start, end = entry.index("("), entry.index(")")
        parameters = [text.strip() for text in entry[start + 1 : end].split(",") if text.strip()]
        if len(parameters) != len(given) or not set(given) <= set(wanted):
            raise BrokenKernels(f"has {len(parameters)} parameters, not {len(given)}", kernel, "Make the bundle again")
        by_name = dict(zip(given, parameters, strict=True))
        ordered = [by_name.get(name, f".param .u64 edge_unused_{i}") for i, name in enumerate(wanted)]
        return self.common + entry[: start + 1] + "\n\t" + ",\n\t".join(ordered) + "\n" + entry[end:]


def _end_of_body(text: str, start: int, name: str) -> int:
    depth = 0
    for match in re.compile(r"//[^\n]*|[{}]").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if match[0] == "}" and not depth:
            return match.end()
    raise BrokenKernels("has no end", name, MAKE_AGAIN)


# --- registration ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Symbols:
    """TensorRT's symbolic dimensions; see tensorrt_ops.Algebra."""

    trtp: Any

    def symbol(self, value: Any) -> Any:
        return self.trtp.ShapeExpr(value) if isinstance(value, int) else value

    def ceil_div(self, a: Any, b: Any) -> Any:
        return self.trtp.cdiv(a, b)

    def max(self, a: Any, b: Any) -> Any:
        return self.trtp.max(a, b)

    def min(self, a: Any, b: Any) -> Any:
        return self.trtp.min(a, b)


def multiprocessors() -> int:
    """Of the first device. Raises Fault where there is no driver or device."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Fault(f"the CUDA driver cannot be loaded ({error})", "libcuda.so.1", DRIVER) from error
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetAttribute(ctypes.byref(count), _MULTIPROCESSOR_COUNT, 0):
        raise Fault("the CUDA driver finds no device that works", "libcuda.so.1", DRIVER)
    return count.value


def register_ops(ops: Sequence[Op], ptx: str, sms: int, tensorrt: Any) -> None:
    """Registers each op under its name in namespace "edge", version "1", with TensorRT's plugin registry.

    Args:
        ops: those that the model needs.
        ptx: text of the kernels for this device.
        sms: its multiprocessors.
        tensorrt: the module, 10.9 or newer; needs PreviewFeature.ALIASED_PLUGIN_IO_10_03 where an output is an input's
            memory.

    Raises:
        NotAheadOfTime: an op has no such launch.
    """
    import tensorrt.plugin as trtp

    for op in ops:
        if op.launch is None:
            raise NotAheadOfTime("has no launch for TensorRT's ahead-of-time plugins", op.name, _LIBRARY)
    kernels = Ptx.parse(ptx)
    for op in ops:
        plugin_id = f"{NAMESPACE}::{op.name}"
        trtp.register(plugin_id)(_with_signature(functools.partial(_describe, op, tensorrt, trtp), op, trtp))
        trtp.aot_impl(plugin_id)(
            _with_signature(functools.partial(_launch, op, kernels, sms, tensorrt, trtp), op, trtp, launch=True)
        )


def _with_signature(function: Callable[..., Any], op: Op, trtp: Any, launch: bool = False) -> Callable[..., Any]:
    """``function`` with the parameters that TensorRT reads from a plugin function's signature."""
    kinds: list[tuple[str, Any]] = [(tensor.name, trtp.TensorDesc) for tensor in op.inputs]
    kinds += list(op.attributes.items())
    outputs = returned = _tuple_of((trtp.TensorDesc,) * len(op.outputs))
    if launch:
        kinds += [("outputs", outputs), ("tactic", int)]
        returned = _tuple_of((bytes, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs))

    def plugin(*arguments: Any, **attributes: Any) -> Any:
        return function(*arguments, **attributes)

    keep = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, keep, annotation=kind) for name, kind in kinds]
    plugin.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    return plugin


def _tuple_of(kinds: tuple[Any, ...]) -> Any:
    return tuple[kinds]  # type: ignore[valid-type]


def _types(op: Op, descs: Sequence[Any], tensorrt: Any) -> list[str]:
    names = {tensorrt.float32: "f32", tensorrt.float16: "f16", tensorrt.int8: "i8", tensorrt.int32: "i32"}
    types = [names.get(desc.dtype, str(desc.dtype)) for desc in descs]
    for tensor, kind in zip(op.inputs, types, strict=True):
        if kind not in tensor.types:
            raise Fault(f"is {kind}, must be {' or '.join(tensor.types)}", f"{op.name}, {tensor.name}", MAKE_AGAIN)
    return types


def _dims(desc: Any) -> list[Any]:
    """A tensor's dimensions: ints where TensorRT knows them, else its symbols."""
    return [dim.constant_value() if dim.is_constant else dim for dim in desc.shape_expr]


def _describe(op: Op, tensorrt: Any, trtp: Any, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
    """The outputs' descriptions, from the inputs'. While TensorRT asks for types alone, dimensions are not real, and
    must not be computed with: only their number counts."""
    kinds = {"f32": tensorrt.float32, "f16": tensorrt.float16, "i8": tensorrt.int8, "i32": tensorrt.int32}
    fake = any(dim.is_fake for desc in inputs for dim in desc.shape_expr)
    dims = [[1] * len(desc.shape_expr) if fake else _dims(desc) for desc in inputs]
    scope = bind(op, attributes, dims, _types(op, inputs, tensorrt), Symbols(trtp))

    def shape(tensor: Tensor) -> tuple[Any, ...]:
        values = output_shape(tensor, scope, Symbols(trtp))
        return tuple(trtp.ShapeExpr() if fake else value for value in values)

    by_name = dict(zip((tensor.name for tensor in op.inputs), inputs, strict=True))
    return tuple(
        by_name[tensor.like].aliased() if tensor.like else trtp.from_shape_expr(shape(tensor), kinds[tensor.types[0]])
        for tensor in op.outputs
    )


def _launch(op: Op, kernels: Ptx, sms: int, tensorrt: Any, trtp: Any, *arguments: Any) -> tuple[bytes, bytes, Any, Any]:
    """Kernel name, PTX, launch and scalars; ``arguments`` are inputs, attributes, outputs, tactic, by position."""
    assert op.launch is not None
    inputs, values = arguments[: len(op.inputs)], arguments[len(op.inputs) : len(op.inputs) + len(op.attributes)]
    attributes = dict(zip(op.attributes, values, strict=True))
    types, algebra = _types(op, inputs, tensorrt), Symbols(trtp)
    scope = bind(op, attributes, [_dims(desc) for desc in inputs], types, algebra) | {"sms": sms}

    params = trtp.KernelLaunchParams()
    for prefix, sizes in (("grid", op.launch.grid), ("block", op.launch.block)):
        for axis, text in zip("xyz", sizes, strict=False):
            setattr(params, f"{prefix}_{axis}", evaluate(text, scope, algebra))
    shared = evaluate(op.launch.shared, scope, algebra)
    if isinstance(shared, int) and shared > SHARED_BYTES:
        raise NotAheadOfTime(f"needs {shared} bytes of shared memory, TensorRT gives {SHARED_BYTES}", op.name, _LIBRARY)
    params.shared_mem = shared

    scalars = trtp.SymIntExprs(len(op.number_arguments))
    for i, text in enumerate(op.number_arguments):
        value = _bits(attributes[text]) if op.attributes.get(text) is float else evaluate(text, scope, algebra)
        scalars[i] = trtp.SymInt32(value)
    name = kernel_name(op, scope, types, algebra)
    return name.encode(), ahead_of_time_ptx(kernels, op, name).encode(), params, scalars


def ahead_of_time_ptx(kernels: Ptx, op: Op, kernel: str) -> str:
    """The PTX of an op's kernel, alone and with its parameters in TensorRT's order."""
    numbers = [f"({text})" for text in op.number_arguments]
    inputs, outputs = ([tensor.name for tensor in tensors] for tensors in (op.inputs, op.outputs))
    tensors = [name for name in op.tensor_arguments if name != op.workspace]
    return kernels.alone(kernel, [*tensors, *numbers], [*inputs, *numbers, *outputs])


def _bits(value: float) -> int:
    """A float32's bits as an int32: scalars are integers, and the kernel's parameter is a float of the same size."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
