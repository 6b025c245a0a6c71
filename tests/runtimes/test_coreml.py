"""The interpreter of saved packages: sessions against PyTorch, rounding, overflow by name, and each operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from exporters.families.decoder_lm import build_reference
from runtimes.coreml_format import Name, Operation, Program
from runtimes.coreml_interpreter import Float16Overflow, Function, OperatorFailed, UnknownOperator
from runtimes.coreml_ops import OPS
from runtimes.session import KvOverflow, open_session
from tests.conftest import MakeStudent
from tests.coreml_maker import CAPACITY, Exported, exported


@pytest.fixture(scope="module")
def int4(make_tiny_student: MakeStudent) -> Exported:
    return exported(make_tiny_student())


@pytest.mark.parametrize(("mode", "tolerance"), [("exact", 1e-5), ("fp16", 1e-2)])
def test_chunks_of_any_length_equal_the_whole_sequence(int4: Exported, mode: str, tolerance: float) -> None:
    vocabulary = int4.student.config["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, CAPACITY)).astype(np.int32)
    with torch.no_grad():
        expected = build_reference(int4.student)(torch.from_numpy(ids).long()).logits[0].numpy()
    with open_session(int4.bundle, int4.artifacts["lm", mode]) as session:
        for split in ((7, 1, 1, 16, 2, 13), (1, 39), (3, 37)):
            session.reset()
            for size in split:
                logits = session.run({"ids": ids[:, session.position : session.position + size]})["logits"]
                wanted = expected[session.position - 1]
                assert np.abs(logits[0] - wanted).max() <= tolerance * np.abs(wanted).max()
        with pytest.raises(KvOverflow):
            session.run({"ids": ids[:, :1]})


def test_what_a_session_says_of_itself(int4: Exported) -> None:
    with open_session(int4.bundle, int4.artifacts["lm", "fp16"]) as session:
        assert session.stand_in is not None and "interpreter of the saved package" in session.stand_in
        assert "float16" in session.effective["precision"]
        assert session.lengths == (1, 4, 16)
    with open_session(int4.bundle, int4.artifacts["lm", "exact"]) as session:
        assert session.effective == {"precision": "float32"}
        assert session.lengths == (1, 4, 16)
    with open_session(int4.bundle, int4.artifacts["image_decoder", "fp16"]) as session:
        assert session.lengths == ()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_decoder_of_flexible_and_of_fixed_size_agree(int4: Exported, batch: int) -> None:
    modality = int4.student.modalities["image"]
    codes = np.random.default_rng(batch).integers(0, modality.codebook_size, (batch, *modality.grid)).astype(np.int32)
    images = {}
    for mode in ("exact", "fp16"):
        with open_session(int4.bundle, int4.artifacts["image_decoder", mode]) as session:
            images[mode] = session.run({"codes": codes})["image"]
    assert images["exact"].shape[0] == batch
    assert 0 < np.abs(images["fp16"] - images["exact"]).max() < 0.02 * np.abs(images["exact"]).max()


# --- the interpreter alone ----------------------------------------------------------------------------------------


def function(*operations: Operation, dtype: str = "float32", strict: bool = True) -> Function:
    last = operations[-1].outputs[0][0]
    return Function(Program("main", {"x": dtype}, {}, (last,), operations), {}, strict=strict)


def test_results_are_rounded_to_the_type_that_the_program_declares() -> None:
    x = np.array([1 / 3, 1e-9, 2049.0], np.float32)
    for dtype, expected in (("float16", x.astype(np.float16).astype(np.float32)), ("float32", x)):
        half = function(Operation("identity", {"x": Name("x")}, (("y", dtype),)))
        np.testing.assert_array_equal(half.run({"x": x}, {})["y"], expected)


def test_the_operator_that_overflows_is_named() -> None:
    operations = (
        Operation("mul", {"x": Name("x"), "y": Name("x")}, (("node_norm__square", "float16"),)),
        Operation("reduce_mean", {"x": Name("node_norm__square")}, (("y", "float16"),)),
    )
    x = np.array([300.0, 1.0], np.float32)
    with pytest.raises(Float16Overflow, match=r"node_norm__square.*mul overflows float16: its largest value is 9e\+04"):
        function(*operations).run({"x": x}, {})
    # Who looks at values wants to see the infinity.
    assert np.isinf(
        function(*operations, strict=False).run({"x": x}, {}, ["node_norm__square"])["node_norm__square"][0]
    )
    # An infinity that was there before is not an overflow.
    infinite = np.array([-np.inf, 1.0], np.float32)
    assert np.isinf(function(*operations).run({"x": infinite}, {})["y"]).all()


def test_an_unknown_operator_is_named() -> None:
    with pytest.raises(UnknownOperator, match=r"'lstm' \(y\)"):
        function(Operation("lstm", {"x": Name("x")}, (("y", "float32"),)))


def test_an_operator_on_the_wrong_shapes_is_named() -> None:
    bad = function(Operation("matmul", {"x": Name("x"), "y": np.ones((3, 2))}, (("y", "float32"),)))
    with pytest.raises(OperatorFailed, match=r"function main, y: matmul"):
        bad.run({"x": np.ones((2, 2), np.float32)}, {})


def tensor(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def pair(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


#: operator -> (arguments, the same by PyTorch)
CASES: dict[str, tuple[dict[str, Any], Callable[..., torch.Tensor]]] = {
    "conv": (
        dict(x=tensor(2, 4, 9, 8), weight=tensor(6, 2, 3, 3), bias=tensor(6), strides=pair(2, 1), dilations=pair(1, 2),
             pad_type="custom", pad=pair(1, 0, 2, 1), groups=np.int32(2)),
        lambda x, weight, bias, **_: F.conv2d(F.pad(x, (2, 1, 1, 0)), weight, bias, (2, 1), 0, (1, 2), 2),
    ),
    "conv_transpose": (
        dict(x=tensor(2, 4, 7), weight=tensor(4, 3, 5), bias=tensor(6), strides=pair(3), pad_type="custom",
             pad=pair(1, 1), groups=np.int32(2)),
        lambda x, weight, bias, **_: F.conv_transpose1d(x, weight, bias, 3, 1, 0, 2),
    ),
    "scaled_dot_product_attention": (
        dict(query=tensor(1, 2, 3, 8), key=tensor(1, 2, 5, 8), value=tensor(1, 2, 5, 4), attn_mask=tensor(1, 1, 3, 5)),
        lambda query, key, value, attn_mask: F.scaled_dot_product_attention(query, key, value, attn_mask),
    ),
    "layer_norm": (
        dict(x=tensor(2, 3, 7), axes=pair(2), gamma=tensor(7), beta=tensor(7), epsilon=np.float32(1e-3)),
        lambda x, axes, gamma, beta, epsilon: F.layer_norm(x, (7,), gamma, beta, 1e-3),
    ),
    "batch_norm": (
        dict(x=tensor(2, 3, 7), mean=tensor(3), variance=np.abs(tensor(3)), gamma=tensor(3), beta=tensor(3),
             epsilon=np.float32(1e-3)),
        lambda x, mean, variance, gamma, beta, epsilon: F.batch_norm(x, mean, variance, gamma, beta, eps=1e-3),
    ),
    "linear": (
        dict(x=tensor(2, 5), weight=tensor(3, 5), bias=tensor(3)),
        lambda x, weight, bias: F.linear(x, weight, bias),
    ),
    "softmax": (dict(x=tensor(2, 5), axis=np.int32(-1)), lambda x, axis: F.softmax(x, -1)),
    "silu": (dict(x=tensor(2, 5)), lambda x: F.silu(x)),
    "elu": (dict(x=tensor(2, 5), alpha=np.float32(0.7)), lambda x, alpha: F.elu(x, 0.7)),
    "upsample_nearest_neighbor": (
        dict(x=tensor(1, 2, 3, 3), scale_factor_height=np.float32(2), scale_factor_width=np.float32(3)),
        lambda x, **_: F.interpolate(x, scale_factor=(2.0, 3.0)),
    ),
    "pad": (
        dict(x=tensor(1, 2, 4), pad=pair(0, 0, 0, 0, 2, 1), mode="constant", constant_val=np.float32(3)),
        lambda x, **_: F.pad(x, (2, 1), value=3.0),
    ),
    "slice_by_index": (
        dict(x=tensor(4, 6), begin=pair(1, 0), end=pair(0, 5), stride=pair(2, 2), end_mask=np.array([True, False])),
        lambda x, **_: x[1::2, 0:5:2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operators_compute_what_pytorch_does(name: str) -> None:
    arguments, formula = CASES[name]
    tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    np.testing.assert_allclose(OPS[name](**arguments), formula(**tensors).numpy(), rtol=1e-4, atol=1e-5)


def test_compressed_constants() -> None:
    data, scale = np.arange(8, dtype=np.uint8).reshape(2, 4), np.array([[1, 2], [3, 4]], np.float32)
    offset = np.array([[1, 0], [0, 2]], np.uint8)
    expected = np.array([[-1, 0, 4, 6], [12, 15, 16, 20]], np.float32)
    np.testing.assert_array_equal(OPS["constexpr_blockwise_shift_scale"](data, scale, offset), expected)
    table = np.array([10, 20, 30, 40], np.float32).reshape(2, 1, 2, 1)
    indices = np.array([[0, 1], [1, 0]], np.uint8)
    np.testing.assert_array_equal(OPS["constexpr_lut_to_dense"](indices, table), [[10, 20], [40, 30]])
