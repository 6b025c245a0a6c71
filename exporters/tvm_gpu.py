"""Code for GPUs: TVM's own kernels with its default schedules, generated here and pending the device.

There are no C++ kernels there. Every fused op is its reference in TVM's words; the cache comes out as a new tensor.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import tvm
from torch import Tensor, fx
from tvm import relax

from exporters import ops
from exporters.errors import ExportError
from exporters.ops.kv_attention import query_positions, rotate, split_packed, visible
from exporters.tvm_compile import KERNELS, Request, compile_apart

if TYPE_CHECKING:
    from device_profiles.schema import Profile
    from exporters.program import Program
    from exporters.tvm_import import Emitter

ATEN = torch.ops.aten
#: What a score that may not be seen is lowered by; infinity would make NaN of an empty row.
_UNSEEN = -1e30


def _kv_attention(
    query: Tensor, key: Tensor | None, value: Tensor | None, past_key: Tensor, past_value: Tensor, last: Tensor,
    cos: Tensor | None, sin: Tensor | None, heads: int, kv_heads: int, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The reference without scatter, which TVM does not import: each slot takes its new row or keeps the old one."""
    query, key, value = split_packed(query, key, value, heads, kv_heads)
    batch, steps = query.shape[:2]
    capacity, width = past_key.shape[2:]
    positions = query_positions(last, steps)
    query = query.reshape(batch, steps, heads, width)
    key, value = (t.reshape(batch, steps, kv_heads, width) for t in (key, value))
    if cos is not None:
        query, key = (rotate(t, cos[positions], sin[positions]) for t in (query, key))
    row = torch.arange(capacity, dtype=torch.int32) - (last - (steps - 1))
    is_new = ((row >= 0) & (row < steps))[None, None, :, None]
    at = row.clamp(0, steps - 1)
    keys = torch.where(is_new, key.transpose(1, 2)[:, :, at], past_key)
    values = torch.where(is_new, value.transpose(1, 2)[:, :, at], past_value)
    mask = visible(positions, capacity, window)
    seen, zero = mask.any(2).unsqueeze(-1), torch.zeros((), dtype=keys.dtype)
    groups = heads // kv_heads
    grouped = query.transpose(1, 2).reshape(batch, kv_heads, groups * steps, width)
    scores = (grouped @ torch.where(seen, keys, zero).transpose(2, 3) * scale).reshape(batch, heads, steps, capacity)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    weights = F.softmax(scores + torch.where(mask, 0.0, _UNSEEN), -1).reshape(batch, kv_heads, -1, capacity)
    out = (weights @ torch.where(seen, values, zero)).reshape(batch, heads, steps, width)
    return out.transpose(1, 2).reshape(batch, steps, heads * width), keys, values


def _cdist(a: Tensor, b: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """Euclidean distances of rows as one product: PyTorch's own form joins tensors, which TVM cannot tile."""
    squared = (a * a).sum(-1, keepdim=True) - 2 * (a @ b.t()) + (b * b).sum(-1)
    return squared.clamp_min(0).sqrt()


#: Ops whose references look codes up in a table, by types and indices that TVM does not import.
_TABLES = (ops.table_linear.overload, ops.table_embedding.overload)


def references() -> dict[Any, Callable]:
    """Operator -> decomposition."""
    table: dict[Any, Callable] = {op.overload: op.reference for op in ops.REGISTRY.values()}
    return table | {ops.kv_attention.overload: _kv_attention, ATEN.cdist.default: _cdist}


def _shift(emit: Emitter, node: fx.Node) -> Any:
    by = relax.const(node.args[1], "uint8")
    return emit.importer.block_builder.emit(relax.op.right_shift(emit.value(node.args[0]), by))


def _max(emit: Emitter, node: fx.Node) -> Any:
    keep = len(node.args) > 2 and bool(node.args[2])
    return emit.largest(emit.value(node.args[0]), node.args[1], keep)


def _extreme(emit: Emitter, node: fx.Node) -> Any:
    return emit.extreme(node)


def lowerings() -> Mapping[Any, Callable]:
    """What TVM's importer does not know, or would sort for."""
    return {
        getattr(ATEN, "__rshift__").Scalar: _shift,  # noqa: B009
        ATEN.max.dim: _max,
        ATEN.amax.default: _extreme,
        ATEN.amin.default: _extreme,
    }


#: (architecture, operating system) of a device -> LLVM's triple for the code that drives its GPU
HOSTS: Mapping[tuple[str, str], str] = {
    ("x86_64", "linux"): "x86_64-linux-gnu",
    ("aarch64", "linux"): "aarch64-linux-gnu",
    ("aarch64", "android"): "aarch64-linux-android",
    ("aarch64", "macos"): "arm64-apple-macos",
    ("wasm32", "browser"): "wasm32-unknown-unknown-wasm",
}


def refusals(program: Program, profile: Profile) -> list[str]:
    """Why a program has no code for the profile's GPU, each naming the node."""
    kind = json.loads(profile.tvm_target or "{}").get("kind")
    reasons = []
    if kind not in KERNELS or (profile.arch, profile.os) not in HOSTS:
        reasons.append(f"profile {profile.name}: no code generation for {kind} on {profile.arch} {profile.os}")
    if kind == "webgpu" and program.states:
        reasons.append(f"{program.entry}: WebGPU has no 64-bit integers, in which TVM indexes the KV cache")
    for node in program.exported.graph.nodes:
        if node.target in _TABLES:
            reasons.append(
                f"{program.entry}: node {node.name}: codes of {node.args[-2]} have no form in TVM's code for GPUs"
            )
        if node.target is ATEN.argmin.default:
            reasons.append(
                f"{program.entry}: TVM's default GPU schedules do not compile what leads to node {node.name}"
                " (aten.argmin); choose another backend for it"
            )
    return reasons


def compile_objects(functions: Mapping[str, relax.Function], profile: Profile, path: Path) -> dict[str, int]:
    """Writes a tar of object files for the device's own linker; kernel -> 1.

    Raises:
        ExportError: TVM does not compile it, or the generated code holds no kernel.
    """
    module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})
    described = json.loads(profile.tvm_target or "{}")
    host = {"kind": "llvm", "mtriple": HOSTS[profile.arch, profile.os]}
    with tempfile.TemporaryDirectory(prefix="tvm-") as scratch:
        saved = Path(scratch) / "module.json"
        saved.write_text(tvm.ir.save_json(module))
        found = compile_apart(Request(str(saved), described, host, str(path.absolute())))
    if not found:
        raise ExportError(
            f"no kernel in the code for {described['kind']}", where=str(path.name), way_out="Choose another backend."
        )
    return dict(sorted(Counter(found).items()))
