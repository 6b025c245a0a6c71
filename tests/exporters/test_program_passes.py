"""Each Program pass does what its docstring draws, leaves the function as it was, and keeps off what looks alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exporters import ops, passes
from exporters.passes import (
    cancel_layout,
    drop_identities,
    fold_rope,
    fuse_epilogues,
    fuse_projection,
    fuse_residual,
    fuse_swiglu,
    merge_equal,
    pack_qkv,
    spell_indexing,
)
from exporters.program import capture
from runtimes.bundle import TensorSpec

ATEN = torch.ops.aten
HEADS, KV_HEADS, WIDTH, CAPACITY = 4, 2, 8, 12
ROWS = (HEADS + 2 * KV_HEADS) * WIDTH
Q, K = HEADS * WIDTH, (HEADS + KV_HEADS) * WIDTH


class Function(nn.Module):
    """A function of tensors as a module, with named weights."""

    def __init__(self, function: Callable[..., Any], **weights: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, weight in weights.items():
            self.register_buffer(name, weight)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, **dict(self.named_buffers()))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def edited(
    edits: Sequence[passes.GraphPass], function: Callable[..., Any], *inputs: Tensor, **weights: Tensor
) -> Counter[Any]:
    """How often each operator stands in the graph after ``edits``; the function must be the same.

    Axis 1 of the first input, and of all that are shaped like it, is dynamic.
    """
    module = Function(function, **weights)
    names = tuple(f"x{i}" for i in range(len(inputs)))
    dynamic = {name: {1: "S"} for name, x in zip(names, inputs, strict=True) if x.shape == inputs[0].shape}
    program = capture("lm", module, inputs, dynamic, (TensorSpec("y", "float32", ()),), names)
    expected = _flat(program.exported.module()(*inputs))
    passes.apply(program, edits)
    for got, wanted in zip(_flat(program.exported.module()(*inputs)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6, equal_nan=True)
    return Counter(node.target for node in program.exported.graph.nodes if node.op == "call_function")


def _flat(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


# --- merge_equal ----------------------------------------------------------------------------------------------------


def test_merge_equal_leaves_one_call_of_equal_ones() -> None:
    def halves(x, w):
        return torch.relu(nn.functional.linear(x, w)[..., :4]) + nn.functional.linear(x, w)[..., 4:]

    assert edited([merge_equal], halves, random(1, 3, 5), w=random(8, 5))[ATEN.linear.default] == 1


def test_merge_equal_keeps_calls_on_other_weights() -> None:
    def two(x, v, w):
        return nn.functional.linear(x, v) + nn.functional.linear(x, w)

    assert edited([merge_equal], two, random(1, 3, 5), v=random(8, 5), w=random(8, 5))[ATEN.linear.default] == 2


# --- spell_indexing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [-2, 0, 3])
def test_spell_indexing_makes_a_slice_of_one_number(at: int) -> None:
    found = edited([spell_indexing], lambda x: x[:, :, [at]], random(1, 3, 6, 4))
    assert ATEN.slice.Tensor in found and ATEN.index.Tensor not in found


def test_spell_indexing_looks_a_table_up() -> None:
    found = edited([spell_indexing], lambda ids, table: table[ids], torch.tensor([[2, 0, 4]]), table=random(5, 3))
    assert ATEN.embedding.default in found and ATEN.index.Tensor not in found


def test_spell_indexing_keeps_several_numbers_and_masks() -> None:
    def several(x, mask):
        return x[:, :, [0, 2]].sum() + x[0, 0][mask].sum()

    assert edited([spell_indexing], several, random(1, 3, 4), mask=torch.tensor([True, False, True, False]))[
        ATEN.index.Tensor
    ]


# --- fold_rope ------------------------------------------------------------------------------------------------------


def turn_half(x: Tensor) -> Tensor:
    return torch.cat([-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]], -1)


def turn_other_half(x: Tensor) -> Tensor:
    return torch.cat([x[..., WIDTH // 2 :], -x[..., : WIDTH // 2]], -1)


def attend(rows, past_key, past_value, last, cos, sin, key_cos=None, turn=turn_half, turn_key=True, shift=0):
    """Attention as transformers' modules write it: heads first, both halves of cos and sin, rotated outside the op."""
    steps = rows.shape[1]
    positions = (last - (steps - 1 - shift) + torch.arange(steps, dtype=torch.int32))[None]
    q, k, v = rows[..., :Q], rows[..., Q:K], rows[..., K:]
    q, k = (t.view(1, steps, -1, WIDTH).transpose(1, 2) for t in (q, k))

    def rotate(x, table):
        c, s = (t.unsqueeze(1) for t in ops.rope_angles(table, sin, positions))
        return x * c + turn(x) * s

    q = rotate(q, cos)
    if turn_key:
        k = rotate(k, cos if key_cos is None else key_cos)
    q, k = (t.transpose(1, 2).flatten(2) for t in (q, k))
    return ops.kv_attention(q, k, v, past_key, past_value, last, None, None, HEADS, KV_HEADS, 0.3, 0, 0.0)


def attention_inputs(rows: int = ROWS) -> tuple[Tensor, ...]:
    cache = (1, KV_HEADS, CAPACITY, WIDTH)
    return random(1, 3, rows), random(*cache), random(*cache), torch.tensor([4], dtype=torch.int32)


def folded(**options: Any) -> Counter[Any]:
    """The graph of ``attend`` after the passes up to fold_rope."""
    weights = {"cos": random(CAPACITY, WIDTH // 2), "sin": random(CAPACITY, WIDTH // 2)}
    weights |= {name: value for name, value in options.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in options.items() if not isinstance(value, Tensor)}

    return edited(
        [merge_equal, fold_rope], lambda *inputs, **w: attend(*inputs, **w, **others), *attention_inputs(), **weights
    )


def test_fold_rope_moves_the_rotation_into_attention() -> None:
    counts = folded()
    assert counts[ops.rope_angles.overload] == counts[ATEN.cat.default] == counts[ATEN.neg.default] == 0
    assert counts[ops.kv_attention.overload] == 1


@pytest.mark.parametrize(
    "options",
    [
        dict(key_cos=2 * random(CAPACITY, WIDTH // 2)),
        dict(turn_key=False),
        dict(turn=turn_other_half),
        dict(shift=1),
    ],
    ids=["two tables", "the query alone", "the other direction", "other positions"],
)
def test_fold_rope_keeps_other_rotations(options: dict[str, Any]) -> None:
    assert folded(**options)[ops.rope_angles.overload] > 0


def test_fold_rope_keeps_a_rotation_in_front_of_one() -> None:
    """The op rotates already: what stands before it is another rotation."""

    def twice(rows, past_key, past_value, last, cos, sin):
        positions = (last - (rows.shape[1] - 1) + torch.arange(rows.shape[1], dtype=torch.int32))[None]
        c, s = (t.unsqueeze(1) for t in ops.rope_angles(cos, sin, positions))
        q, k = (
            (x * c + turn_half(x) * s).transpose(1, 2).flatten(2)
            for x in (
                t.view(1, -1, t.shape[2] // WIDTH, WIDTH).transpose(1, 2) for t in (rows[..., :Q], rows[..., Q:K])
            )
        )
        return ops.kv_attention(q, k, rows[..., K:], past_key, past_value, last, cos, sin, HEADS, KV_HEADS, 0.3, 0, 0.0)

    tables = {"cos": random(CAPACITY, WIDTH // 2), "sin": random(CAPACITY, WIDTH // 2)}
    assert edited([fold_rope], twice, *attention_inputs(), **tables)[ops.rope_angles.overload] == 1


# --- drop_identities ------------------------------------------------------------------------------------------------


def test_drop_identities_leaves_what_does_something() -> None:
    def all_of_a_head(x):
        return torch.cat([torch.relu(x[..., :Q]), x[..., Q:]], -1)

    assert edited([drop_identities], all_of_a_head, random(1, 3, Q)) == {ATEN.relu.default: 1}


def test_drop_identities_keeps_parts_and_steps() -> None:
    def parts(x):
        return torch.cat([torch.relu(x[..., : Q // 2]), x[..., Q // 2 :]], -1) + x[..., ::2].repeat(1, 1, 2)

    counts = edited([drop_identities], parts, random(1, 3, Q))
    assert counts[ATEN.slice.Tensor] == 3 and counts[ATEN.cat.default] == 1


# --- cancel_layout --------------------------------------------------------------------------------------------------


def test_cancel_layout_leaves_nothing_of_what_undoes_itself() -> None:
    def there_and_back(x):
        heads = x.view(1, x.shape[1], HEADS, WIDTH).transpose(1, 2)
        return torch.relu(heads.transpose(1, 2).contiguous().reshape(1, x.shape[1], Q))

    counts = edited([cancel_layout], there_and_back, random(1, 3, Q))
    assert counts[ATEN.relu.default] == 1
    assert not {ATEN.transpose.int, ATEN.view.default, ATEN.reshape.default, ATEN.clone.default} & set(counts)


def test_cancel_layout_keeps_what_does_not() -> None:
    def another_place(x):
        return x.view(1, x.shape[1], HEADS, WIDTH).transpose(1, 2).transpose(2, 3)

    counts = edited([cancel_layout], another_place, random(1, 3, Q))
    assert counts[ATEN.transpose.int] == 2 and counts[ATEN.view.default] == 1


# --- pack_qkv -------------------------------------------------------------------------------------------------------


def sliced(spans, columns=ROWS, keys=None):
    """Attention over three column ranges of one tensor (the key optionally from another)."""

    def function(rows, past_key, past_value, last):
        source = rows * 1
        parts = [source[..., start:stop] for start, stop in spans]
        if keys is not None:
            parts[1] = (rows * keys)[..., spans[1][0] : spans[1][1]]
        return ops.kv_attention(*parts, past_key, past_value, last, None, None, HEADS, KV_HEADS, 0.3, 0, 0.0)

    return edited([pack_qkv], function, *attention_inputs(columns))[ATEN.slice.Tensor]


def test_pack_qkv_reads_the_projection_itself() -> None:
    assert sliced([(0, Q), (Q, K), (K, ROWS)]) == 0


@pytest.mark.parametrize(
    ("spans", "options"),
    [
        ([(8, Q + 8), (Q + 8, K + 8), (K + 8, ROWS + 8)], dict(columns=ROWS + 8)),
        ([(0, Q), (Q, K), (K, ROWS)], dict(columns=ROWS + 8)),
        ([(0, Q), (K, ROWS), (Q, K)], {}),
        ([(0, Q), (Q, K), (Q, K)], {}),
        ([(0, Q), (Q, K), (K, ROWS)], dict(keys=2.0)),
    ],
    ids=["not from the first column", "not to the last", "value before key", "overlapping", "two sources"],
)
def test_pack_qkv_keeps_other_slices(spans: list[tuple[int, int]], options: dict[str, Any]) -> None:
    assert sliced(spans, **options) > 0


# --- fuse_residual --------------------------------------------------------------------------------------------------


def summed(add: Callable[[Tensor, Tensor], Tensor], *shape: int) -> Counter[Any]:
    def function(x, residual, weight):
        total = add(x, residual)
        return ops.rms_norm(total, weight, 1e-5), total * 2

    return edited([fuse_residual], function, random(1, 3, 6), random(*shape), weight=random(6))


def test_fuse_residual_joins_sum_and_norm() -> None:
    counts = summed(lambda x, residual: x + residual, 1, 3, 6)
    assert counts[ops.add_rms_norm.overload] == 1
    assert counts[ops.rms_norm.overload] == counts[ATEN.add.Tensor] == 0


@pytest.mark.parametrize(
    ("add", "shape"),
    [
        (lambda x, residual: torch.add(x, residual, alpha=2), (1, 3, 6)),
        (lambda x, residual: x + residual, (6,)),
        (lambda x, residual: x * residual, (1, 3, 6)),
        (lambda x, residual: x + 1.5, (1, 3, 6)),
    ],
    ids=["alpha", "broadcast", "product", "a number"],
)
def test_fuse_residual_keeps_other_sums(add: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
    counts = summed(add, *shape)
    assert counts[ops.rms_norm.overload] == 1 and counts[ops.add_rms_norm.overload] == 0


def test_fuse_residual_where_two_norms_read_one_sum() -> None:
    def function(x, residual, v, w):
        total = x + residual
        return ops.rms_norm(total, v, 1e-5), ops.rms_norm(total, w, 1e-5)

    counts = edited([fuse_residual], function, random(1, 3, 6), random(1, 3, 6), v=random(6), w=2 * random(6))
    assert counts[ops.add_rms_norm.overload] == counts[ops.rms_norm.overload] == 1


# --- fuse_swiglu ----------------------------------------------------------------------------------------------------


def test_fuse_swiglu_joins_the_halves() -> None:
    counts = edited([fuse_swiglu], lambda y: nn.functional.silu(y[..., :4]) * y[..., 4:], random(1, 3, 8))
    assert counts == {ops.swiglu.overload: 1}


@pytest.mark.parametrize(
    "gated",
    [
        lambda y: nn.functional.silu(y[..., 4:]) * y[..., :4],
        lambda y: nn.functional.silu(y[..., :4]) * y[..., :4],
        lambda y: nn.functional.silu(y[..., :4]) * (2 * y)[..., 4:],
        lambda y: nn.functional.silu(y[..., 0:8:2]) * y[..., 1:8:2],
        lambda y: nn.functional.gelu(y[..., :4]) * y[..., 4:],
        lambda y: nn.functional.silu(y[..., :4]) * 2.0,
    ],
    ids=["swapped", "one half twice", "two sources", "interleaved", "another activation", "a number"],
)
def test_fuse_swiglu_keeps_other_products(gated: Callable[[Tensor], Tensor]) -> None:
    assert ops.swiglu.overload not in edited([fuse_swiglu], gated, random(1, 3, 8))


# --- fuse_projection ------------------------------------------------------------------------------------------------

WIDE = 64


def quantised(name: str, rows: int, columns: int = WIDE) -> dict[str, Tensor]:
    """Random codes, scales and zero points of a matrix with 4 bits and blocks of 32."""
    generator = torch.Generator().manual_seed(rows + columns)
    blocks = -(-columns // 32)
    return {
        f"{name}_codes": torch.randint(0, 256, (rows, blocks, 16), dtype=torch.uint8, generator=generator),
        f"{name}_scales": torch.rand((rows, blocks), generator=generator) / 16,
        f"{name}_zeros": torch.randint(0, 256, (rows, -(-blocks // 2)), dtype=torch.uint8, generator=generator),
    }


def multiply(x: Tensor, weights: dict[str, Tensor], name: str, bias: Tensor | None = None) -> Tensor:
    parts = (weights[f"{name}_{part}"] for part in ("codes", "scales", "zeros"))
    return ops.quantized_linear(x, *parts, bias, 4, WIDE)


def projections(function: Callable[..., Any], *inputs: Tensor, **weights: Tensor) -> Counter[Any]:
    """What stands around the projections of a function: which of norm, residual and gate each has, and all else."""
    found: Counter[Any] = Counter()

    def look(graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if node.op == "call_function" and node.target is ops.projection.overload:
                around = {"norm": node.args[1] is not None, "residual": node.args[6] is not None, "gate": node.args[-1]}
                found[tuple(name for name, there in around.items() if there)] += 1

    counts = edited([fuse_projection, look], function, *inputs, **weights)
    del counts[ops.projection.overload]
    return found + counts


def test_fuse_projection_takes_norm_gate_and_residual() -> None:
    """Half a layer: both projections of a gated MLP, and the sum in front of the next norm."""

    def layer(x, residual, norm, **w):
        normed, total = ops.add_rms_norm(multiply(x, w, "o"), residual, norm, 1e-5)
        down = multiply(ops.swiglu(multiply(normed, w, "up")), w, "down")
        return ops.add_rms_norm(total, down, norm, 1e-5)

    weights = quantised("o", WIDE) | quantised("up", 2 * WIDE) | quantised("down", WIDE)
    counts = projections(layer, random(1, 3, WIDE), random(1, 3, WIDE), norm=random(WIDE), **weights)
    assert counts == {("residual",): 2, ("norm", "gate"): 1, ops.rms_norm.overload: 1}


def test_fuse_projection_moves_a_slice_of_rows_in_front_of_the_norm() -> None:
    def head(x, norm, **w):
        return multiply(ops.rms_norm(x, norm, 1e-5)[:, -1:], w, "head")

    counts = projections(head, random(1, 3, WIDE), norm=random(WIDE), **quantised("head", 7))
    assert counts == {("norm",): 1, ATEN.slice.Tensor: 1}


def test_fuse_projection_gives_one_norm_to_all_that_read_it() -> None:
    def two(x, norm, **w):
        normed = ops.rms_norm(x, norm, 1e-5)
        return multiply(normed, w, "v"), multiply(normed, w, "w")

    counts = projections(two, random(1, 3, WIDE), norm=random(WIDE), **quantised("v", 5), **quantised("w", 6))
    assert counts == {("norm",): 2}


def test_fuse_projection_keeps_a_bias() -> None:
    def biased(x, norm, bias, **w):
        return multiply(ops.rms_norm(x, norm, 1e-5), w, "w", bias)

    counts = projections(biased, random(1, 3, WIDE), norm=random(WIDE), bias=random(6), **quantised("w", 6))
    assert counts == {("norm",): 1}


def norm_read_twice(x, norm, **w):
    normed = ops.rms_norm(x, norm, 1e-5)
    return multiply(normed, w, "w") + normed


def norm_of_columns(x, norm, **w):
    return multiply(torch.cat([ops.rms_norm(x, norm, 1e-5)[..., 2:], x[..., :2]], -1), w, "w")


def gate_read_twice(x, norm, **w):
    joined = multiply(x, w, "w")
    return ops.swiglu(joined), joined


def sum_read_twice(x, norm, **w):
    y = multiply(x, w, "w")
    return *ops.add_rms_norm(x, y, norm, 1e-5), y


def gated_sum(x, norm, **w):
    """The gate behind a sum is not the product's own."""
    _, total = ops.add_rms_norm(x, multiply(x, w, "w"), norm, 1e-5)
    return ops.swiglu(total)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (norm_read_twice, {(): 1, ops.rms_norm.overload: 1, ATEN.add.Tensor: 1}),
        (norm_of_columns, {(): 1, ops.rms_norm.overload: 1, ATEN.slice.Tensor: 2, ATEN.cat.default: 1}),
        (gate_read_twice, {(): 1, ops.swiglu.overload: 1}),
        (sum_read_twice, {(): 1, ops.rms_norm.overload: 1, ATEN.add.Tensor: 1}),
        (gated_sum, {("residual",): 1, ops.swiglu.overload: 1}),
    ],
    ids=["a norm that others read", "columns of a norm", "a gate's input that others read", "a term that others read",
         "a gate behind a sum"],
)  # fmt: skip
def test_fuse_projection_keeps_what_others_need(function: Callable[..., Any], expected: dict[Any, int]) -> None:
    counts = projections(function, random(1, 3, WIDE), norm=random(WIDE), **quantised("w", WIDE))
    assert counts == expected


# --- fuse_epilogues -------------------------------------------------------------------------------------------------

CHANNELS = 6


def epilogues(function: Callable[..., Any], *shape: int, **weights: Tensor) -> Counter[Any]:
    """How often each operator stands in the graph of a decoder's function afterwards; the function must be the same."""
    x = random(*shape)
    program = capture(
        "image_decoder", Function(function, **weights), (x,), {}, (TensorSpec("y", "float32", ()),), ("x",)
    )
    expected = _flat(program.exported.module()(x))
    passes.apply(program, [fuse_epilogues])
    for got, wanted in zip(_flat(program.exported.module()(x)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-6)
    return Counter(node.target for node in program.exported.graph.nodes if node.op == "call_function")


def normed(x, weight=None, bias=None):
    return nn.functional.group_norm(x, 2, weight, bias, 1e-5)


def test_fuse_epilogues_joins_norm_and_silu() -> None:
    counts = epilogues(
        lambda x, w, b: nn.functional.silu(normed(x, w, b)), 2, CHANNELS, 3, 4, w=random(CHANNELS), b=random(CHANNELS)
    )
    assert counts == {ops.group_norm_silu.overload: 1}


@pytest.mark.parametrize("form", [nn.functional.conv1d, nn.functional.conv_transpose1d], ids=["conv", "transposed"])
def test_fuse_epilogues_moves_the_bias_into_snake(form: Callable[..., Tensor]) -> None:
    weights = {"w": random(CHANNELS, CHANNELS, 3), "b": random(CHANNELS)}
    counts = epilogues(lambda x, w, b: ops.snake(form(x, w, b)), 2, CHANNELS, 9, **weights)
    assert counts[ops.bias_snake.overload] == 1 and ops.snake.overload not in counts


def test_fuse_epilogues_moves_the_bias_of_a_picture() -> None:
    weights = {"w": random(CHANNELS, CHANNELS, 3, 3), "b": random(CHANNELS)}
    counts = epilogues(lambda x, w, b: ops.snake(nn.functional.conv2d(x, w, b)), 1, CHANNELS, 5, 5, **weights)
    assert counts == {ATEN.conv2d.default: 1, ops.bias_snake.overload: 1}


def norm_and_more(x, w, b):
    y = normed(x, w, b)
    return nn.functional.silu(y) + y


def conv_and_more(x, c, b):
    y = nn.functional.conv1d(x, c, b)
    return ops.snake(y) + y


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda x, **w: nn.functional.silu(normed(x)), ATEN.group_norm.default),
        (lambda x, **w: norm_and_more(x, w["w"], w["b"]), ATEN.group_norm.default),
        (lambda x, **w: torch.relu(normed(x, w["w"], w["b"])), ATEN.group_norm.default),
        (lambda x, **w: ops.snake(nn.functional.conv1d(x, w["c"])), ops.snake.overload),
        (lambda x, **w: conv_and_more(x, w["c"], w["b"]), ops.snake.overload),
        (lambda x, **w: ops.snake(torch.relu(nn.functional.conv1d(x, w["c"], w["b"]))), ops.snake.overload),
    ],
    ids=["a norm without weights", "a norm that others read", "another activation", "no bias",
         "a convolution that others read", "something in between"],
)  # fmt: skip
def test_fuse_epilogues_keeps_what_others_need(function: Callable[..., Any], kept: Any) -> None:
    weights = {"w": random(CHANNELS), "b": random(CHANNELS), "c": random(CHANNELS, CHANNELS, 3)}
    counts = epilogues(function, 2, CHANNELS, 9, **weights)
    assert counts[kept] == 1
    assert not {ops.group_norm_silu.overload, ops.bias_snake.overload} & set(counts)
