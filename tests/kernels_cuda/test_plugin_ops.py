"""The ops' shapes, types, attributes and stored fields (kernels/cuda/library), without a GPU or TensorRT: against an
oracle written from the nodes' definition, and again under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from math import ceil, nan

import pytest

from runtimes.tensorrt_ops import bind, load_ops, output_shape
from tests.kernels_cuda.conftest import ROOT
from tests.kernels_cuda.plugin_library import REFUSED, Library, Refused, Spec, build
from tools.cuda_kernels import SOURCES

OPS = load_ops(SOURCES / "library" / "ops.txt")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Library:
    return Library(build(tmp_path_factory.mktemp("library")))


def weight(rows: int, columns: int, bits: int, block: int, scale: str = "f16") -> list[Spec]:
    blocks = ceil(columns / block)
    return [
        ("i32", (rows, blocks * block * bits // 32)),
        (scale, (rows, blocks)),
        ("i32", (rows, ceil(blocks * bits / 32))),
    ]


def linear(name: str, b: int, s: int, n: int, k: int, bits: int, block: int, scale: str = "f16"):
    """(op, attributes, inputs, outputs) of one of the linear nodes."""
    inputs: list[Spec] = [("f16", (b, s, k))]
    attributes: dict[str, float] = {"bits": bits, "block": block}
    if "Norm" in name:
        inputs.append(("f16", (k,)))
        attributes["eps"] = 1e-6
    inputs += [*weight(n, k, bits, block, scale), ("f16", (n,))]
    if "Residual" in name:
        inputs.append(("f16", (b, s, n)))
    return name, attributes, inputs, [("f16", (b, s, n // 2 if "Swiglu" in name else n))]


def head(b: int, v: int, k: int, bits: int, block: int, top: int):
    inputs = [("f16", (b, 1, k)), ("f16", (k,)), *weight(v, k, bits, block), ("i32", (2,))]
    tiles = ceil(v / 256)
    outputs = [("f32", (b, v)), ("f32", (b, tiles, top)), ("i32", (b, tiles, top))]
    return "EdgeHead", {"bits": bits, "block": block, "eps": 1e-5, "k": top}, inputs, outputs


def attention(b: int, s: int, heads: int, kv: int, d: int, c: int, splits: int, int8: bool = False):
    kind = "i8" if int8 else "f16"
    cache: list[Spec] = [(kind, (b, kv, c, d))] * 2 + ([("f16", (b, kv, c))] * 2 if int8 else [])
    inputs = [("f16", (b, s, (heads + 2 * kv) * d)), *cache, ("i32", (b,)), ("f32", (c, d // 2)), ("f32", (c, d // 2))]
    attributes = dict(heads=heads, kv_heads=kv, scale=d**-0.5, window=0, softcap=0.0, splits=splits)
    return f"EdgeAttention{'Int8' * int8}", attributes, inputs, [("f32", (b, heads, max(s, splits), d + 2)), *cache]


def merge(b: int, s: int, heads: int, d: int, p: int):
    inputs = [("f32", (b, heads, p, d + 2)), ("f16", (b, s, 3 * heads * d))]
    return "EdgeAttentionMerge", {"heads": heads}, inputs, [("f16", (b, s, heads * d))]


def decoder(name: str, attributes: dict[str, float], *shape: int):
    inputs: list[Spec] = [("f16", shape), *[("f16", (shape[1],))] * (2 if "Norm" in name else 1)]
    return name, attributes, inputs, [("f16", shape)]


def codebook(b: int, books: int, size: int, channels: int, *rest: int):
    inputs = [("i32", (b, books, *rest)), ("f16", (books * size, channels))]
    return "EdgeCodebook", {"size": size}, inputs, [("f16", (b, channels, *rest))]


LINEAR = ("EdgeLinear", "EdgeLinearResidual", "EdgeNormLinear", "EdgeNormLinearSwiglu")
CASES = [
    *(linear(name, 1, 1, 64, 96, 4, 32) for name in LINEAR),
    *(linear(name, 2, 7, 6, 104, 8, 16, "f32") for name in LINEAR),
    linear("EdgeLinear", 4, 1, 3072, 1024, 8, 1024),  # one block a row
    linear("EdgeNormLinearSwiglu", 1, 130, 6144, 1024, 4, 128),
    head(1, 1000, 64, 4, 32, 8),
    head(3, 257, 128, 8, 128, 64),
    ("EdgeMergeTop", {"k": 5}, [("f32", (2, 9, 5)), ("i32", (2, 9, 5))], [("f32", (2, 5)), ("i32", (2, 5))]),
    *(attention(1, s, 16, 8, 128, 512, 4, int8) for s in (1, 3, 64) for int8 in (False, True)),
    attention(2, 5, 4, 4, 64, 32, 8),
    merge(2, 5, 4, 64, 8),
    merge(1, 1, 16, 128, 4),
    codebook(1, 1, 1024, 8, 16, 16),
    codebook(2, 8, 256, 128, 75),
    decoder("EdgeGroupNormSilu", dict(groups=4, eps=1e-6, silu=1), 1, 32, 8, 8),
    decoder("EdgeGroupNormSilu", dict(groups=1, eps=1e-6, silu=0), 2, 6, 50),
    decoder("EdgeBiasActivation", dict(activation=1), 2, 6, 50),
    decoder("EdgeBiasActivation", dict(activation=2), 1, 32, 8, 8),
]
IDS = [f"{i}-{case[0]}" for i, case in enumerate(CASES)]


def test_the_table_has_every_node(library) -> None:
    from exporters.tensorrt_functions import KERNELS

    assert library.ops() == list(OPS)
    assert set(KERNELS) <= set(OPS)
    assert {case[0] for case in CASES} == set(OPS)


@pytest.mark.parametrize(("op", "attributes", "inputs", "outputs"), CASES, ids=IDS)
def test_outputs(library, op, attributes, inputs, outputs) -> None:
    assert library.outputs(op, attributes, inputs) == outputs
    unknown = [(kind, (-1, *shape[1:])) if i == 0 else (kind, shape) for i, (kind, shape) in enumerate(inputs)]
    for (_, found), (_, known) in zip(library.outputs(op, attributes, unknown), outputs, strict=True):
        assert len(found) == len(known)
        assert all(f in (-1, k) for f, k in zip(found, known, strict=True))


@pytest.mark.parametrize(("op", "attributes", "inputs", "outputs"), CASES, ids=IDS)
def test_python_reads_the_same_table(op, attributes, inputs, outputs) -> None:
    scope = bind(OPS[op], attributes, [shape for _, shape in inputs], [kind for kind, _ in inputs], None)  # type: ignore[arg-type]
    found = [(tensor.types[0], tuple(output_shape(tensor, scope, None))) for tensor in OPS[op].outputs]  # type: ignore[arg-type]
    assert found == outputs
    aliases = {tensor.name: tensor.like for tensor in OPS[op].outputs if tensor.like}
    assert aliases == {f"present_{name.removeprefix('past_')}": name for name in aliases.values()}
    assert bool(aliases) == op.startswith("EdgeAttention") * (op != "EdgeAttentionMerge")


@pytest.mark.parametrize(("op", "attributes", "inputs", "outputs"), CASES, ids=IDS)
def test_every_wrong_input_is_refused_by_name(library, op, attributes, inputs, outputs) -> None:
    for i, tensor in enumerate(OPS[op].inputs):
        kind, shape = inputs[i]
        wrong_type = next(k for k in ("i8", "i32", "other") if k not in tensor.types)
        # A zero and a rank that no node takes are wrong of every tensor; one more of a size, where another says it too.
        for wrong in ((wrong_type, shape), (kind, ()), (kind, (1,) * 9), (kind, (*shape[:-1], 0))):
            with pytest.raises(Refused, match=f"^{op}, input {tensor.name}: ") as refusal:
                library.outputs(op, attributes, [*inputs[:i], wrong, *inputs[i + 1 :]])
            assert refusal.value.code == REFUSED
    with pytest.raises(Refused, match=f"^{op}: takes {len(inputs)} inputs, was given {len(inputs) - 1}$"):
        library.outputs(op, attributes, inputs[:-1])


L = linear("EdgeNormLinear", 1, 3, 8, 64, 4, 32)
A = attention(1, 3, 4, 2, 64, 16, 4)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (L, {"bits": 3}, "EdgeNormLinear, attribute bits: one_of(bits, 4, 8) does not hold"),
        (L, {"block": 24}, "EdgeNormLinear, attribute block: one_of(block, 16, block // 32 * 32) does not hold"),
        (L, {"block": 0}, "EdgeNormLinear, attribute block: 16 <= block does not hold"),
        (L, {"block": 2.5}, "EdgeNormLinear, attribute block: is not one integer"),
        (L, {"eps": nan}, "EdgeNormLinear, attribute eps: is not a finite number"),
        (L, {"eps": None}, "EdgeNormLinear, attribute eps: is missing"),
        (L, {"tiles": 1}, "EdgeNormLinear: has no attribute tiles"),
        (linear("EdgeLinear", 1, 1, 8, 20, 4, 32), {}, "EdgeLinear, input x: K % 8 == 0 does not hold"),
        (L, {1: (63,)}, "EdgeNormLinear, input norm: dimension 0 is 63, must be K = 64"),
        (L, {2: (8, 9)}, "EdgeNormLinear, input codes: W == G * block * bits // 32 does not hold"),
        (L, {4: (8, 2)}, "EdgeNormLinear, input zeros: Z == ceil_div(G * bits, 32) does not hold"),
        (L, {5: (9,)}, "EdgeNormLinear, input bias: dimension 0 is 9, must be N = 8"),
        (L, {5: (9, 1)}, "EdgeNormLinear, input bias: has 2 dimensions, must have [N]"),
        (A, {"kv_heads": 3}, "EdgeAttention, attribute heads: heads % kv_heads == 0 does not hold"),
        (A, {"kv_heads": 0}, "EdgeAttention, attribute kv_heads: 1 <= kv_heads does not hold"),
        (A, {"window": -1}, "EdgeAttention, attribute window: 0 <= window does not hold"),
        (A, {0: (1, 3, 500)}, "EdgeAttention, input qkv: Q == (heads + 2 * kv_heads) * D does not hold"),
        (A, {4: (15, 32)}, "EdgeAttention, input cos: dimension 0 is 15, must be C = 16"),
        (codebook(1, 2, 8, 4, 5), {1: (15, 4)}, "EdgeCodebook, input tables: R == Q * size does not hold"),
        (decoder("EdgeGroupNormSilu", dict(groups=3, eps=0, silu=1), 1, 8, 4), {},
         "EdgeGroupNormSilu, attribute groups: C % groups == 0 does not hold"),
    ],
)  # fmt: skip
def test_refusals_say_what_is_wrong(library, case, change, message) -> None:
    op, attributes, inputs, _ = case
    changed = [(kind, change.get(i, shape)) for i, (kind, shape) in enumerate(inputs)]
    named = {**attributes, **{name: value for name, value in change.items() if isinstance(name, str)}}
    with pytest.raises(Refused) as refusal:
        library.outputs(op, {name: value for name, value in named.items() if value is not None}, changed)
    assert str(refusal.value) == message


def test_an_op_that_is_not_there(library) -> None:
    with pytest.raises(Refused, match=r"^there is no op EdgeConv; there are EdgeLinear, "):
        library.outputs("EdgeConv", {}, [])


def test_sizes_past_64_bits_are_refused(library) -> None:
    most = 2**31 - 1
    op, attributes, inputs, _ = decoder("EdgeBiasActivation", {"activation": 1}, 1, 8, most, most, most)
    with pytest.raises(Refused, match=r"^EdgeBiasActivation: a size passes 64 bits$"):
        library.outputs(op, attributes, inputs)


# --- fields -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("op", list(OPS))
def test_stored_fields_come_back(library, op) -> None:
    given = [1e-6 if kind is float else 7 for kind in OPS[op].attributes.values()]
    kept = [struct.unpack("f", struct.pack("f", value))[0] for value in given]  # floats are float32
    assert library.round_trip(op, given) == kept


def fields(op: str, integer: str = "i", real: str = "f") -> list[tuple[str, str, float]]:
    return [
        (name, real if kind is float else integer, 0.5 if kind is float else 32)
        for name, kind in OPS[op].attributes.items()
    ]


@pytest.mark.parametrize("op", list(OPS))
def test_fields_of_every_width_are_read(library, op) -> None:
    wanted = [value for _, _, value in fields(op)]
    for integer, real in (("b", "f"), ("h", "d"), ("i", "f"), ("l", "d")):
        given = [("plugin_version", "?", 0), *reversed(fields(op, integer, real)), ("plugin_namespace", "?", 0)]
        assert library.read_fields(op, given, len(wanted), stored=False) == wanted


def test_wrong_fields_are_refused(library) -> None:
    op, count = "EdgeNormLinear", 3
    right = fields(op)
    ours, later, foreign = ("edge_format", "i", 1), ("edge_format", "i", 2), ("plugin_version", "?", 0)
    another = ": the engine was built with another version of this library (format "
    for given, stored, message in [
        (right, True, f"{another}unknown, this one reads 1); build it again"),
        ([*right, later], True, f"{another}2, this one reads 1); build it again"),
        ([*right, ours], False, ": has no attribute edge_format"),
        ([*right, foreign, ours], True, ": has no attribute plugin_version"),
        (right[:-1], False, ", attribute eps: is missing"),
        ([*right, right[0]], False, ", attribute bits: is given twice"),
        ([("bits", "f", 4), *right[1:]], False, ", attribute bits: is not one integer"),
        ([("bits", "2", 4), *right[1:]], False, ", attribute bits: is not one integer"),
        ([*right[:2], ("eps", "i", 1)], False, ", attribute eps: is not one float"),
        ([*right[:2], ("eps", "f", nan)], False, ", attribute eps: is not a finite number"),
        ([("bits", "l", 2**40), *right[1:]], False, ", attribute bits: is not a 32-bit integer"),
    ]:
        with pytest.raises(Refused) as refusal:
            library.read_fields(op, given, count, stored=stored)
        assert str(refusal.value) == op + message
    assert library.read_fields(op, [*right, ours], count, stored=True) == [32, 32, 0.5]


# --- again, with sanitizers -------------------------------------------------------------------------------------------
@pytest.mark.long
@pytest.mark.skipif("EDGE_SANITIZE" in os.environ, reason="this is the run with sanitizers")
def test_under_sanitizers() -> None:
    # The C++ runtime too: the sanitizer looks for the function that throws when it starts.
    names = [f"-print-file-name={name}.so" for name in ("libasan", "libstdc++")]
    files = [subprocess.run(["g++", name], capture_output=True, text=True, check=True).stdout.strip() for name in names]
    environment = os.environ | {
        "EDGE_SANITIZE": "1",
        "LD_PRELOAD": " ".join(files),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "1 skipped" in done.stdout
