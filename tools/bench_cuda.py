"""Every CUDA kernel on this machine's GPU: compiled, checked against float64, timed beside torch and a plain copy.

    python -m tools.bench_cuda [--only TEXT] [--rounds N] [--output FILE]

PTX comes from nvcc, or NVRTC for a driver of CUDA 12, and is launched as it ships: by the driver, with the launches of
plan.h. A contender's calls form one CUDA graph, each on its own copy of the arrays, and the copies are larger than the
L2, so what is timed is memory, not launches and not the cache. In every round each contender's graph runs once; times
are medians over the rounds. Results must be within their limits before anything is timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from exporters import cuda_kernels
from exporters.errors import ExportError
from tools.bench_cuda_cases import Case, relative_error
from tools.bench_cuda_table import BENCH
from tools.bench_cuda_torch import COMPARISONS
from tools.cuda_driver import CudaError, Module, NoCuda
from tools.cuda_kernels import Launch, Plans, build_plans

#: Copies of a case's arrays fill the L2 so many times, up to so many bytes and copies.
L2_TIMES, MOST_BYTES, MOST_COPIES = 3, 4 << 30, 200
COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class Row:
    """One case's result; seconds are of one call, None where a contender cannot do it."""

    name: str
    kernels: tuple[str, ...]
    share_of_limit: float
    relative_error: float
    seconds: float
    bytes_per_second: float
    share_of_copy: float
    torch_seconds: dict[str, float | None]
    times_faster: dict[str, float | None]
    notes: dict[str, str]


def gpu() -> Any:
    """torch, with a CUDA device.

    Raises:
        NoCuda: torch is missing or has no device.
    """
    try:
        import torch
    except ImportError as error:
        raise NoCuda(f"the benchmark takes torch with CUDA, and there is none ({error})") from None
    if not torch.cuda.is_available():
        raise NoCuda(f"torch {torch.__version__} sees no CUDA device on this machine")
    torch.cuda.init()
    torch.zeros(1, device="cuda")  # makes the context that the driver's calls go to
    return torch


def compile_for(torch: Any) -> tuple[Module, str]:
    """All kernels for the device, by the newest compiler that is here and that its driver takes; and which it was."""
    major, minor = torch.cuda.get_device_capability()
    refused: list[str] = []
    for version in ("13.0", "12.6"):
        try:
            return Module(cuda_kernels.compile_ptx(f"sm_{major}{minor}", version)), f"CUDA {version}"
        except (ExportError, CudaError) as error:
            refused.append(str(error))
    raise NoCuda("; ".join(refused))


class Bench:
    """The device, the kernels on it and how long its memory takes."""

    def __init__(self, folder: Path) -> None:
        self.torch = gpu()
        self.module, self.compiler = compile_for(self.torch)
        self.plans = Plans(build_plans(folder / "plans.so"))
        self.properties = self.torch.cuda.get_device_properties(0)
        self.copy_rate = self._copy_rate()

    def launches(self, case: Case) -> list[Launch]:
        name, fields = case.plan
        launches = self.plans(name, *fields, self.properties.multi_processor_count)
        if not launches:
            raise CudaError(f"{case.name}: no plan")
        return launches

    def on_device(self, case: Case) -> list[Any]:
        """The arguments, with arrays as tensors of the device."""
        arguments = [self.torch.from_numpy(a).cuda() if isinstance(a, np.ndarray) else a for a in case.arguments]
        for position, output in case.aliases.items():
            arguments[position] = arguments[output]
        return arguments

    def call(self, launches: Sequence[Launch], arguments: Sequence[Any]) -> None:
        stream = self.torch.cuda.current_stream().cuda_stream
        for launch in launches:
            self.module.launch(launch, arguments, stream)

    def check(self, case: Case, launches: Sequence[Launch]) -> tuple[float, float]:
        """(share of the limit, relative error) of the worst output.

        Raises:
            AssertionError: an output is further off than its limit.
        """
        arguments = self.on_device(case)
        self.call(launches, arguments)
        found = [a.cpu().numpy() if self.torch.is_tensor(a) else a for a in arguments]
        errors = [
            relative_error(found[i].astype(np.float64), e.value) for i, e in case.outputs.items() if e.limit is not None
        ]
        return case.check(found), max(errors, default=0.0)

    def copies(self, nbytes: int) -> int:
        """How many copies of so many bytes are more than the L2 holds."""
        wanted = math.ceil(L2_TIMES * self.properties.L2_cache_size / max(nbytes, 1))
        return max(2, min(wanted, MOST_COPIES, MOST_BYTES // max(nbytes, 1)))

    def graph(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], float]:
        """Runs the calls as one graph; returns what gives the seconds of one call."""
        torch = self.torch
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # libraries make their workspaces before the capture
            for call in calls[:2]:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()

        def timed() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000 / len(calls)

        return timed

    def _copy_rate(self) -> float:
        size = min(COPY_BYTES, self.properties.total_memory // 8)
        source = self.torch.ones(size // 4, device="cuda")
        target = self.torch.empty_like(source)
        timed = self.graph([lambda: target.copy_(source)] * 4)
        return 2 * size / statistics.median(timed() for _ in range(9))

    def row(self, case: Case, rounds: int) -> Row:
        """Checks and times a case."""
        launches = self.launches(case)
        share, error = self.check(case, launches)
        held = [self.on_device(case) for _ in range(self.copies(case.bytes))]
        timers = {"ours": self.graph([lambda a=a: self.call(launches, a) for a in held])}
        notes: dict[str, str] = {}
        for name, calls in self._torch(case, notes):
            timers[name] = self.graph(calls)
        times: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(rounds):
            for name, timed in timers.items():
                times[name].append(timed())
        seconds = {name: statistics.median(values) for name, values in times.items()}
        ours = seconds.pop("ours")
        theirs = {name: seconds.get(name) for name in (*seconds, *notes)}
        return Row(
            case.name,
            tuple(launch.name for launch in launches),
            share,
            error,
            ours,
            case.bytes / ours,
            case.bytes / ours / self.copy_rate,
            theirs,
            {name: value and value / ours for name, value in theirs.items()},
            notes,
        )

    def _torch(self, case: Case, notes: dict[str, str]) -> Iterator[tuple[str, list[Callable[[], Any]]]]:
        """torch's own ways to do it, each on as many copies as its bytes ask for; notes tell why one cannot."""
        if case.torch is None:
            return
        kind, sizes = case.torch
        for name, comparison in COMPARISONS[kind].items():
            try:
                nbytes = comparison.bytes(*sizes)
                calls = [comparison.make(self.torch, *sizes) for _ in range(self.copies(nbytes))]
                calls[0]()
                self.torch.cuda.synchronize()
            except (RuntimeError, NotImplementedError, AttributeError) as error:
                notes[name] = str(error).splitlines()[0][:200]
                continue
            yield name, calls


def table(rows: Sequence[Row], copy_rate: float) -> Table:
    """The rows for people."""
    result = Table(title=f"copy: {copy_rate / 1e9:.0f} GB/s")
    for heading in ("case", "error / limit", "relative error", "us", "GB/s", "of copy", "torch: times as long"):
        result.add_column(heading, justify="left" if heading in ("case", "torch: times as long") else "right")
    for row in rows:
        others = ", ".join(f"{name} {value:.2f}" for name, value in row.times_faster.items() if value)
        result.add_row(
            row.name,
            f"{row.share_of_limit:.2f}",
            f"{row.relative_error:.1e}",
            f"{row.seconds * 1e6:.1f}",
            f"{row.bytes_per_second / 1e9:.0f}",
            f"{row.share_of_copy:.0%}",
            others,
        )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where there is no GPU or a kernel is wrong, with one sentence on standard error."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench_cuda", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    request = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder))
            rows = []
            for entry in BENCH:
                case = entry.full()
                if request.only in case.name:
                    rows.append(bench.row(case, request.rounds))
                    bench.torch.cuda.empty_cache()
    except NoCuda as error:
        print(f"No CUDA kernel can run: {error}.", file=sys.stderr)
        return 1
    except (CudaError, AssertionError) as error:
        print(f"A CUDA kernel is wrong: {error}.", file=sys.stderr)
        return 1
    Console(width=200).print(table(rows, bench.copy_rate))
    if request.output:
        report = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "gpu": bench.properties.name,
            "sm": f"sm_{bench.properties.major}{bench.properties.minor}",
            "driver": bench.module.driver_version(),
            "torch": bench.torch.__version__,
            "compiler": bench.compiler,
            "command": "python -m tools.bench_cuda " + " ".join(arguments if arguments is not None else sys.argv[1:]),
            "copy_bytes_per_second": bench.copy_rate,
            "rows": [asdict(row) for row in rows],
        }
        request.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
