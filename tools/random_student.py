"""Writes a checkpoint of a published shape with random weights: what sizes and speeds are measured on.

    python -m tools.random_student --shape qwen2.5-0.5b --bits 4 --group 128 OUT

OUT becomes a plain transformers checkpoint folder, as one would fetch it: config.json and model.safetensors, whose
quantised matrices are in compressed-tensors' `pack-quantized` form. Embedding and head stay in 16 bits unless asked
for otherwise, as in the published 4-bit checkpoints. One tensor at a time is in memory, and the bytes follow from the
shape, the options and the seed alone.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

#: Rows of a matrix that are drawn at once.
ROWS = 4096
#: Of the stored scales and of what is not quantised: safetensors name -> numpy dtype.
DTYPES = {"float16": ("F16", np.dtype(np.float16)), "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16))}


@dataclass(frozen=True)
class Shape:
    """The dimensions of a decoder; `biases` are those of query, key and value."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    biases: bool = True
    head_dim: int | None = None
    rope_theta: float = 1e6
    positions: int = 32768

    @property
    def width(self) -> int:
        """Of one head."""
        return self.head_dim or self.hidden // self.heads


#: name -> dimensions, as in the config.json of the published model of that name.
SHAPES: Mapping[str, Shape] = {
    "qwen2.5-0.5b": Shape("qwen2", 896, 24, 14, 2, 4864, 151_936, True),
    "qwen2.5-1.5b": Shape("qwen2", 1536, 28, 12, 2, 8960, 151_936, True),
    # The proportions of the first in a few megabytes, and in a hundred: a vocabulary that is no multiple of 128.
    "tiny": Shape("qwen2", 128, 2, 4, 2, 384, 1003, True, positions=2048),
    "small": Shape("qwen2", 768, 8, 12, 2, 3072, 40_003, True, positions=2048),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file: its dtype (safetensors' name), shape, and the bytes, piece by piece."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[np.ndarray]]


def write_student(
    folder: Path,
    shape: str | Shape,
    *,
    bits: int | None = 4,
    group: int = 128,
    symmetric: bool = False,
    dtype: str = "float16",
    tied: bool | None = None,
    quantise_embedding: int | None = None,
    seed: int = 0,
) -> Path:
    """Writes the checkpoint into a new or empty folder and returns that.

    Args:
        shape: a name in SHAPES, or dimensions.
        bits: 4 or 8 for the matrices of the layers, None for all weights in `dtype`.
        group: columns that share a scale.
        dtype: a key of DTYPES, of what is not quantised and of the scales.
        tied: whether the head is the embedding; None takes the shape's own.
        quantise_embedding: bits of embedding and head, 8 with one scale a row or 4 in groups; None keeps 16 bits.

    Raises:
        ValueError: dimensions that `group` does not divide, bits or a dtype that there are not, a folder in use.
    """
    dimensions = SHAPES[shape] if isinstance(shape, str) else shape
    tied = dimensions.tied if tied is None else tied
    if dtype not in DTYPES or not {bits, quantise_embedding} <= {None, 4, 8}:
        widths = f"bits {bits}, quantise_embedding {quantise_embedding}, dtype {dtype!r}"
        raise ValueError(f"{widths}: there are 4, 8 or None, and {', '.join(DTYPES)}")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty")
    writer = _Writer(dimensions, bits, group, symmetric, dtype, tied, quantise_embedding, seed)
    _write_safetensors(folder / "model.safetensors", dict(writer.tensors()))
    (folder / "config.json").write_text(json.dumps(writer.config(), indent=1) + "\n", encoding="utf-8")
    return folder


@dataclass(frozen=True)
class _Writer:
    shape: Shape
    bits: int | None
    group: int
    symmetric: bool
    dtype: str
    tied: bool
    quantise_embedding: int | None
    seed: int

    def config(self) -> dict[str, Any]:
        """config.json."""
        shape = self.shape
        config = {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": shape.model_type,
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "intermediate_size": shape.intermediate,
            "vocab_size": shape.vocabulary,
            "max_position_embeddings": shape.positions,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": shape.rope_theta,
            "tie_word_embeddings": self.tied,
            "use_sliding_window": False,
            "bos_token_id": shape.vocabulary - 3,
            "eos_token_id": shape.vocabulary - 1,
            "torch_dtype": self.dtype,
        }
        quantised = self.bits is not None or self.quantise_embedding is not None
        return config | {"quantization_config": self._quantization()} if quantised else config

    def _table_scheme(self) -> tuple[bool, int | None]:
        """Whether a quantised table is symmetric, and its group."""
        return (True, None) if self.quantise_embedding == 8 else (self.symmetric, self.group)

    def _quantization(self) -> dict[str, Any]:
        def weights(bits: int, symmetric: bool, group: int | None) -> dict[str, Any]:
            strategy = "channel" if group is None else "group"
            return {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": strategy,
                "group_size": group,
                "dynamic": False,
            }

        def entry(targets: list[str], bits: int, symmetric: bool, group: int | None) -> dict[str, Any]:
            return {"targets": targets, "weights": weights(bits, symmetric, group), "format": "pack-quantized"}

        groups = {}
        if self.bits is not None:
            groups["group_0"] = entry(["Linear"], self.bits, self.symmetric, self.group)
        if self.quantise_embedding is not None:
            tables = ["re:model.embed_tokens$", "re:lm_head$"]
            groups["group_1"] = entry(tables, self.quantise_embedding, *self._table_scheme())
        return {
            "quant_method": "compressed-tensors",
            "version": "0.20.0",
            "quantization_status": "compressed",
            "format": "pack-quantized",
            "config_groups": groups,
            "ignore": [] if self.quantise_embedding and not self.tied else ["lm_head"],
            "kv_cache_scheme": None,
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the file by name, none of it drawn yet."""
        shape = self.shape
        rows = {"q": shape.heads * shape.width, "k": shape.kv_heads * shape.width, "v": shape.kv_heads * shape.width}
        yield from self._table("model.embed_tokens")
        for layer in range(shape.layers):
            at = f"model.layers.{layer}"
            yield self._vector(f"{at}.input_layernorm.weight", shape.hidden, 1.0, 0.1)
            for part, count in rows.items():
                yield from self._matrix(f"{at}.self_attn.{part}_proj", count, shape.hidden)
                if shape.biases:
                    yield self._vector(f"{at}.self_attn.{part}_proj.bias", count, 0.0, 0.5)
            yield from self._matrix(f"{at}.self_attn.o_proj", shape.hidden, shape.heads * shape.width)
            yield self._vector(f"{at}.post_attention_layernorm.weight", shape.hidden, 1.0, 0.1)
            for part in ("gate", "up"):
                yield from self._matrix(f"{at}.mlp.{part}_proj", shape.intermediate, shape.hidden)
            yield from self._matrix(f"{at}.mlp.down_proj", shape.hidden, shape.intermediate)
        yield self._vector("model.norm.weight", shape.hidden, 1.0, 0.1)
        if not self.tied:
            yield from self._table("lm_head")

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def _vector(self, name: str, size: int, mean: float, deviation: float) -> tuple[str, Tensor]:
        def pieces() -> Iterator[np.ndarray]:
            values = self._generator(name).standard_normal(size, np.float32)
            yield (mean + deviation * values).astype(DTYPES[self.dtype][1])

        return name, Tensor(DTYPES[self.dtype][0], (size,), pieces)

    def _table(self, module: str) -> Iterator[tuple[str, Tensor]]:
        """Embedding or head: logits of a normed state are then about 2 wide, as sharp as a language model's are."""
        rows, columns = self.shape.vocabulary, self.shape.hidden
        deviation = 2 / math.sqrt(columns)
        if self.quantise_embedding is not None:
            symmetric, group = self._table_scheme()
            yield from self._packed(module, rows, columns, self.quantise_embedding, group, symmetric, deviation)
        else:
            yield self._plain(module, rows, columns, deviation)

    def _matrix(self, module: str, rows: int, columns: int) -> Iterator[tuple[str, Tensor]]:
        """A weight that keeps the variance of what it multiplies."""
        deviation = 1 / math.sqrt(columns)
        if self.bits is None:
            yield self._plain(module, rows, columns, deviation)
        else:
            yield from self._packed(module, rows, columns, self.bits, self.group, self.symmetric, deviation)

    def _plain(self, module: str, rows: int, columns: int, deviation: float) -> tuple[str, Tensor]:
        name = f"{module}.weight"

        def pieces() -> Iterator[np.ndarray]:
            generator = self._generator(name)
            for start in range(0, rows, ROWS):
                values = generator.standard_normal((min(ROWS, rows - start), columns), np.float32)
                yield (deviation * values).astype(DTYPES[self.dtype][1])

        return name, Tensor(DTYPES[self.dtype][0], (rows, columns), pieces)

    def _packed(
        self, module: str, rows: int, columns: int, bits: int, group: int | None, symmetric: bool, deviation: float
    ) -> Iterator[tuple[str, Tensor]]:
        """Uniform codes: of deviation 2^bits / sqrt(12), which the scale brings to ``deviation``."""
        group = group or columns
        if columns % group or columns * bits % 32:
            raise ValueError(f"{module}: groups of {group} at {bits} bits do not cut {columns} columns into words")
        tables, words, top = columns // group, columns * bits // 32, 1 << bits
        middle = deviation * math.sqrt(12) / top
        name, dtype = DTYPES[self.dtype]

        def codes() -> Iterator[np.ndarray]:
            generator = self._generator(f"{module}.weight_packed")
            for start in range(0, rows, ROWS):  # every bit pattern is a row of codes
                yield generator.integers(0, 1 << 32, (min(ROWS, rows - start), words), np.uint32)

        def scales() -> Iterator[np.ndarray]:
            values = self._generator(f"{module}.weight_scale").uniform(0.75, 1.25, (rows, tables))
            yield (middle * values).astype(dtype)

        def zero_points() -> Iterator[np.ndarray]:
            near = self._generator(f"{module}.weight_zero_point").integers(-2, 2, (rows, tables)) + top // 2
            padded = np.zeros((-(-rows * bits // 32) * 32 // bits, tables), np.uint32)
            padded[:rows] = near
            lanes = padded.reshape(-1, 32 // bits, tables) << (bits * np.arange(32 // bits, dtype=np.uint32))[:, None]
            yield np.bitwise_or.reduce(lanes, axis=1)

        yield f"{module}.weight_packed", Tensor("I32", (rows, words), codes)
        yield f"{module}.weight_scale", Tensor(name, (rows, tables), scales)
        if not symmetric:
            yield f"{module}.weight_zero_point", Tensor("I32", (-(-rows * bits // 32), tables), zero_points)
        yield f"{module}.weight_shape", Tensor("I64", (2,), lambda: iter([np.array([rows, columns], np.int64)]))


#: Bytes of an element, by safetensors' name.
_WIDTHS = {"F16": 2, "BF16": 2, "I32": 4, "I64": 8}


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """The file, header first: https://github.com/huggingface/safetensors, README "Format"."""
    # The widest first, so that every tensor lies on a multiple of its element's size.
    ordered = sorted(tensors, key=lambda name: -_WIDTHS[tensors[name].dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        tensor = tensors[name]
        begin, end = end, end + math.prod(tensor.shape) * _WIDTHS[tensor.dtype]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in ordered:
            for piece in tensors[name].pieces():
                file.write(np.ascontiguousarray(piece).data if piece.dtype.kind != "V" else piece.tobytes())
        if file.tell() != 8 + len(raw) + end:
            raise ValueError(f"{path}: {file.tell()} bytes written, the header says {8 + len(raw) + end}")


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Write a checkpoint of a published shape with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--bits", choices=("4", "8", "none"), default="4", help="of the layers' matrices (4)")
    parser.add_argument("--group", type=int, default=128, help="columns that share a scale (128)")
    parser.add_argument("--symmetric", action="store_true", help="without zero points")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of everything else (float16)")
    parser.add_argument("--untied", action="store_true", help="a head of its own")
    parser.add_argument("--quantise-embedding", type=int, choices=(4, 8), help="bits of embedding and head (16)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_student(
        options.folder,
        options.shape,
        bits=None if options.bits == "none" else int(options.bits),
        group=options.group,
        symmetric=options.symmetric,
        dtype=options.dtype,
        tied=False if options.untied else None,
        quantise_embedding=options.quantise_embedding,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
