"""Sizes and speed against ONNX Runtime GenAI: its export of the same weights and its run of it, beside ours.

    python -m tools.bench_genai --shape qwen2.5-0.5b [--threads N] [--rounds N] [--work DIR] [--output FILE]

Needs the extra `peers`. The checkpoint is random (tools/random_student.py), packed at 4 bits in groups of 128,
symmetric; GenAI's model builder does not read that form, so it is given the same weights dequantised and rounded to
float16, and quantises them again in groups of the same size, symmetric too. Where embedding and head are in 16 bits,
the head is left out of its quantisation as well, and computes in float32 in both; ours is then packed at load, as the
builder's is, or read where its file is mapped (`float_tables` of a profile). The builder's option that takes the
head's product for the newest token alone is on, as ours does that; otherwise its defaults hold.

Each export is a process of its own, whose CPU time and peak memory the system counts. Then each contender loads its
model in a process of its own, and in every round has its turn while the others wait. Who goes first changes with
every round, and a turn starts when the threads of the last one have stopped spinning. The rounds are spread over
several such pairs of processes. Figures are medians over the rounds, of two of which the ratio is taken. Memory is of
a runtime's whole process, mapped weights included: the most that it held, and what it holds behind the last round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from runtimes.host import cpu_model, usable_cores
from tools.genai_contenders import CAPACITY, Contender
from tools.random_student import SHAPES, write_student

GROUP = 128
PREFILLS, STEPS = (64, 512), 32
# Times that both are opened anew.
OPENINGS = 5
# Seconds between two turns: the waiting threads of both runtimes spin for some milliseconds.
REST = 0.1
VERSIONS = ("onnxruntime", "onnxruntime-genai", "torch", "transformers")
MEASUREMENTS = Path(__file__).parent / "measurements" / "genai.json"


@dataclass(frozen=True)
class Pair:
    """One comparison: our (form, mode) against the builder's options, on a checkpoint with such a head; `tables` is
    the profile's `float_tables`."""

    title: str
    head: str
    tables: str
    mode: str
    accuracy_level: int


PAIRS = (
    Pair("16-bit head packed, int8 activations", "float16", "packed", "fast", 4),
    Pair("16-bit head packed, float32 activations", "float16", "packed", "exact", 1),
    Pair("16-bit head mapped, int8 activations", "float16", "mapped", "fast", 4),
    Pair("4-bit head, int8 activations", "int4", "packed", "fast", 4),
)


@dataclass(frozen=True)
class Export:
    """One exporter's run: seconds of CPU and of the clock, peak resident bytes, bytes written."""

    cpu_seconds: float
    seconds: float
    peak_bytes: int
    written_bytes: int


def counted(command: Sequence[str], written: Path) -> Export:
    """Runs a command as a process of its own. Raises RuntimeError with what it said when it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, cwd=Path(__file__).parent.parent)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)}: {said.read().decode(errors='replace')[-2000:]}")
    size = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
    return Export(usage.ru_utime + usage.ru_stime, seconds, usage.ru_maxrss << 10, size)


def recorded(command: Sequence[str], written: Path) -> dict[str, Any]:
    """The figures of such a run, which is made once for a folder."""
    record = written.with_suffix(".json")
    if not record.exists():
        record.write_text(json.dumps(asdict(counted(command, written))))
    figures: dict[str, Any] = json.loads(record.read_text())
    return figures


# --- exports ----------------------------------------------------------------------------------------------------------


def export_ours(student: Path, output: Path, tables: str) -> None:
    """The exporter's part of a build, both fused forms: loaded, captured, written, with a manifest to run it by."""
    from dataclasses import replace

    from device_profiles import load_profile
    from exporters import stages
    from exporters.build import quiet
    from exporters.heap import return_large_blocks
    from exporters.inheritance import Inheritance

    profile = load_profile("host")
    entries = {**profile.components, "lm": ("onnx/fused/exact", "onnx/fused/fast")}
    return_large_blocks()  # as the command does
    profile = replace(profile, components=entries, float_tables=tables)
    planned = stages.plan(student, None, profile, ("onnx",), CAPACITY, quiet)
    output.mkdir(parents=True)
    artifacts = stages.export(planned, output, quiet)
    stages.finish(planned, "export-alone", artifacts, {}, 0.0, (), Inheritance(), output, quiet)


def export_peer(floating: Path, output: Path, pair: Pair) -> list[str]:
    """The builder's command."""
    options = [f"block_size={GROUP}", f"accuracy_level={pair.accuracy_level}", "prune_lm_head=true"]
    if pair.head == "float16":
        options.append("nodes_to_exclude=/lm_head/MatMul")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(floating), "-o", str(output)]
    return [*command, "-p", "int4", "-e", "cpu", "-c", str(output / "cache"), "--extra_options", *options]


def write_checkpoints(shape: str, head: str, student: Path, floating: Path) -> None:
    """The packed checkpoint and the one in float16."""
    table = 4 if head == "int4" else None
    write_student(student, shape, group=GROUP, symmetric=True, quantise_embedding=table)
    write_floating(student, floating)


def write_floating(student: Path, folder: Path) -> None:
    """The same weights in float16, as a checkpoint that any tool reads, with a tokenizer that the builder asks for."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    from exporters.student import load_student

    source = load_student(student)
    folder.mkdir(parents=True)
    shards = {}
    for i, name in enumerate(source.tensors):
        shards[name] = f"model-{i:05}.safetensors"
        save_file({name: source.tensor(name).to(torch.float16)}, folder / shards[name], metadata={"format": "pt"})
    for i, module in enumerate(source.quantized, len(shards)):
        name = f"{module}.weight"
        shards[name] = f"model-{i:05}.safetensors"
        weight = torch.from_numpy(source.quantized[module].dequantize()).to(torch.float16)
        save_file({name: weight}, folder / shards[name], metadata={"format": "pt"})
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    Tokenizer(WordLevel({"<eos>": 0, "<unk>": 1}, "<unk>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "<unk>"})
    )


# --- runs ------------------------------------------------------------------------------------------------------------


def race(ours: Path, peer: Path, pair: Pair, vocabulary: int, threads: int, rounds: int) -> dict[str, dict[str, float]]:
    """figure -> {"ours": median, "peer": median} of one interleaved run: seconds, tokens/s, bytes."""
    figures: dict[str, dict[str, list[float]]] = {}

    def note(figure: str, kind: str, value: float) -> None:
        figures.setdefault(figure, {}).setdefault(kind, []).append(value)

    folders = {"ours": ours, "peer": peer}
    tasks = [("decode", STEPS), *(("prefill", count) for count in PREFILLS)]
    for opening in range(OPENINGS):
        # Where its pages lie makes up to 6 % of a process's speed: neither runs in one process alone.
        racing = {}
        for kind in sorted(folders, reverse=bool(opening % 2)):
            racing[kind] = Contender(kind, folders[kind], pair.mode, threads, vocabulary)
            note("load, s", kind, racing[kind].load)
        for turn in range(-(-rounds // OPENINGS) + 1):
            for what, count in tasks:
                for kind in sorted(racing, reverse=bool(turn % 2)):
                    time.sleep(REST)
                    rate = count / racing[kind].ask(what, count)
                    if turn:  # the first turn warms up
                        name = what if what == "decode" else f"{what} of {count}"
                        note(f"{name}, tokens/s", kind, rate)
        for kind, contender in racing.items():
            note("peak memory, bytes", kind, contender.ask("peak"))
            note("held memory, bytes", kind, contender.ask("held"))
            contender.close()
    return {
        figure: {kind: statistics.median(values) for kind, values in row.items()} for figure, row in figures.items()
    }


# --- the whole comparison --------------------------------------------------------------------------------------------


def compare(shape: str, work: Path, threads: int, rounds: int, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Exports and races every pair; what is in the work folder already is taken from there."""
    dimensions = SHAPES[shape]
    report: dict[str, Any] = {"checkpoints": {}, "exports": {}, "runs": {}}
    for pair in pairs:
        student, floating = work / f"student-{pair.head}", work / f"floating-{pair.head}"
        if not student.exists():
            # In a process of its own: the peak that is counted of a new one begins at what this one holds.
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                pool.submit(write_checkpoints, shape, pair.head, student, floating).result()
        packed = (student / "model.safetensors").stat().st_size
        size = sum(path.stat().st_size for path in floating.glob("*.safetensors"))
        report["checkpoints"][pair.head] = {"packed_bytes": packed, "float16_bytes": size}
        ours = work / f"ours-{pair.head}-{pair.tables}"
        peer = work / f"peer-{pair.head}-{pair.accuracy_level}"
        command = [sys.executable, "-m", "tools.bench_genai", "--export", str(student), str(ours), pair.tables]
        exports = report["exports"].setdefault(f"{pair.head} head", {})
        exports.setdefault("ours", recorded(command, ours))
        exports.setdefault("peer", recorded(export_peer(floating, peer, pair), peer))
        report["runs"][pair.title] = race(ours, peer, pair, dimensions.vocabulary, threads, rounds)
    return report


def print_report(report: Mapping[str, Any]) -> None:
    """Figures of both and their ratio, above 1 where ours is the better one."""
    table = Table("run", "figure", "ours", "GenAI", "times as good")
    for title, row in {**report["exports"], **report["runs"]}.items():
        figures = row
        if "ours" in row:
            figures = {key: {kind: export[key] for kind, export in row.items()} for key in row["ours"]}
        for figure, values in figures.items():
            mine, other = values["ours"], values["peer"]
            ratio = mine / other if figure.endswith("tokens/s") else other / mine
            table.add_row(title, figure, f"{mine:,.5g}", f"{other:,.5g}", f"{ratio:.2f}")
    Console(width=120).print(table)


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Sizes and speed against ONNX Runtime GenAI.")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of each runtime (every core)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pairs", type=int, nargs="+", default=range(len(PAIRS)), help="which of the comparisons")
    parser.add_argument("--work", type=Path, help="keeps checkpoints and exports there, and takes what is there")
    parser.add_argument("--output", type=Path, default=MEASUREMENTS)
    parser.add_argument("--export", nargs=3, metavar=("STUDENT", "OUT", "TABLES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export is not None:
        student, output, tables = options.export
        export_ours(Path(student), Path(output), tables)
        return
    with tempfile.TemporaryDirectory(prefix="genai-") as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        pairs = [PAIRS[i] for i in options.pairs]
        report = compare(options.shape, work, options.threads, options.rounds, pairs)
    chosen = "" if len(pairs) == len(PAIRS) else f" --pairs {' '.join(map(str, options.pairs))}"
    report = {
        "command": f"python -m tools.bench_genai --shape {options.shape} --threads {options.threads} "
        f"--rounds {options.rounds}{chosen}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{cpu_model()}, {usable_cores()} cores, Python {platform.python_version()}",
        "versions": {name: metadata.version(name) for name in VERSIONS},
        **report,
    }
    print_report(report)
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
