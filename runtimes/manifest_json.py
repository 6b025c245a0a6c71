"""manifest.json text -> Manifest. Every field is checked before anything is returned."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from runtimes.manifest import (
    AGAIN,
    COMPONENTS,
    DTYPES,
    MODES,
    SCHEMA,
    SHA256,
    Artifact,
    FileInfo,
    Manifest,
    Modality,
    SpecialTokens,
    StateSpec,
    StudentInfo,
    TensorSpec,
    Tolerance,
    parse_version,
    safe_path,
)
from runtimes.strict_json import count, get, items, optional, refuse, text, typed

LICENSE_WAY_OUT = "State it in the package's package.json and build again."


def _tensor(value: Any, where: str) -> TensorSpec:
    obj = typed(dict)(value, where)
    where += "."
    dtype = get(obj, "dtype", str, where)
    if dtype not in DTYPES:
        raise refuse(f"{where}dtype", f"{dtype!r} is none of {', '.join(DTYPES)}")

    def dimension(size: Any, at: str) -> int | str:
        named = isinstance(size, str) and size != ""
        counted = isinstance(size, int) and not isinstance(size, bool) and size >= 0
        if not named and not counted:
            raise refuse(at, f"{size!r} is neither a length nor the name of one")
        return size

    return TensorSpec(text(obj, "name", where), dtype, items(obj, "shape", where, dimension))


def _state(value: Any, where: str) -> StateSpec:
    spec = _tensor(value, where)
    lengths = tuple(size for size in spec.shape if isinstance(size, int))
    if len(lengths) != len(spec.shape):
        raise refuse(f"{where}.shape", "a state has a fixed shape")
    return StateSpec(
        spec.name, spec.dtype, lengths, text(value, "input", f"{where}."), text(value, "output", f"{where}.")
    )


def _artifact(value: Any, where: str) -> Artifact:
    obj = typed(dict)(value, where)
    where += "."
    component, mode = text(obj, "component", where), text(obj, "mode", where)
    if component not in COMPONENTS:
        raise refuse(f"{where}component", f"{component!r} is none of {', '.join(COMPONENTS)}")
    if mode not in MODES:
        raise refuse(f"{where}mode", f"{mode!r} is none of {', '.join(MODES)}")
    files = tuple(safe_path(path, f"{where}files") for path in items(obj, "files", where, typed(str)))
    model = text(obj, "model", where)
    if model not in files:
        raise refuse(f"{where}model", f"{model!r} is not among the artifact's files")
    operators = get(obj, "operators", dict, where)
    precision = get(obj, "precision", dict, where)
    # Younger than the schema's first number: a bundle without them asks for nothing.
    runtime, options = (get(obj, key, dict, where) if key in obj else {} for key in ("runtime", "options"))
    return Artifact(
        component=component,
        backend=text(obj, "backend", where),
        form=text(obj, "form", where),
        mode=mode,
        model=model,
        files=files,
        inputs=items(obj, "inputs", where, _tensor),
        outputs=items(obj, "outputs", where, _tensor),
        states=items(obj, "states", where, _state),
        precision={key: text(precision, key, f"{where}precision.") for key in precision},
        bytes_per_token=optional(obj, "bytes_per_token", int, where),
        operators={key: count(operators, key, f"{where}operators.") for key in operators},
        preferred=get(obj, "preferred", bool, where),
        runtime={key: text(runtime, key, f"{where}runtime.") for key in runtime},
        options=options,
        raw=obj,
    )


def _token(obj: Mapping[str, Any], key: str, where: str, vocab: int) -> int | None:
    value = optional(obj, key, int, where)
    if value is not None and not 0 <= value < vocab:
        raise refuse(f"{where}{key}", f"token {value} is outside the vocabulary of {vocab}")
    return value


def _modality(name: str, obj: Mapping[str, Any], vocab: int) -> Modality:
    where = f"modalities.{name}."
    tokens = items(obj, "tokens", where, typed(int))
    if len(tokens) != 2 or not 0 <= tokens[0] < tokens[1] <= vocab:
        raise refuse(f"{where}tokens", f"{list(tokens)} is not a range [first, end) inside the vocabulary of {vocab}")
    first, end = tokens
    if "grid" not in obj:
        return Modality(name, first, end, 0, 0, (), None, None, {})
    grid = items(obj, "grid", where, typed(int))
    codebooks, size = count(obj, "codebooks", where, 1), count(obj, "codebook_size", where, 1)
    if not grid or min(grid) < 1 or (codebooks > 1 and grid[-1] != codebooks) or codebooks * size != end - first:
        raise refuse(
            where[:-1], f"grid {list(grid)} and {codebooks} codebook(s) of {size} do not fit tokens {[first, end]}"
        )
    begin, end_token = (_token(obj, key, where, vocab) for key in ("begin", "end"))
    return Modality(
        name, first, end, codebooks, size, grid, begin, end_token, dict(get(obj, "preprocessing", dict, where))
    )


def _modalities(obj: Mapping[str, Any], vocab: int) -> dict[str, Modality]:
    found = {name: _modality(name, get(obj, name, dict, "modalities."), vocab) for name in obj}
    ordered = sorted(found.values(), key=lambda m: m.first)
    for left, right in itertools.pairwise(ordered):
        if left.end > right.first:
            raise refuse("modalities", f"the token ranges of {left.name} and {right.name} overlap")
    return found


def _files(obj: Mapping[str, Any]) -> dict[str, FileInfo]:
    files: dict[str, FileInfo] = {}
    folded: dict[str, str] = {}
    for path in obj:
        where = f"files[{path!r}]."
        safe_path(path, "files")
        info = get(obj, path, dict, "files.")
        digest = get(info, "sha256", str, where)
        if not SHA256.fullmatch(digest):
            raise refuse(f"{where}sha256", "is not a SHA-256 in lower-case hexadecimal")
        other = folded.setdefault(path.casefold(), path)
        if other != path:
            raise refuse("files", f"{other!r} and {path!r} differ only in case, so some file systems cannot hold both")
        files[path] = FileInfo(count(info, "size", where), digest)
    return files


def _student(obj: Mapping[str, Any]) -> StudentInfo:
    if not isinstance(obj.get("license"), str) or not obj["license"].strip():
        raise refuse("student.license", "the licence is missing", LICENSE_WAY_OUT)
    digest = get(obj, "sha256", str, "student.")
    if not SHA256.fullmatch(digest):
        raise refuse("student.sha256", "is not a SHA-256 in lower-case hexadecimal")
    version = text(obj, "version", "student.")
    parse_version(version)
    return StudentInfo(text(obj, "name", "student."), version, obj["license"], digest)


def _tolerance(value: Any, where: str) -> Tolerance:
    obj = typed(dict)(value, where)
    where += "."
    component, gate, metric = (text(obj, key, where) for key in ("component", "gate", "metric"))
    limit = float(get(obj, "limit", float, where))
    return Tolerance(component, gate, metric, limit, text(obj, "source", where))


def _check_references(manifest: Manifest) -> None:
    """Everything that names a file names one of the bundle's; one preferred artifact per component."""
    named = {manifest.tokenizer: "tokenizer"} if manifest.tokenizer else {}
    named |= {path: f"golden.{key}" for key, path in manifest.golden.items()}
    named |= {path: f"artifact {a.component} {a.label}" for a in manifest.artifacts for path in a.files}
    for path, where in named.items():
        if path not in manifest.files:
            raise refuse(where, f"{path!r} is not among the bundle's files")
    for component in sorted({artifact.component for artifact in manifest.artifacts}):
        preferred = [a.label for a in manifest.artifacts if a.component == component and a.preferred]
        if len(preferred) != 1:
            raise refuse(
                "artifacts", f"{component} must have exactly one preferred artifact, it has {preferred or 'none'}"
            )


def parse_manifest(raw: Mapping[str, Any]) -> Manifest:
    """Checks every field of a parsed manifest.json. Raises BundleError naming the field."""
    schema = get(raw, "schema", int, "")
    if schema != SCHEMA:
        way_out = "Update this runtime." if schema > SCHEMA else AGAIN
        raise refuse("schema", f"version {schema} is not the version {SCHEMA} that this runtime reads", way_out)
    vocab = count(raw, "vocab_size", "", 1)
    special = get(raw, "special", dict, "")
    eos = items(special, "eos", "special.", lambda value, at: _token({"": value}, "", at, vocab))
    licenses = tuple(get(raw, "licenses", list, ""))
    if not licenses:
        raise refuse("licenses", "no licence is listed", LICENSE_WAY_OUT)
    golden, tools = get(raw, "golden", dict, ""), get(raw, "tools", dict, "")
    manifest = Manifest(
        build_key=text(raw, "build_key", ""),
        student=_student(get(raw, "student", dict, "")),
        profile=get(raw, "profile", dict, ""),
        vocab_size=vocab,
        context=count(raw, "context", "", 1),
        special=SpecialTokens(
            _token(special, "bos", "special.", vocab),
            tuple(token for token in eos if token is not None),
            _token(special, "pad", "special.", vocab),
        ),
        tokenizer=optional(raw, "tokenizer", str, ""),
        modalities=_modalities(get(raw, "modalities", dict, ""), vocab),
        artifacts=items(raw, "artifacts", "", _artifact),
        golden={key: text(golden, key, "golden.") for key in golden},
        tolerances=items(raw, "tolerances", "", _tolerance),
        inheritance=get(raw, "inheritance", dict, ""),
        # A bundle of an older build has none.
        quantisation=get(raw, "quantisation", dict, "") if "quantisation" in raw else {},
        tools={key: text(tools, key, "tools.") for key in tools},
        licenses=licenses,
        files=_files(get(raw, "files", dict, "")),
        mutable=tuple(safe_path(path, "mutable") for path in items(raw, "mutable", "", typed(str))),
        raw=raw,
    )
    _check_references(manifest)
    return manifest
