"""The library of another processor under qemu-user: its own code and TVM's own runtime, called over pipes.

The bundle's C++ program (kernels/tvm/program) loads the artifact in the emulator and answers calls. Results are the
device's, as far as the emulator is faithful; times are nothing and are never reported.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.errors import Fault
from runtimes.session import Array, BackendUnavailable

if TYPE_CHECKING:
    from runtimes.bundle import Artifact, Bundle


class EmulatorFailed(Fault):
    """The program under the emulator ended or answered something else than the protocol's."""


@dataclass(frozen=True)
class Emulator:
    """qemu's command for an architecture, and the folder with that architecture's C library."""

    command: str
    system: str


EMULATORS: Mapping[str, Emulator] = {
    "aarch64": Emulator("qemu-aarch64", "/usr/aarch64-linux-gnu"),
    "x86_64": Emulator("qemu-x86_64", "/usr/x86_64-linux-gnu"),
}


def runtime_folder(arch: str) -> Path:
    """Where tools/foreign_runtime puts another architecture's libraries of TVM, beside this environment's packages."""
    return Path(sys.prefix) / f"{arch}-runtime"


def check_emulator(artifact: Artifact) -> tuple[Emulator, tuple[Path, ...]]:
    """The emulator and the folders of TVM's libraries for an artifact's architecture. Raises BackendUnavailable."""
    arch = artifact.options["arch"]
    where = f"{artifact.component} ({artifact.label})"
    emulator = EMULATORS.get(arch)
    if emulator is None or shutil.which(emulator.command) is None or not Path(emulator.system).is_dir():
        raise BackendUnavailable(
            f"is code for {arch}, and no emulator of it is here", where, f"Run it on {arch}, or install qemu-user"
        )
    versions = "-".join(artifact.runtime[name] for name in ("apache-tvm", "apache-tvm-ffi"))
    folders = tuple(runtime_folder(arch) / versions / package / "lib" for package in ("tvm", "tvm_ffi"))
    if not all(folder.is_dir() for folder in folders):
        raise BackendUnavailable(
            f"is code for {arch}, and TVM's {arch} libraries are not in {folders[0].parent.parent}",
            where,
            f"Run it on {arch}, or fetch them: tools/foreign_runtime",
        )
    return emulator, folders


class Emulated:
    """An artifact inside an emulator; the same calls as `runtimes.tvm_.Loaded`. The states live there."""

    def __init__(self, bundle: Bundle, artifact: Artifact) -> None:
        emulator, folders = check_emulator(artifact)
        if "observed" in artifact.options:
            raise BackendUnavailable("cannot be observed in an emulator", artifact.label, "Observe it on the device")
        self._where = f"{artifact.component} ({artifact.label})"
        self._states = {state.input for state in artifact.states}
        self._said = tempfile.TemporaryFile()  # noqa: SIM115, closed in `close`
        command = [emulator.command, "-L", emulator.system]
        if (model := artifact.options.get("cpu")) in _models(emulator):
            command += ["-cpu", model]
        command += ["-E", f"LD_LIBRARY_PATH={os.pathsep.join(map(str, folders))}", "-E", "TVM_NUM_THREADS=1"]
        command += [str(bundle.file(artifact.options["program"])), str(bundle.folder)]
        command += ["serve", artifact.component, artifact.mode]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, bufsize=1 << 16
        )
        self._number()  # ready
        self.effective = {"kernels": artifact.options["kernels"], "activations": artifact.precision["activations"]}
        self.stand_in: str | None = f"{artifact.options['arch']} under qemu-user {_version(emulator)}"

    def bind(self, function: str, feeds: Mapping[str, Array]) -> Callable[[], list[Array]]:
        """A callable without arguments: `function` on these very arrays, which the caller may change."""
        return lambda: self.call(function, feeds)

    def call(self, function: str, feeds: Mapping[str, Array]) -> list[Array]:
        """One call; the outputs without the states."""
        given = {name: values for name, values in feeds.items() if name not in self._states}
        parts = [_text(function), struct.pack("<I", len(given))]
        for name, values in given.items():
            sizes = struct.pack(f"<I{values.ndim}q", values.ndim, *values.shape)
            parts += [_text(name), _text(values.dtype.name), sizes, np.ascontiguousarray(values).tobytes()]
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(b"".join(parts))
            stdin.flush()
        except OSError as error:
            raise self._ended() from error
        if self._number():
            raise EmulatorFailed(self._word(), self._where, "Run the artifact on its own device")
        return [self._tensor() for _ in range(self._number())]

    def use_threads(self, count: int) -> None:
        """The emulator has one."""

    def close(self) -> None:
        """Ends the program."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()

    def _read(self, count: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(count)
        if len(data) != count:
            raise self._ended()
        return data

    def _number(self) -> int:
        return int.from_bytes(self._read(4), "little")

    def _word(self) -> str:
        return self._read(self._number()).decode(errors="replace")

    def _tensor(self) -> Array:
        self._word()  # results have no names
        dtype = np.dtype(self._word())
        rank = self._number()
        shape = struct.unpack(f"<{rank}q", self._read(8 * rank))
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return np.frombuffer(self._read(size), dtype).reshape(shape)

    def _ended(self) -> EmulatorFailed:
        code = self._process.wait(timeout=10)
        self._said.seek(0)
        said = self._said.read()[-1000:].decode(errors="replace").strip()
        return EmulatorFailed(f"the program ended with {code}: {said}", self._where, "Build the bundle again")


def _text(text: str) -> bytes:
    return struct.pack("<I", len(text.encode())) + text.encode()


def _ask(emulator: Emulator, *arguments: str) -> str:
    done: Any = subprocess.run([emulator.command, *arguments], capture_output=True, text=True, timeout=10, check=False)
    return str(done.stdout)


def _version(emulator: Emulator) -> str:
    """As in "7.2.22"."""
    return _ask(emulator, "--version").split("version ")[-1].split()[0]


def _models(emulator: Emulator) -> list[str]:
    return _ask(emulator, "-cpu", "help").split()
