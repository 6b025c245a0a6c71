"""The layer rule: device_profiles <- runtimes <- exporters <- tools, tests, and what may load where."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("device_profiles", "runtimes", "exporters", "tools", "tests")
# Loaded only inside the functions that use them, on the device side.
HEAVY = {
    *("torch", "torchaudio", "torchvision", "transformers", "diffusers", "compressed_tensors", "pydantic"),
    *("onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "nncf", "tvm", "tvm_ffi", "coremltools"),
    *("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "mlperf_loadgen", "cryptography"),
}
# What the base install has beside the standard library.
BASE = {"numpy", "PIL", "rich", "safetensors", "tokenizers"}
# Of runtimes: standard library alone, so that a bundle can be checked anywhere.
STANDARD = ("archive", "bundle", "errors", "files", "manifest", "manifest_json", "publish", "strict_json")
# What exporters may take of runtimes. errors holds the base of every typed error; metrics is numpy alone, and a noise
# floor must be measured by the very metric that a gate judges.
SHARED = {"runtimes.bundle", "runtimes.errors", "runtimes.metrics"}
# The command line also measures.
BUILD_TOO = {"runtimes.parity", "runtimes.bench", "runtimes.report"}
# Part of the device's own system (JetPack), in the version that its engines need.
WITH_THE_DEVICE = {"tensorrt"}
# Of tools/library_weights.py, which runs where these are installed: they ask for other versions than constraints.txt.
ELSEWHERE = {"auto_round_extension", "awq", "gptqmodel"}
BACKENDS = ("onnx_", "onnxruntime_", "openvino_", "tensorrt_", "coreml_", "tvm_", "torch_")


@dataclass(frozen=True)
class Import:
    """One imported module: dotted name, the file, the line, and whether importing the file loads it."""

    module: str
    file: Path
    line: int
    at_load: bool

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


def _is_typing_only(node: ast.If) -> bool:
    return "TYPE_CHECKING" in ast.unparse(node.test)


def _walk(node: ast.AST, at_load: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, at_load
        elif isinstance(child, ast.If) and _is_typing_only(child):
            continue
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _walk(child, at_load and not inside)


def imports_of(file: Path) -> list[Import]:
    found = []
    for node, at_load in _walk(ast.parse(file.read_text()), True):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{file}:{node.lineno}: a relative import hides the layer"
            modules = [
                f"{node.module}.{alias.name}" if node.module in LAYERS else str(node.module) for alias in node.names
            ]
        found += [Import(module, file, node.lineno, at_load) for module in modules]
    return found


def sources(package: str) -> list[Path]:
    return sorted(
        path for path in (ROOT / package).rglob("*.py") if "package" not in path.relative_to(ROOT).parts[2:-1]
    )


def all_imports(package: str) -> list[Import]:
    return [item for file in sources(package) for item in imports_of(file)]


@pytest.mark.parametrize("package", LAYERS)
def test_imports_run_one_way(package: str) -> None:
    later = LAYERS[LAYERS.index(package) + 1 :]
    assert [str(item) for item in all_imports(package) if item.top in later] == []


def test_exporters_take_bundles_alone() -> None:
    wrong = []
    for item in all_imports("exporters"):
        allowed = SHARED | (BUILD_TOO if item.file.name == "build.py" else set())
        if item.top == "runtimes" and not any(
            item.module == name or item.module.startswith(name + ".") for name in allowed
        ):
            wrong.append(str(item))
    assert wrong == []


@pytest.mark.parametrize("package", ["device_profiles", "runtimes"])
def test_heavy_packages_load_inside_functions(package: str) -> None:
    files_apart = {ROOT / "runtimes" / "torch_.py"}
    loaded = [item for item in all_imports(package) if item.at_load and item.top in HEAVY]
    assert [str(item) for item in loaded if item.file not in files_apart] == []


def test_device_profiles_and_bundles_need_the_standard_library_alone() -> None:
    items = all_imports("device_profiles")
    items += [item for name in STANDARD for item in imports_of(ROOT / "runtimes" / f"{name}.py")]
    foreign = [item for item in items if item.top not in {*sys.stdlib_module_names, "device_profiles", "runtimes"}]
    assert [str(item) for item in foreign] == []
    inside = [item for item in items if item.top == "runtimes" and item.module.split(".")[1] not in STANDARD]
    assert [str(item) for item in inside] == []


def test_runtimes_load_nothing_beyond_the_base_install() -> None:
    allowed = {*sys.stdlib_module_names, *BASE, "device_profiles", "runtimes"}
    items = [item for item in all_imports("runtimes") if item.at_load and item.file.name != "torch_.py"]
    assert [str(item) for item in items if item.top not in allowed] == []


@pytest.mark.parametrize("package", ["runtimes", "exporters"])
def test_backends_never_import_each_other(package: str) -> None:
    wrong = []
    for item in all_imports(package):
        other = item.module.removeprefix(f"{package}.").split(".")[0]
        if item.file.stem in BACKENDS and item.top == package and other in BACKENDS and other != item.file.stem:
            wrong.append(str(item))
    assert wrong == []


def test_kernels_hold_device_sources_only() -> None:
    assert list((ROOT / "kernels").rglob("*.py")) == []


def test_setup_names_every_package() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text())
    named = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PACKAGES"
    )
    there = [
        ".".join(file.parent.relative_to(ROOT).parts)
        for layer in LAYERS
        if layer != "tests"
        for file in (ROOT / layer).rglob("__init__.py")
    ]
    assert sorted(named) == sorted(there)


def test_setup_requires_everything_that_is_imported() -> None:
    strings = {
        node.value for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Constant)
    }
    required = {text.lower().replace("_", "-") for text in strings if isinstance(text, str)}
    # Extras need not be installed where the tests run, so their distributions are named here.
    distributions = {
        **packages_distributions(),
        "mlperf_loadgen": ["mlcommons-loadgen"],
        "tensorrt_rtx": ["tensorrt-rtx"],  # the distribution that brings the others
        "tvm": ["apache-tvm"],
    }
    missing = set()
    for item in (item for package in LAYERS for item in all_imports(package)):
        if item.top not in sys.stdlib_module_names and item.top not in {*LAYERS, *WITH_THE_DEVICE, *ELSEWHERE}:
            names = {name.lower().replace("_", "-") for name in distributions.get(item.top, [item.top])}
            if not names & required:
                missing.add(str(item))
    assert sorted(missing) == []


BLOCKER = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ImportError(name + " is not on a device")

sys.meta_path.insert(0, Blocker())
for module in {modules!r}:
    importlib.import_module(module)
loaded = sorted({heavy!r} & {{name.split(".")[0] for name in sys.modules}})
assert not loaded, loaded
print("imported", len({modules!r}))
"""


@pytest.mark.parametrize("package", ["device_profiles", "runtimes"])
def test_the_device_side_imports_without_heavy_packages(package: str) -> None:
    files = [file for file in sources(package) if file.stem not in ("torch_", "__main__", "__init__")]
    modules = [package, *(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files)]
    script = BLOCKER.format(heavy=HEAVY, modules=modules)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"imported {len(modules)}"
