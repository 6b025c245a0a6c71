"""Student: a validated delivery package (or plain transformers folder), with its weights mapped, never re-quantised."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from exporters.activations import Activation
from exporters.checkpoint import Checkpoint, open_checkpoint
from exporters.discretizer import load_discretizer
from exporters.errors import PackageError, QuantizationError, TokenizerError, WeightsError
from exporters.formats.scheme import Scheme
from exporters.model_config import Skeleton, check_model_config, library_config, skeleton
from exporters.package import MANIFEST, Modality, Package, validate
from exporters.progress import Bytes, ignore
from exporters.quantization_config import module_schemes
from exporters.quantized import QuantizedTensor
from exporters.safe_files import FileEntry, hash_file
from exporters.safetensors_header import FLOATS, TensorInfo
from exporters.stored_names import assembled
from exporters.tokenizer_files import (
    GOLDEN,
    Vocabulary,
    check_added_tokens,
    check_modalities,
    check_tokenizer,
    read_vocabulary,
    special_ids,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

#: How many decoded tensors are kept, and the bytes of codes of the largest that is.
_KEPT, _LARGEST_KEPT = 3, 1 << 25

__all__ = ["Modality", "Student", "TensorInfo", "load_student"]


class QuantizedTensors(Mapping[str, QuantizedTensor]):
    """Module name -> QuantizedTensor, decoded on access.

    Only the last few small ones are kept: a joined projection asks for codes, scales and zero points of its parts in
    turn.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        schemes: Mapping[str, Scheme],
        shapes: Mapping[str, tuple[int, int]],
        stored: Mapping[str, str],
    ) -> None:
        self._checkpoint, self._shapes, self._stored = checkpoint, shapes, stored
        self.schemes = schemes
        self._kept: dict[str, QuantizedTensor] = {}

    def __getitem__(self, module: str) -> QuantizedTensor:
        if module in self._kept:
            return self._kept[module]
        stored = self._stored.get(module, module)
        tensor = self.schemes[module].decode(self._checkpoint.tensor, stored, self._shapes[module])
        if tensor.codes.nbytes <= _LARGEST_KEPT:
            if len(self._kept) == _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[module] = tensor
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.schemes)

    def __len__(self) -> int:
        return len(self.schemes)


@dataclass(frozen=True, eq=False)
class Student:
    """What the export starts from.

    Attributes:
        sha256: the hash of the package as a whole (of the files read, for a plain folder).
        config: config.json, parsed.
        modalities: by name; `begin`/`end_token` are token texts, `begin_id`/`end_id` their ids.
        tensors: the float tensors by name; read one with `tensor(name)`.
        quantized: the quantised weights by module name, decoded on access.
        experts: parameter of all experts of a layer -> the weights that it is made of, see `Stored.groups`; those are
            in `tensors` and `quantized` one by one, under the checkpoint's names. All else has transformers' names.
        tied: parameter name -> the parameter whose weight it shares ("lm_head.weight" of a tied model).
        activations: module name -> how the quantised layer's input is rounded, for those that round it.
        special: {"bos": id or None, "eos": [ids], "pad": id or None}.
    """

    folder: Path
    name: str
    version: str
    license: str
    sha256: str
    config: dict[str, Any]
    modalities: Mapping[str, Modality]
    tensors: Mapping[str, TensorInfo]
    quantized: Mapping[str, QuantizedTensor]
    experts: Mapping[str, tuple[tuple[str, ...], ...]]
    tied: Mapping[str, str]
    tokenizer: Path | None
    special: dict[str, Any]
    files: Mapping[str, FileEntry] = field(repr=False)
    checkpoint: Checkpoint = field(repr=False)
    activations: Mapping[str, Activation] = field(default_factory=dict)

    def tensor(self, name: str) -> torch.Tensor:
        """A float tensor in its stored dtype, memory-mapped; KeyError for a name not in `tensors`."""
        return self.checkpoint.tensor(self.tensors[name].name)

    def parameter(self, name: str) -> torch.Tensor:
        """A parameter of transformers' model in float32: dequantised, and put together where it is stored in parts.

        Raises KeyError for a name that the checkpoint holds no value for, as for a tied one.
        """
        import torch

        if groups := self.experts.get(name):
            return assembled(tuple(tuple(self.parameter(part) for part in group) for group in groups))
        module = name.removesuffix(".weight")
        if module in self.quantized:
            return torch.from_numpy(self.quantized[module].dequantize())
        return self.tensor(name).float()

    def library_config(self) -> PreTrainedConfig:
        """A fresh transformers config object of the decoder, without quantization_config."""
        return library_config(self.config)

    def discretizer(self, modality: str) -> torch.nn.Module:
        """The diffusers VQModel or transformers DacModel of a modality: float32, eval mode, loaded strictly.

        Raises PackageError for a modality without discretizer, WeightsError or ConfigError for a damaged one.
        """
        entry = self.modalities.get(modality)
        if entry is None or entry.discretizer is None:
            having = ", ".join(name for name, item in self.modalities.items() if item.discretizer) or "none"
            raise PackageError(f"no discretizer for {modality!r}", where=str(self.folder), way_out=f"Having: {having}")
        return load_discretizer(entry.discretizer)

    def verify_unchanged(self) -> None:
        """Hash every file again; raises PackageError naming one that changed since `load_student`."""
        for name, before in self.files.items():
            if hash_file(self.folder / name) != before:
                raise PackageError(
                    "changed while it was being read", where=name, way_out="Build again when nothing writes to it"
                )


def _match_tensors(
    expected: Skeleton, schemes: Mapping[str, Scheme], checkpoint: Checkpoint
) -> tuple[dict[str, TensorInfo], dict[str, tuple[int, int]]]:
    """Every tensor of the model is there with its shape, and no other; returns (float tensors, quantised shapes)."""
    unseen = dict(checkpoint.tensors)
    floats: dict[str, TensorInfo] = {}
    shapes: dict[str, tuple[int, int]] = {}

    def take(name: str, dtypes: frozenset[str], allowed: tuple[tuple[int, ...], ...]) -> TensorInfo:
        info = unseen.pop(name, None)
        if info is None:
            _refuse_joined_experts(name, unseen)
            raise WeightsError(
                f"the tensor {name!r} is missing", where="weights", way_out="Export the checkpoint again"
            )
        if info.shape not in allowed or info.dtype not in dtypes:
            raise WeightsError(
                f"is {info.dtype} {list(info.shape)}; config.json asks for {'/'.join(sorted(dtypes))}"
                f" {' or '.join(str(list(shape)) for shape in allowed)}",
                where=f"{info.file.name}: {name}",
                way_out="Take config.json and the weights from one checkpoint",
            )
        return info

    for name, shape in expected.parameters.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in schemes:
            scheme, shapes[module] = schemes[module], (shape[0], shape[1])
            scheme.check(module, shapes[module])
            for part, (dtypes, allowed) in scheme.layout(shapes[module]).items():
                take(f"{module}.{part}", dtypes, allowed)
            for name in set(scheme.leftovers(module, checkpoint)) - set(expected.parameters):
                del unseen[name]
        else:
            floats[name] = take(name, FLOATS, (shape,))
    for name, source in expected.tied.items():
        # Some writers store the tied head a second time; it is the same weight, so it is checked and left out.
        if name in unseen:
            _check_tied(checkpoint, take(name, FLOATS, (expected.parameters[source],)), source)
    if unseen:
        some = ", ".join(sorted(unseen)[:5])
        raise WeightsError(
            f"{len(unseen)} tensors that the model of config.json does not have: {some}",
            where="weights",
            way_out="Remove them, or correct config.json",
        )
    return floats, shapes


def _refuse_joined_experts(missing: str, unseen: Mapping[str, TensorInfo]) -> None:
    """Tells experts that were quantised as one tensor of three dimensions from a tensor that is simply missing."""
    for name, info in unseen.items():
        layer, marker, part = name.partition(".experts.")
        if marker and part.startswith(("gate_up_proj", "down_proj")) and missing.startswith(f"{layer}{marker}"):
            raise QuantizationError(
                f"holds the experts of a layer as one quantised tensor {list(info.shape)}; those of compressed-tensors "
                "and the like, with a matrix for each expert, are understood",
                where=f"{info.file.name}: {name}",
                way_out="Quantise the checkpoint with a Linear for each expert, or dequantise its experts",
            )


def _check_tied(checkpoint: Checkpoint, info: TensorInfo, source: str) -> None:
    if source not in checkpoint.tensors or not checkpoint.tensor(info.name).equal(checkpoint.tensor(source)):
        raise WeightsError(
            f"differs from {source}, to which config.json ties it",
            where=f"{info.file.name}: {info.name}",
            way_out="Set tie_word_embeddings to false, or drop the tensor",
        )


def _with_ids(modalities: Mapping[str, Modality], vocabulary: Vocabulary | None) -> dict[str, Modality]:
    result = {}
    for name, entry in modalities.items():
        ids = []
        for token in (entry.begin, entry.end_token):
            if token is not None and (vocabulary is None or token not in vocabulary.every):
                raise TokenizerError(
                    f"the token {token!r} that wraps {name} is not in tokenizer.json",
                    where=f"{MANIFEST}: modalities.{name}",
                    way_out="Add it as a special token",
                )
            ids.append(None if token is None or vocabulary is None else vocabulary.every[token])
        result[name] = dataclasses.replace(entry, begin_id=ids[0], end_id=ids[1])
    return result


def _open_tokenizer(package: Package) -> tuple[Path | None, dict[str, Modality], dict[str, Any]]:
    """tokenizer.json, the modalities with the ids of their wrapping tokens, and the special ids; all checked."""
    size = package.config["vocab_size"]
    path = package.path(package.tokenizer_prefix + "tokenizer.json")
    vocabulary = read_vocabulary(path, size) if path else None
    modalities = _with_ids(package.modalities, vocabulary)
    special = special_ids(package, vocabulary)
    if path is not None and vocabulary is not None:
        if added := package.path(package.tokenizer_prefix + "added_tokens.json"):
            check_added_tokens(added, vocabulary)
        if not package.plain:  # a plain checkpoint's text range is the whole, often padded, vocabulary
            check_modalities(vocabulary, modalities, special)
        check_tokenizer(path, package.path(GOLDEN), size)
    return path, modalities, special


def load_student(folder: str | Path, progress: Bytes = ignore) -> Student:
    """Validate a package whole and open it.

    Args:
        progress: called with the bytes that were hashed, and with those of the weights as they are checked.

    Each file is hashed once; weights are read once for the check against NaN and bad scales, in bounded memory, and
    stay on disk. Raises PackageError or a subclass that names the file or field.
    """
    package: Package = validate(folder, progress)
    check_model_config(package.config)
    tokenizer, modalities, special = _open_tokenizer(package)
    checkpoint = open_checkpoint(package.folder, package.files)
    expected = skeleton(package.config, present=checkpoint.tensors)
    stored = package.config.get("quantization_config")
    schemes = {} if stored is None else module_schemes(stored, expected.modules, checkpoint)
    # A tied head carries no weight of its own, whatever the scheme's targets match.
    shared = {name for name in schemes if f"{name}.weight" in expected.tied}
    if rounded := next((name for name in sorted(shared) if schemes[name].rounds_input), None):
        raise QuantizationError(
            "its input would be rounded, but its weight is the embedding's, which is not quantised with it",
            where=f"config.json: quantization_config: {rounded}",
            way_out=f'List "{rounded}" in ignore, or give it a weight of its own (tie_word_embeddings: false)',
        )
    schemes = {name: scheme for name, scheme in schemes.items() if name not in shared}
    tensors, shapes = _match_tensors(expected, schemes, checkpoint)
    checkpoint.check_finite(tensors, progress)
    # From here on a tensor that is stored under another name has that of transformers' model.
    names = {disk: name for name, stored in expected.stored.items() if not stored.groups for disk in stored.names}
    own = {disk.removesuffix(".weight"): name.removesuffix(".weight") for disk, name in names.items()}
    tensors = {names.get(name, name): info for name, info in tensors.items()}
    quantized = QuantizedTensors(
        checkpoint,
        {own.get(module, module): scheme for module, scheme in schemes.items()},
        {own.get(module, module): shape for module, shape in shapes.items()},
        {name: disk for disk, name in own.items()},
    )
    for module in quantized:
        progress(quantized[module].codes.nbytes)
    activations = {
        own.get(name, name): found
        for name, scheme in schemes.items()
        if (found := scheme.activation(checkpoint.tensor, name))
    }
    files = dict(package.files)
    if not package.plain:
        files[MANIFEST] = hash_file(package.folder / MANIFEST)
    return Student(
        folder=package.folder,
        name=package.name,
        version=package.version,
        license=package.license,
        sha256=package.sha256,
        config=dict(package.config),
        modalities=MappingProxyType(modalities),
        tensors=MappingProxyType(tensors),
        quantized=quantized,
        experts=MappingProxyType({name: stored.groups for name, stored in expected.stored.items() if stored.groups}),
        tied=MappingProxyType(dict(expected.tied)),
        tokenizer=tokenizer,
        special=special,
        files=MappingProxyType(files),
        checkpoint=checkpoint,
        activations=MappingProxyType(activations),
    )
