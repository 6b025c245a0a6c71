"""The file of weights that all functions of a component share: safetensors, with every tensor on a cache line.

safetensors has no padding between tensors, so the header is padded and tensors whose size is a multiple of the line
come first; the few others follow and are copied at load.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from exporters.tvm_import import Parameter

ALIGNMENT = 64
_TYPES = {"float32": "F32", "float16": "F16", "uint32": "U32", "int32": "I32", "int64": "I64", "uint8": "U8",
          "int8": "I8", "bool": "BOOL"}  # fmt: skip


def write_parameters(
    path: Path, parameters: Mapping[str, Parameter], progress: Callable[[int], None] = lambda size: None
) -> None:
    """Streams the weights to a new file, one at a time."""
    sizes = {name: int(np.prod(p.shape, dtype=np.int64)) * np.dtype(p.dtype).itemsize for name, p in parameters.items()}
    order = sorted(parameters, key=lambda name: (sizes[name] % ALIGNMENT > 0, name))
    header, offset = {}, 0
    for name in order:
        parameter = parameters[name]
        span = [offset, offset + sizes[name]]
        header[name] = {"dtype": _TYPES[parameter.dtype], "shape": list(parameter.shape), "data_offsets": span}
        offset += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            parameter = parameters[name]
            values = np.ascontiguousarray(parameter.load())
            if values.shape != parameter.shape or values.dtype != parameter.dtype:
                raise AssertionError(f"{name}: {values.dtype} {values.shape}, not {parameter.dtype} {parameter.shape}")
            file.write(values.tobytes())
            progress(values.nbytes)
