"""Builds the C++ kernels (kernels/cpu, kernels/tvm) for one target and keeps the object files for the next build."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tvm
import tvm_ffi

from exporters.errors import ExportError
from exporters.kernel_cache import cache_folder
from exporters.tvm_targets import CpuTarget

ROOT = Path(__file__).parent.parent / "kernels"
#: The arithmetic is IEEE's own: no -ffast-math, contraction to fused multiply-add is the one freedom.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast")
#: The program that runs a bundle without Python, beside the artifacts.
PROGRAM = ROOT / "tvm" / "program" / "run_bundle.cpp"


class CompilerError(ExportError):
    """The C++ compiler is missing or refuses the kernels."""


def include_flags() -> tuple[str, ...]:
    """Headers of TVM's runtime and of its foreign function interface, both from the installed wheels."""
    folders = (tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path())
    return tuple(f"-isystem{folder}" for folder in (*folders, Path(tvm.__file__).parent / "include"))


def kernel_objects(target: CpuTarget) -> list[Path]:
    """Object files of every kernel for a target, compiled where none are kept.

    Raises:
        CompilerError: naming the compiler.
    """
    sources = sorted(path for part in ("cpu", "tvm") for path in (ROOT / part).glob("*.cpp"))
    if not sources:
        raise CompilerError(
            "holds no sources", where=str(ROOT), way_out="Build from a checkout of the project, which has them."
        )
    folder = cache_folder() / _key(target)
    objects = [folder / f"{path.parent.name}-{path.stem}.o" for path in sources]
    if not all(path.exists() for path in objects):
        _compile(target, sources, objects, folder)
    return objects


def build_program(target: CpuTarget, path: Path) -> None:
    """Builds the program for a target. The device brings TVM's libraries, so that stubs of them do for the linker."""
    kept = cache_folder() / _key(target) / path.name
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            _link_program(target, Path(scratch), Path(scratch) / path.name)
            os.replace(Path(scratch) / path.name, kept)
    shutil.copy(kept, path)


def _link_program(target: CpuTarget, folder: Path, path: Path) -> None:
    code = folder / "program.o"
    run_compiler(target.compiler, ["-O2", "-std=c++17", *include_flags(), "-c", str(PROGRAM), "-o", str(code)])
    listed = run_compiler(f"{target.compiler.removesuffix('g++')}nm", ["--undefined-only", "--format=posix", str(code)])
    symbols = [line.split()[0] for line in listed.splitlines() if "tvm" in line.lower()]
    stub = folder / "stub.s"
    for library, held in (("libtvm_runtime.so", []), ("libtvm_ffi.so", symbols)):
        stub.write_text("".join(f".globl {symbol}\n{symbol}:\n" for symbol in held))
        soname = ["-shared", "-nostdlib", f"-Wl,-soname,{library}"]
        run_compiler(target.compiler, [*soname, str(stub), "-o", str(folder / library)])
    link = [str(code), f"-L{folder}", "-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi", "-s", "-o", str(path)]
    run_compiler(target.compiler, link)


def _compile(target: CpuTarget, sources: Sequence[Path], objects: Sequence[Path], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        flags = [*FLAGS, *target.variant.flags, *include_flags()]

        def compile_one(source: Path, kept: Path) -> None:
            run_compiler(target.compiler, [*flags, "-c", str(source), "-o", str(Path(scratch) / kept.name)])

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(compile_one, sources, objects))
        folder.mkdir(exist_ok=True)
        for kept in objects:
            os.replace(Path(scratch) / kept.name, kept)


def run_compiler(compiler: str, arguments: Sequence[str]) -> str:
    """What the compiler printed. Raises CompilerError."""
    if shutil.which(compiler) is None:
        raise CompilerError(
            "is not installed",
            where=f"C++ compiler {compiler}",
            way_out="Install it (tools/setup_system does where apt is there), or choose others with --backends.",
        )
    done = subprocess.run([compiler, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompilerError(
            f"ended with {done.returncode}: {done.stderr.strip()[-1500:]}",
            where=f"{compiler} {' '.join(arguments[-3:])}",
            way_out="Use g++ 12 or newer.",
        )
    return done.stdout


def _key(target: CpuTarget) -> str:
    """Changes with the sources, the flags, the compiler and TVM's headers."""
    digest = hashlib.sha256()
    parts = [*FLAGS, *target.variant.flags, run_compiler(target.compiler, ["--version"]), tvm.__version__]
    for text in (*parts, tvm_ffi.__version__):
        digest.update(text.encode() + b"\0")
    for path in sorted(path for part in ("cpu", "tvm") for path in (ROOT / part).rglob("*.[ch]*")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{target.variant.name}-{digest.hexdigest()[:24]}"
