"""Kernels of kernels/cpu against ONNX Runtime's, operator by operator, with the roof of this machine beside both.

    python -m tools.bench_kernels [--variant NAME] [--only TEXT] [--rounds N] [--large] [--output FILE]

One thread each. ONNX Runtime runs a model of several copies of one operator, each with its own input, and ours is
called as often, so that the cost of a call is shared; the weights are the same numbers. In every round each contender
has its turn, warm; times are medians over the rounds, ratios are taken within one run. Results must agree before
anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from exporters import cpu_layout
from runtimes.bandwidth import measure_roof
from runtimes.host import cpu_model
from tools.kernel_library import VARIANTS, Call, Library, build, is_native

Array = np.ndarray[Any, Any]

#: Copies of the operator in ONNX Runtime's model; 1 where the work is so large that a call's cost is nothing.
COPIES, LARGE = 8, 50_000_000
TOLERANCE = {"exact": 1e-5, "fast": 3e-2}


@dataclass(frozen=True)
class Row:
    """One operator at one size.

    Attributes:
        calls: the kernels that make it up; the last array of the last call is the result.
        node: (copy, name of its input) -> the ONNX node, whose output is ``y{copy}``.
        constants: what the nodes read beside their input.
        x: the input.
        shape: of the result.
        products: multiplications with an addition.
        bytes: of weights or cache read once.
        tolerance: of the comparison, as a share of the largest value.
    """

    name: str
    calls: Sequence[Call]
    node: Callable[[int, str], onnx.NodeProto]
    constants: dict[str, Array]
    x: Array
    shape: tuple[int, ...]
    products: int
    bytes: int
    tolerance: float = TOLERANCE["exact"]
    per_lane: int = 1  # multiply-adds that one instruction does in a lane; integer dot products do four


@dataclass(frozen=True)
class Timing:
    """Seconds of one call; ``roof`` is what the machine's peak or its memory alone would take."""

    name: str
    ours: float
    onnxruntime: float
    roof: float
    difference: float


# --- the table ------------------------------------------------------------------------------------------------------


def quantized(m: int, rows: int, columns: int, bits: int, block: int, zeros: bool, fast: bool) -> Row:
    random = np.random.default_rng(0)
    blocks = columns // block
    codes = random.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8)
    scales = random.uniform(0.001, 0.01, (rows, blocks)).astype(np.float32)
    points = random.integers(0, 256, (rows, -(-blocks * bits // 8)), np.uint8) if zeros else None
    packed = cpu_layout.pack_quantized(codes, scales, points, bits)
    x = random.standard_normal((m, columns)).astype(np.float32)
    y = np.empty((m, rows), np.float32)
    call = Call(
        "quantized_linear",
        [x, packed.codes, packed.scales, packed.zeros, None, y],
        [rows, columns, bits, block, m, fast],
    )
    constants = {"codes": codes, "scales": scales} | ({"zeros": points} if zeros else {})

    def node(copy: int, name: str) -> onnx.NodeProto:
        return helper.make_node(
            "MatMulNBits", [name, *constants], [f"y{copy}"], domain="com.microsoft", K=columns, N=rows, bits=bits,
            block_size=block, accuracy_level=4 if fast else 1,
        )  # fmt: skip

    mode = "fast" if fast else "exact"
    return Row(
        f"int{bits} {rows}x{columns} block {block}, {m} rows, {mode}", [call], node, constants, x, y.shape,
        m * rows * columns, packed.codes.nbytes + packed.scales.nbytes, TOLERANCE[mode], 4 if fast else 1,
    )  # fmt: skip


def conv(image: bool, into: int, out: int, size: int, kernel: int, dilation=1, stride=1, transposed=False) -> Row:
    random = np.random.default_rng(0)
    axes = 2 if image else 1
    pad = (kernel - stride) // 2 if transposed else (kernel - 1) * dilation // 2
    result = size * stride if transposed else size // stride
    pad = pad if stride == 1 or transposed else stride // 2
    x = random.standard_normal((1, into, *[size] * axes)).astype(np.float32)
    shape = (into, out) if transposed else (out, into)
    weight = random.standard_normal((*shape, *[kernel] * axes)).astype(np.float32)
    bias = random.standard_normal(out).astype(np.float32)
    pack = cpu_layout.pack_conv_transpose if transposed else cpu_layout.pack_conv
    y = np.empty((1, out, *[result] * axes), np.float32)

    def pair(value: int, other: int) -> list[int]:
        return [value if image else other, value]

    sizes = [1, into, *pair(size, 1), out, *pair(result, 1), *pair(kernel, 1), *pair(stride, 1), *pair(pad, 0)]
    sizes += [*pair(dilation, 1), 1, 1, 0, 0, 0]
    name = "conv_transpose2d" if transposed else "conv2d"
    call = Call(name, [x, pack(weight), None, None, bias, None, y], sizes)

    def node(copy: int, name: str) -> onnx.NodeProto:
        return helper.make_node(
            "ConvTranspose" if transposed else "Conv", [name, "weight", "bias"], [f"y{copy}"], pads=[pad] * 2 * axes,
            strides=[stride] * axes, dilations=[dilation] * axes,
        )  # fmt: skip

    label = f"{'image' if image else 'audio'} {into}->{out} of {'x'.join([str(size)] * axes)}, kernel {kernel}"
    label += f", dilation {dilation}" * (dilation > 1) + f", stride {stride}" * (stride > 1)
    taps = kernel**axes
    products = (x.size if transposed else y.size) * taps * (out if transposed else into)
    return Row(
        label + ", transposed" * transposed, [call], node, {"weight": weight, "bias": bias}, x, y.shape, products,
        weight.nbytes,
    )  # fmt: skip


def attention(steps: int, past: int, heads: int, kv_heads: int, width: int, capacity: int) -> Row:
    random = np.random.default_rng(0)
    x = random.standard_normal((1, steps, (heads + 2 * kv_heads) * width)).astype(np.float32)
    keys, values = (random.standard_normal((1, kv_heads, capacity, width)).astype(np.float32) for _ in range(2))
    angles = np.arange(capacity)[:, None] / 10000.0 ** np.linspace(0, 1, width // 2, endpoint=False)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    last = np.array([past + steps - 1], np.int32)
    y = np.empty((1, steps, heads * width), np.float32)
    flat, scale = x.reshape(-1), width**-0.5
    parts = [flat, flat[heads * width :], flat[(heads + kv_heads) * width :], cos, sin, last]
    sizes = [1, steps, heads, kv_heads, width, capacity, 0, 0, 0, *[x.shape[2]] * 3]
    shared = [*parts, keys.copy(), values.copy()]
    calls = [Call("kv_append", shared, sizes, [scale, 0.0]), Call("kv_attend", [*shared, y], sizes, [scale, 0.0])]
    total = np.array(past + steps, np.int32)
    constants = {"keys": keys, "values": values, "last": last, "total": total, "cos": cos, "sin": sin}

    def node(copy: int, name: str) -> onnx.NodeProto:
        return helper.make_node(
            "GroupQueryAttention", [name, "", "", *constants], [f"y{copy}", f"key{copy}", f"value{copy}"],
            domain="com.microsoft", num_heads=heads, kv_num_heads=kv_heads, do_rotary=1, scale=scale,
        )  # fmt: skip

    return Row(
        f"attention {heads}/{kv_heads} heads of {width}, {steps} steps at {past}", calls, node, constants, x, y.shape,
        2 * heads * width * steps * (past + (steps + 1) // 2), 2 * 4 * kv_heads * width * (past + steps),
    )  # fmt: skip


def table(large: bool) -> Iterator[Row]:
    """The reference student's shapes, then those of a model of half a billion parameters."""
    for fast in (False, True):
        for m in (1, 64):
            for rows, columns in ((320, 192), (192, 192), (640, 192), (192, 320)):
                yield quantized(m, rows, columns, 4, 32, True, fast)
        yield quantized(1, 1672, 192, 8, 64, False, fast)
    yield attention(1, 100, 6, 2, 32, 512)
    yield attention(1, 511, 6, 2, 32, 512)
    yield attention(64, 0, 6, 2, 32, 512)
    for into, out, size in (
        (16, 32, 8),
        (32, 32, 8),
        (32, 32, 16),
        (32, 32, 32),
        (32, 16, 32),
        (16, 16, 32),
        (16, 1, 32),
    ):
        yield conv(True, into, out, size, 3)
    yield conv(True, 32, 16, 32, 1)
    for channels, length in ((64, 256), (32, 1024), (16, 4096), (8, 16384)):
        for dilation in (1, 9):
            yield conv(False, channels, channels, length, 7, dilation)
        yield conv(False, channels, channels, length, 1)
        yield conv(False, 2 * channels, channels, length // 4, 8, stride=4, transposed=True)
    yield conv(False, 128, 128, 64, 7)
    yield conv(False, 8, 1, 16384, 7)
    yield conv(False, 8, 16, 16384, 8, stride=4)
    if large:
        for fast in (False, True):
            for m in (1, 64):
                yield quantized(m, 4864, 896, 4, 32, True, fast)
                yield quantized(m, 896, 4864, 4, 32, True, fast)
            yield quantized(1, 151936, 896, 4, 32, True, fast)
            yield quantized(1, 151936, 896, 8, 64, False, fast)
        yield attention(1, 1000, 14, 2, 64, 2048)
        yield attention(64, 448, 14, 2, 64, 2048)
        yield conv(True, 128, 128, 64, 3)


# --- the contenders -------------------------------------------------------------------------------------------------


def peer(row: Row) -> tuple[Callable[[], None], int, Array]:
    """ONNX Runtime's (run, copies in a run, first result)."""
    copies = 1 if row.products > LARGE else COPIES
    names = [f"x{i}" for i in range(copies)]
    shape = list(row.shape)
    graph = helper.make_graph(
        [row.node(i, name) for i, name in enumerate(names)],
        "one",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(row.x.shape)) for name in names],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, shape) for i in range(copies)],
        [numpy_helper.from_array(value, name) for name, value in row.constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    results = [np.empty(row.shape, np.float32) for _ in names]
    for i, name in enumerate(names):
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(row.x.copy()))
        result = results[i]
        binding.bind_output(f"y{i}", "cpu", 0, np.float32, result.shape, result.ctypes.data)

    def run(keep: list[Array] = results) -> None:  # the binding holds the results' addresses only
        session.run_with_iobinding(binding)

    return run, copies, results[0]


def median_times(runs: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """Median seconds of each, taking turns; a turn repeats until it has lasted some milliseconds."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, taken in zip(runs, times, strict=True):
            run()
            start, count = time.perf_counter(), 0
            while count == 0 or time.perf_counter() - start < 0.004:
                run()
                count += 1
            taken.append((time.perf_counter() - start) / count)
    return [statistics.median(taken) for taken in times]


def measure(library: Library, row: Row, rounds: int, peak: float, bandwidth: float) -> Timing:
    theirs, copies, expected = peer(row)
    repeated = [library.repeated(call, copies) for call in row.calls]

    def ours() -> None:
        for run in repeated:
            run()

    ours()
    theirs()
    result = row.calls[-1].buffers[-1]
    difference = float(np.abs(result - expected).max() / np.abs(expected).max())
    if not difference <= row.tolerance:
        raise SystemExit(f"{row.name}: differs from ONNX Runtime by {difference:.1e} of the largest value")
    own, other = median_times([ours, theirs], rounds)
    roof = max(row.products / row.per_lane / peak, row.bytes / bandwidth if row.bytes > 8 << 20 else 0)
    return Timing(row.name, own / copies, other / copies, roof, difference)


def measure_peak(library: Library) -> float:
    """Float32 multiply-adds a second of one thread."""
    count = np.zeros(1, np.int64)
    run = library.repeated(Call("multiply_adds", [count], [1 << 16]), 1)
    run()
    return float(count[0]) / median_times([run], 9)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=VARIANTS, default="avx512vnni")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--large", action="store_true", help="also a model of half a billion parameters")
    parser.add_argument("--output", type=Path, help="JSON of the figures")
    arguments = parser.parse_args()
    if not is_native(arguments.variant):
        raise SystemExit(f"{arguments.variant} does not run on this CPU; nothing is timed in an emulator")
    with tempfile.TemporaryDirectory() as folder:
        library = Library(build(arguments.variant, Path(folder)))
        peak, bandwidth = measure_peak(library), measure_roof(1).bytes_per_second
        timings = []
        for row in table(arguments.large):
            if arguments.only in row.name:
                timings.append(measure(library, row, arguments.rounds, peak, bandwidth))
    title = (
        f"{cpu_model()}, {arguments.variant}, 1 thread: {peak / 1e9:.0f} G multiply-adds/s, {bandwidth / 1e9:.0f} GB/s"
    )
    shown = Table("operator", "ours, us", "ONNX Runtime, us", "ratio", "of the roof", title=title)
    for t in timings:
        shown.add_row(
            t.name, f"{t.ours * 1e6:.1f}", f"{t.onnxruntime * 1e6:.1f}", f"{t.ours / t.onnxruntime:.2f}",
            f"{t.roof / t.ours:.0%}",
        )  # fmt: skip
    Console(width=120).print(shown)
    if arguments.output:
        facts = {"cpu": cpu_model(), "variant": arguments.variant, "threads": 1, "multiply_adds_per_second": peak}
        facts |= {"bytes_per_second": bandwidth, "rows": [asdict(t) for t in timings]}
        arguments.output.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
