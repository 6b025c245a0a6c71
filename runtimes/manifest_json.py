"""manifest.json text -> Manifest. Every field is checked before anything is returned."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from runtimes.manifest import (
    AGAIN,
    COMPONENTS,
    DTYPES,
    MODES,
    SCHEMA,
    SHA256,
    Artifact,
    BundleError,
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

T = TypeVar("T")
LICENSE_WAY_OUT = "State it in the package's package.json and build again."
_NAMES = {
    int: "an integer",
    str: "a string",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def _fail(where: str, what: str, way_out: str = AGAIN) -> BundleError:
    return BundleError(what, where, way_out)


def _get(obj: Mapping[str, Any], key: str, kind: type[T], where: str) -> T:
    """obj[key] of type `kind` (an int also passes as a float; a bool never passes as a number)."""
    if key not in obj:
        raise _fail(f"{where}{key}", "is missing")
    value = obj[key]
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise _fail(f"{where}{key}", f"must be {_NAMES[kind]}, not {type(value).__name__}")
    return value  # type: ignore[return-value]


def _optional(obj: Mapping[str, Any], key: str, kind: type[T], where: str) -> T | None:
    """As `_get`, but null (the key itself must be there) gives None."""
    return None if key in obj and obj[key] is None else _get(obj, key, kind, where)


def _count(obj: Mapping[str, Any], key: str, where: str, low: int = 0) -> int:
    value = _get(obj, key, int, where)
    if not low <= value < 1 << 62:
        raise _fail(f"{where}{key}", f"{value} is out of range (at least {low})")
    return value


def _text(obj: Mapping[str, Any], key: str, where: str) -> str:
    value = _get(obj, key, str, where)
    if not value.strip():
        raise _fail(f"{where}{key}", "is empty")
    return value


def _list(obj: Mapping[str, Any], key: str, where: str, each: Callable[[Any, str], T]) -> tuple[T, ...]:
    values = _get(obj, key, list, where)
    return tuple(each(value, f"{where}{key}[{i}]") for i, value in enumerate(values))


def _typed(kind: type[T]) -> Callable[[Any, str], T]:
    def check(value: Any, where: str) -> T:
        return _get({"": value}, "", kind, where)

    return check


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    obj = dict(pairs)
    if len(obj) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in {k for k, _ in pairs[:i]})
        raise ValueError(f"key {twice!r} is there twice")
    return obj


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def load_json(data: bytes, where: str) -> dict[str, Any]:
    """Strict JSON object: UTF-8 without a mark, no key twice, no NaN or infinity, no runaway nesting."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_finite
        )
    except (ValueError, RecursionError) as error:
        reason = "is nested too deeply" if isinstance(error, RecursionError) else f"is not valid JSON ({error})"
        raise _fail(where, reason) from error
    if not isinstance(value, dict):
        raise _fail(where, "must be a JSON object")
    return value


def _tensor(value: Any, where: str) -> TensorSpec:
    obj = _typed(dict)(value, where)
    where += "."
    dtype = _get(obj, "dtype", str, where)
    if dtype not in DTYPES:
        raise _fail(f"{where}dtype", f"{dtype!r} is none of {', '.join(DTYPES)}")

    def dimension(size: Any, at: str) -> int | str:
        if (
            isinstance(size, bool)
            or not isinstance(size, (int, str))
            or (isinstance(size, int) and size < 0)
            or size == ""
        ):
            raise _fail(at, f"{size!r} is neither a length nor the name of one")
        return size

    return TensorSpec(_text(obj, "name", where), dtype, _list(obj, "shape", where, dimension))


def _state(value: Any, where: str) -> StateSpec:
    spec = _tensor(value, where)
    lengths = tuple(size for size in spec.shape if isinstance(size, int))
    if len(lengths) != len(spec.shape):
        raise _fail(f"{where}.shape", "a state has a fixed shape")
    return StateSpec(
        spec.name, spec.dtype, lengths, _text(value, "input", f"{where}."), _text(value, "output", f"{where}.")
    )


def _artifact(value: Any, where: str) -> Artifact:
    obj = _typed(dict)(value, where)
    where += "."
    component, mode = _text(obj, "component", where), _text(obj, "mode", where)
    if component not in COMPONENTS:
        raise _fail(f"{where}component", f"{component!r} is none of {', '.join(COMPONENTS)}")
    if mode not in MODES:
        raise _fail(f"{where}mode", f"{mode!r} is none of {', '.join(MODES)}")
    files = tuple(safe_path(path, f"{where}files") for path in _list(obj, "files", where, _typed(str)))
    model = _text(obj, "model", where)
    if model not in files:
        raise _fail(f"{where}model", f"{model!r} is not among the artifact's files")
    operators = _get(obj, "operators", dict, where)
    precision = _get(obj, "precision", dict, where)
    return Artifact(
        component=component,
        backend=_text(obj, "backend", where),
        form=_text(obj, "form", where),
        mode=mode,
        model=model,
        files=files,
        inputs=_list(obj, "inputs", where, _tensor),
        outputs=_list(obj, "outputs", where, _tensor),
        states=_list(obj, "states", where, _state),
        precision={key: _text(precision, key, f"{where}precision.") for key in precision},
        bytes_per_token=_optional(obj, "bytes_per_token", int, where),
        operators={key: _count(operators, key, f"{where}operators.") for key in operators},
        preferred=_get(obj, "preferred", bool, where),
        raw=obj,
    )


def _token(obj: Mapping[str, Any], key: str, where: str, vocab: int) -> int | None:
    value = _optional(obj, key, int, where)
    if value is not None and not 0 <= value < vocab:
        raise _fail(f"{where}{key}", f"token {value} is outside the vocabulary of {vocab}")
    return value


def _modality(name: str, obj: Mapping[str, Any], vocab: int) -> Modality:
    where = f"modalities.{name}."
    tokens = _list(obj, "tokens", where, _typed(int))
    if len(tokens) != 2 or not 0 <= tokens[0] < tokens[1] <= vocab:
        raise _fail(f"{where}tokens", f"{list(tokens)} is not a range [first, end) inside the vocabulary of {vocab}")
    first, end = tokens
    if "grid" not in obj:
        return Modality(name, first, end, 0, 0, (), None, None, {})
    grid = _list(obj, "grid", where, _typed(int))
    codebooks, size = _count(obj, "codebooks", where, 1), _count(obj, "codebook_size", where, 1)
    if not grid or min(grid) < 1 or (codebooks > 1 and grid[-1] != codebooks) or codebooks * size != end - first:
        raise _fail(
            where[:-1], f"grid {list(grid)} and {codebooks} codebook(s) of {size} do not fit tokens {[first, end]}"
        )
    begin, end_token = (_token(obj, key, where, vocab) for key in ("begin", "end"))
    return Modality(
        name, first, end, codebooks, size, grid, begin, end_token, dict(_get(obj, "preprocessing", dict, where))
    )


def _modalities(obj: Mapping[str, Any], vocab: int) -> dict[str, Modality]:
    found = {name: _modality(name, _get(obj, name, dict, "modalities."), vocab) for name in obj}
    ordered = sorted(found.values(), key=lambda m: m.first)
    for left, right in itertools.pairwise(ordered):
        if left.end > right.first:
            raise _fail("modalities", f"the token ranges of {left.name} and {right.name} overlap")
    return found


def _files(obj: Mapping[str, Any]) -> dict[str, FileInfo]:
    files: dict[str, FileInfo] = {}
    folded: dict[str, str] = {}
    for path in obj:
        where = f"files[{path!r}]."
        safe_path(path, "files")
        info = _get(obj, path, dict, "files.")
        digest = _get(info, "sha256", str, where)
        if not SHA256.fullmatch(digest):
            raise _fail(f"{where}sha256", "is not a SHA-256 in lower-case hexadecimal")
        other = folded.setdefault(path.casefold(), path)
        if other != path:
            raise _fail("files", f"{other!r} and {path!r} differ only in case, so some file systems cannot hold both")
        files[path] = FileInfo(_count(info, "size", where), digest)
    return files


def _student(obj: Mapping[str, Any]) -> StudentInfo:
    if not isinstance(obj.get("license"), str) or not obj["license"].strip():
        raise _fail("student.license", "the licence is missing", LICENSE_WAY_OUT)
    digest = _get(obj, "sha256", str, "student.")
    if not SHA256.fullmatch(digest):
        raise _fail("student.sha256", "is not a SHA-256 in lower-case hexadecimal")
    version = _text(obj, "version", "student.")
    parse_version(version)
    return StudentInfo(_text(obj, "name", "student."), version, obj["license"], digest)


def _tolerance(value: Any, where: str) -> Tolerance:
    obj = _typed(dict)(value, where)
    where += "."
    component, gate, metric = (_text(obj, key, where) for key in ("component", "gate", "metric"))
    limit = float(_get(obj, "limit", float, where))
    return Tolerance(component, gate, metric, limit, _text(obj, "source", where))


def _check_references(manifest: Manifest) -> None:
    """Everything that names a file names one of the bundle's; one preferred artifact per component."""
    named = {manifest.tokenizer: "tokenizer"} if manifest.tokenizer else {}
    named |= {path: f"golden.{key}" for key, path in manifest.golden.items()}
    named |= {path: f"artifact {a.component} {a.label}" for a in manifest.artifacts for path in a.files}
    for path, where in named.items():
        if path not in manifest.files:
            raise _fail(where, f"{path!r} is not among the bundle's files")
    for component in sorted({artifact.component for artifact in manifest.artifacts}):
        preferred = [a.label for a in manifest.artifacts if a.component == component and a.preferred]
        if len(preferred) != 1:
            raise _fail(
                "artifacts", f"{component} must have exactly one preferred artifact, it has {preferred or 'none'}"
            )


def parse_manifest(raw: Mapping[str, Any]) -> Manifest:
    """Checks every field of a parsed manifest.json. Raises BundleError naming the field."""
    schema = _get(raw, "schema", int, "")
    if schema != SCHEMA:
        way_out = "Update this runtime." if schema > SCHEMA else AGAIN
        raise _fail("schema", f"version {schema} is not the version {SCHEMA} that this runtime reads", way_out)
    vocab = _count(raw, "vocab_size", "", 1)
    special = _get(raw, "special", dict, "")
    eos = _list(special, "eos", "special.", lambda value, at: _token({"": value}, "", at, vocab))
    licenses = tuple(_get(raw, "licenses", list, ""))
    if not licenses:
        raise _fail("licenses", "no licence is listed", LICENSE_WAY_OUT)
    golden, tools = _get(raw, "golden", dict, ""), _get(raw, "tools", dict, "")
    manifest = Manifest(
        build_key=_text(raw, "build_key", ""),
        student=_student(_get(raw, "student", dict, "")),
        profile=_get(raw, "profile", dict, ""),
        vocab_size=vocab,
        context=_count(raw, "context", "", 1),
        special=SpecialTokens(
            _token(special, "bos", "special.", vocab),
            tuple(token for token in eos if token is not None),
            _token(special, "pad", "special.", vocab),
        ),
        tokenizer=_optional(raw, "tokenizer", str, ""),
        modalities=_modalities(_get(raw, "modalities", dict, ""), vocab),
        artifacts=_list(raw, "artifacts", "", _artifact),
        golden={key: _text(golden, key, "golden.") for key in golden},
        tolerances=_list(raw, "tolerances", "", _tolerance),
        inheritance=_get(raw, "inheritance", dict, ""),
        tools={key: _text(tools, key, "tools.") for key in tools},
        licenses=licenses,
        files=_files(_get(raw, "files", dict, "")),
        mutable=tuple(safe_path(path, "mutable") for path in _list(raw, "mutable", "", _typed(str))),
        raw=raw,
    )
    _check_references(manifest)
    return manifest
