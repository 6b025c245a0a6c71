"""Writes the tables of README.md from what was built and measured; nothing in them is typed.

    python -m tools.readme_tables BUNDLE... [--check]

Backends x profiles comes from the reports of the given bundles and the profiles themselves; speed, from
tools/measurements/peers.json (see tools/bench_peers.py); sizes, from genai*.json there (tools/bench_genai.py); integer
products, from integers.json (tools/bench_integers.py); quality, from the reference student's quality.json. Each table
stands between two marks, `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from device_profiles import Profile, list_profiles, load_profile
from device_profiles.schema import FORMS
from exporters.reference import DATA
from runtimes.bundle import load_bundle
from runtimes.matrix import parity_matrix
from runtimes.report import read_report

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MEASUREMENTS = Path(__file__).parent / "measurements"
#: Whose bundles show every backend once: this machine, and what only stands in for a device here.
PARITY_PROFILES = ("host", "iphone-16-pro", "raspberry-pi-5")
#: From the worst down: a cell shows the worst status of its backend's gates.
ORDER = ("failed", "pending-device", "proxy", "passed")


def support_table(bundles: Iterable[Path]) -> str:
    """Backends x profiles: the worst status of the gates that ran, or why none did."""
    statuses: dict[str, dict[str, set[str]]] = {}
    for folder in bundles:
        bundle = load_bundle(folder)
        rows = statuses.setdefault(bundle.profile["name"], {})
        for result in read_report(bundle.folder).results:
            if result.gate == "budget":  # about the device's speed, not about whether the artifact is right
                continue
            rows.setdefault(result.backend, set()).add(result.status)
    lines = [("profile", *FORMS)]
    for name in list_profiles():
        profile = load_profile(name)
        lines.append((f"`{name}`", *(_cell(profile, backend, statuses.get(name, {})) for backend in FORMS)))
    return _markdown(lines)


def _cell(profile: Profile, backend: str, found: Mapping[str, set[str]]) -> str:
    if backend not in profile.backends:
        return ""
    seen = found.get(backend, set())
    return next((status for status in ORDER if status in seen), "not run")


def parity_table(bundles: Iterable[Path]) -> str:
    """Every backend of the reference student, over the bundles in PARITY_PROFILES."""
    loaded = {bundle.profile["name"]: bundle for bundle in map(load_bundle, bundles)}
    reports = {name: read_report(loaded[name].folder).results for name in PARITY_PROFILES if name in loaded}
    return parity_matrix(reports)


def backends_table(measured: Mapping[str, Any]) -> str:
    """Median times of every backend on one machine, in one interleaved run, and the ratio to ONNX Runtime."""
    lines = [("task", "artifact", "median", "of ONNX Runtime's time")]
    for task, row in measured["median_seconds"].items():
        base = row.get(measured["base"])
        for name, seconds in row.items():
            ratio = "" if base is None else f"{seconds / base:.2f}"
            lines.append((task, f"`{name}`", f"{1e3 * seconds:.3f} ms", ratio))
    source = f"{measured['student']}, {measured['machine']}, {measured['date']}: `{measured['command']}`"
    return f"{_markdown(lines)}\n\n{source}"


def speed_table(measured: Mapping[str, Any]) -> str:
    """Median times of one interleaved run and the ratio to the peer."""
    peer = "torch.onnx.export"
    lines = [("task", "artifact", "median", f"{peer}, float32", "times as fast")]
    for task, row in measured["median_seconds"].items():
        for name, seconds in row.items():
            if name != peer:
                ratio = row[peer] / seconds
                lines.append(
                    (task, f"`{name}`", f"{1e3 * seconds:.3f} ms", f"{1e3 * row[peer]:.3f} ms", f"{ratio:.2f}")
                )
    source = f"{measured['student']}, {measured['machine']}, {measured['date']}: `{measured['command']}`"
    return f"{_markdown(lines)}\n\n{source}"


def sizes_table(measured: Mapping[str, Any]) -> str:
    """Exports and runs of one shape beside ONNX Runtime GenAI's, with the ratio: above 1 ours is the better one."""
    units = {
        "cpu_seconds": ("export, CPU time", "{:.0f} s"),
        "peak_bytes": ("export, peak memory", "{:.2f} GB"),
        "written_bytes": ("export, size", "{:.2f} GB"),
        "load, s": ("load", "{:.2f} s"),
        "peak memory, bytes": ("run, peak memory", "{:.2f} GB"),
        "held memory, bytes": ("run, memory held behind it", "{:.2f} GB"),
    }
    lines = [("weights", "figure", "edge-export", "ONNX Runtime GenAI", "times as good")]
    exports = {
        title: {key: {kind: export[key] for kind, export in row.items()} for key in row["ours"] if key != "seconds"}
        for title, row in measured["exports"].items()
    }
    for title, row in {**exports, **measured["runs"]}.items():
        for figure, values in row.items():
            name, form = units.get(figure, (figure.removesuffix(", tokens/s"), "{:.1f} tokens/s"))
            ours, peer = values["ours"], values["peer"]
            ratio = ours / peer if figure.endswith("tokens/s") else peer / ours
            shown = (form.format(value / 1e9 if "GB" in form else value) for value in (ours, peer))
            lines.append((title, name, *shown, f"{ratio:.2f}"))
    note = f" ({measured['note']})" if "note" in measured else ""
    source = f"{measured['machine']}, {measured['date']}: `{measured['command']}`{note}"
    return f"{_markdown(lines)}\n\n{source}"


def quality_table(quality: Mapping[str, Any]) -> str:
    """The reference student's tasks, judged by classifiers trained on real data."""
    models = quality["models"]
    tasks = list(dict.fromkeys(task for row in models.values() for task in row))
    lines = [("percent", *models)]
    lines += [
        (task.replace("_", " "), *(f"{row[task]:.1f}" if task in row else "" for row in models.values()))
        for task in tasks
    ]
    return _markdown(lines)


def quantise_table(measured: Mapping[str, Any]) -> str:
    """What each way of quantising costs, and how large the matrices then are."""
    lines = [("`--quantise`", "budget", "mean KL against float", "kB", "matrices stored as")]
    for row in measured["rows"]:
        stored = ", ".join(f"{count} x {form}" for form, count in row["stored"].items())
        budget = "" if row["budget"] is None else f"{row['budget']:g}"
        lines.append((f"`{row['recipe']}`", budget, f"{row['mean_kl']:.2g}", f"{row['bytes'] / 1e3:,.0f}", stored))
    return f"{_markdown(lines)}\n\n{measured['student']}, {measured['date']}: `{measured['command']}`"


def integers_table(measured: Mapping[str, Any]) -> str:
    """Median times of products with rounded inputs, and the share that the first form takes of each other's time."""
    first, *others = measured["rows"][0]["median_seconds"]
    shares = [f"{first} / {name}" for name in others]
    lines = [("matrix", "input's scale", "rows", first, *others, *shares)]
    for row in measured["rows"]:
        seconds = row["median_seconds"]
        times = (f"{1e3 * value:.3f} ms" for value in seconds.values())
        ratios = (f"{seconds[first] / seconds[name]:.2f}" for name in others)
        lines.append((row["matrix"], row["scale"], str(row["rows"]), *times, *ratios))
    return f"{_markdown(lines)}\n\n{measured['machine']}, {measured['date']}: `{measured['command']}`"


def _markdown(lines: list[tuple[str, ...]]) -> str:
    rows = [lines[0], ("---",) * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def fill(text: str, tables: Mapping[str, str]) -> str:
    """``text`` with each table between its marks. Raises ValueError for a mark that is not there."""
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no marks for the table {name!r}")
        text = pattern.sub(lambda match, t=table: f"{match[1]}{t}\n{match[2]}", text)
    return text


def main() -> int:
    """Command line of this module; with --check, exit status 1 when README.md is not what would be written."""
    parser = argparse.ArgumentParser(description="Write the tables of README.md.")
    parser.add_argument("bundles", type=Path, nargs="*", help="bundles whose reports fill the support table")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the README is out of date")
    options = parser.parse_args()
    tables = recorded_tables()
    if options.bundles:
        tables["support"] = support_table(options.bundles)
        tables["parity"] = parity_table(options.bundles)
    text = README.read_text()
    filled = fill(text, tables)
    if options.check:
        return int(filled != text)
    README.write_text(filled)
    return 0


#: name of a table -> the kept figures that it is made of, and how
RECORDED = {
    "speed": (MEASUREMENTS / "peers.json", speed_table),
    "backends": (MEASUREMENTS / "backends.json", backends_table),
    "quantise": (MEASUREMENTS / "quantise.json", quantise_table),
    "integers": (MEASUREMENTS / "integers.json", integers_table),
    "sizes": (MEASUREMENTS / "genai.json", sizes_table),
    "larger": (MEASUREMENTS / "genai-1.5b.json", sizes_table),
    "quality": (DATA / "shared" / "quality.json", quality_table),
}


def recorded_tables() -> dict[str, str]:
    """The tables whose figures are kept in the repository."""
    return {name: make(json.loads(file.read_text())) for name, (file, make) in RECORDED.items() if file.is_file()}


if __name__ == "__main__":
    sys.exit(main())
