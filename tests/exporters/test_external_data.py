"""Weights are written once, whatever number of models and forms they stand in, and never copied in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporters.external_data import ALIGNMENT, SOURCE, WeightFile

VALUES = {
    "float": np.linspace(0, 1, 300, dtype=np.float32),
    "turned": np.arange(600, dtype=np.float32).reshape(20, 30).T,
    "half": np.linspace(-1, 1, 400).astype(np.float16),
}


def model_of(**tensors: ir.TensorProtocol) -> ir.Model:
    values = [
        ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        for name, tensor in tensors.items()
    ]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 23})
    return ir.Model(graph, ir_version=10)


def adopted(path: Path, *models: ir.Model) -> list[int]:
    sizes: list[int] = []
    with WeightFile(path, sizes.append) as file:
        for model in models:
            file.adopt(model)
    return sizes


def test_values_come_back_and_equal_ones_share_their_place(tmp_path: Path) -> None:
    tensors = {name: ir.Tensor(values, name=name) for name, values in VALUES.items()}
    packed = np.arange(256, dtype=np.uint8)
    tensors["codes"] = ir.PackedTensor(packed, ir.DataType.UINT4, shape=ir.Shape([512]), name="codes")
    again = {f"{name}.again": ir.Tensor(values.copy(), name=name) for name, values in VALUES.items()}
    model, second = model_of(**tensors), model_of(**again)
    sizes = adopted(tmp_path / "weights", model, second)
    assert sizes == [*(values.nbytes for values in VALUES.values()), 256]
    for name, values in VALUES.items():
        for held in (model.graph.initializers[name], second.graph.initializers[f"{name}.again"]):
            assert held.const_value.offset % ALIGNMENT == 0
            np.testing.assert_array_equal(held.const_value.numpy(), values)
    assert model.graph.initializers["codes"].const_value.tobytes() == packed.tobytes()


def test_a_source_is_loaded_once(tmp_path: Path) -> None:
    loads: list[str] = []

    def lazy(name: str, source: object) -> ir.LazyTensor:
        def load() -> ir.Tensor:
            loads.append(name)
            return ir.Tensor(VALUES["float"], name=name)

        tensor = ir.LazyTensor(load, dtype=ir.DataType.FLOAT, shape=ir.Shape([300]), name=name)
        if source is not None:
            tensor.meta[SOURCE] = source
        return tensor

    one, other = object(), object()
    models = [model_of(a=lazy("a", one)), model_of(b=lazy("b", one)), model_of(c=lazy("c", other), d=lazy("d", None))]
    assert adopted(tmp_path / "weights", *models) == [1200]
    assert loads == ["a", "c", "d"]  # "c" and "d" were read to find out that they are the same
    offsets = {value.const_value.offset for model in models for value in model.graph.initializers.values()}
    assert offsets == {0}


def test_what_stands_in_an_earlier_file_is_read_from_there(tmp_path: Path) -> None:
    first = model_of(a=ir.Tensor(VALUES["float"], name="a"))
    second = model_of(b=ir.Tensor(VALUES["float"], name="b"), c=ir.Tensor(-VALUES["float"], name="c"))
    with WeightFile(tmp_path / "one") as one:
        one.adopt(first)
    with WeightFile(tmp_path / "two", earlier=one) as two:
        two.adopt(second)
    b, c = (second.graph.initializers[name].const_value for name in "bc")
    assert (b.location, c.location) == ("one", "two")
    np.testing.assert_array_equal(b.numpy(), VALUES["float"])
    np.testing.assert_array_equal(c.numpy(), -VALUES["float"])


def test_a_file_of_nothing_is_not_left_behind(tmp_path: Path) -> None:
    model = model_of(a=ir.Tensor(VALUES["float"], name="a"))
    with WeightFile(tmp_path / "one") as one:
        one.adopt(model)
    with WeightFile(tmp_path / "two", earlier=one) as two:
        two.adopt(model_of(b=ir.Tensor(VALUES["float"], name="b")))
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "weights").touch()
    with pytest.raises(FileExistsError), WeightFile(tmp_path / "weights"):
        pass
