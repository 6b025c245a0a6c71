"""Profile files -> Profile: every key checked, and nothing taken from outside this folder."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from device_profiles.quantise import Quantise, parse_table
from device_profiles.rules import RULES
from device_profiles.schema import Profile, ProfileError

FOLDER = Path(__file__).parent
MAX_FILE_BYTES = 1 << 20
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_FIELDS = {item.name: item for item in fields(Profile)}
# What a file may say beside the fields themselves.
_DETECTED = "detected"
_LISTS = ("unknown", "not_applicable", _DETECTED)


def list_profiles() -> tuple[str, ...]:
    """Names of the profiles that are there, sorted; `host` is the machine this runs on."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def load_profile(name: str) -> Profile:
    """The profile of that name. Raises ProfileError for a name that is not listed, or a file that is not sound."""
    if len(name) > 64 or not _NAME.fullmatch(name):
        way_out = f"Names are lower-case words with hyphens, never paths. There are: {', '.join(list_profiles())}."
        raise ProfileError("is not the name of a profile", f"profile {name[:80]!r}", way_out)
    if name not in list_profiles():
        near = difflib.get_close_matches(name, list_profiles(), 1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ProfileError("is not there", f"profile {name!r}", f"{hint}There are: {', '.join(list_profiles())}.")
    return load_profile_file(FOLDER / f"{name}.toml")


def load_profile_file(path: Path) -> Profile:
    """Reads and checks one profile file. Raises ProfileError naming the file and the key."""
    raw = _read(path)
    where = path.name
    _check_keys(raw, where)
    values = _with_absent(raw, where)
    sources: dict[str, Any] = dict(values["sources"])
    if detected := raw.get(_DETECTED, []):
        from device_profiles.host import detect

        found, found_sources = detect()
        values |= {key: found[key] for key in detected}
        sources |= {key: found_sources[key] for key in detected if found[key] is not None}
        values["unknown"] = [*values["unknown"], *(key for key in detected if found[key] is None)]
        values["sources"] = sources
    profile = Profile(**{name: _typed(name, values[name], where) for name in _FIELDS})
    _check_values(profile, path)
    return profile


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ProfileError(f"is larger than {MAX_FILE_BYTES} bytes", path.name, "A profile is a short text file.")
        return tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise ProfileError(error.strerror or str(error), str(path), "Check that file.") from error
    except (ValueError, RecursionError) as error:
        reason = "is nested too deeply" if isinstance(error, RecursionError) else f"is not valid TOML: {error}"
        raise ProfileError(reason, path.name, "Correct it there.") from error


def _check_keys(raw: Mapping[str, Any], where: str) -> None:
    """Unknown keys, with the nearest known one; keys listed as absent that do not exist or have a value too."""
    known = [*_FIELDS, _DETECTED]
    for key in raw:
        if key not in known:
            raise ProfileError(f"unknown key {key!r}", where, _nearest(key, known))
    seen: dict[str, str] = {}
    for group in _LISTS:
        keys = raw.get(group, [])
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ProfileError("must be a list of keys", f"{where}: {group}", 'Write them as in ["soc", "isa"].')
        for key in keys:
            if key not in _FIELDS:
                raise ProfileError(f"unknown key {key!r}", f"{where}: {group}", _nearest(key, known))
            if key in raw or key in seen:
                other = "has a value" if key in raw else f"is listed as {seen[key]}"
                raise ProfileError(f"{key!r} {other} too", f"{where}: {group}", "Keep one of the two.")
            seen[key] = group
    sources = raw.get("sources", {})
    for key in sources if isinstance(sources, dict) else ():
        if key not in _FIELDS:
            raise ProfileError(f"unknown key {key!r}", f"{where}: sources", _nearest(key, known))


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1, cutoff=0.4)
    return f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."


def _with_absent(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The file's values with None for the keys that it lists as absent. Raises for a key that is simply missing."""
    values = {key: value for key, value in raw.items() if key in _FIELDS}
    values.setdefault("unknown", [])
    values.setdefault("not_applicable", [])
    values.setdefault("quantise", {})
    for group in _LISTS:
        values |= dict.fromkeys(raw.get(group, []))
    missing = [key for key in _FIELDS if key not in values]
    if missing:
        way_out = "Give a value, or list the key under unknown or not_applicable."
        raise ProfileError(f"missing key(s) {', '.join(missing)}", where, way_out)
    return values


def _typed(name: str, value: Any, where: str) -> Any:
    """`value` in the type of the field: lists become tuples, whole numbers pass as floats. None only where allowed."""
    kind, at = str(_FIELDS[name].type), f"{where}: {name}"
    if value is None:
        if not kind.endswith("| None"):
            raise ProfileError("must have a value", at, "It is a choice of the profile, not a fact to be found out.")
        return None
    if kind == Quantise.__name__:
        table = parse_table(value)
        for key, what, way_out in () if isinstance(table, Quantise) else table:
            raise ProfileError(what, f"{at}.{key}".rstrip("."), way_out)
        return table
    base = kind.removesuffix(" | None")
    if base == "str" and isinstance(value, str) and value.strip():
        return value
    if base == "int" and type(value) is int:
        return value
    if base == "float" and type(value) in (int, float):
        return float(value)
    if base == "tuple[str, ...]" and isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if base == "Mapping[str, str]" and isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
        return dict(value)
    if base.startswith("Mapping[str, tuple") and isinstance(value, dict):
        return {key: _strings(entries, f"{at}.{key}") for key, entries in value.items()}
    expected = {
        "str": "a text that is not empty",
        "int": "a whole number" + (" of bytes" if "bytes" in name else ""),
        "float": "a number" + (" of milliseconds" if name.endswith("_ms") else ""),
        "tuple[str, ...]": "a list of texts",
    }.get(base, "a table")
    raise ProfileError(
        f"must be {expected}, not {value!r:.60}", at, "Correct the value; the key's name holds its unit."
    )


def _strings(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ProfileError("must be a list of backend/form/mode", where, 'Write it as in ["onnx/fused/exact"].')
    return tuple(value)


def _check_values(profile: Profile, path: Path) -> None:
    """Ranges, choices, sources, and the pairs that cannot be."""
    where = path.name
    if profile.name != path.stem:
        raise ProfileError(f"{profile.name!r} is not the file's name", f"{where}: name", f"Write {path.stem!r}.")
    for name, item in _FIELDS.items():
        value, limits = getattr(profile, name), item.metadata
        if value is None or name in ("sources", "components", "quantise"):
            continue
        if limits["low"] is not None and not limits["low"] <= value <= limits["high"]:
            span = f"{limits['low']:g} to {limits['high']:g}"
            way_out = "Check the unit, which the key's name holds (bytes, not GB; a share, not a percentage)."
            raise ProfileError(f"{value!r} is outside {span}", f"{where}: {name}", way_out)
        choices = limits["choices"]
        for word in (value if isinstance(value, tuple) else (value,)) if choices else ():
            if word not in choices:
                raise ProfileError(f"{word!r} is not known", f"{where}: {name}", f"One of: {', '.join(choices)}.")
        if limits["sourced"] and not profile.source(name).strip():
            way_out = f"Add {name} under [sources], or list it under unknown."
            raise ProfileError("has a value without a source", f"{where}: {name}", way_out)
    _check_target(profile, where)
    for rule in RULES:
        for key, what, way_out in rule(profile):
            raise ProfileError(what, f"{where}: {key}", way_out)


def _check_target(profile: Profile, where: str) -> None:
    if profile.tvm_target is None:
        return
    try:
        target = json.loads(profile.tvm_target)
    except (ValueError, RecursionError):
        target = None
    if not isinstance(target, dict) or not isinstance(target.get("kind"), str):
        example = """Write it as in '{"kind": "llvm", "mcpu": "cortex-a76"}'."""
        raise ProfileError("is not a JSON object with a kind", f"{where}: tvm_target", example)
