"""The error catalogue, exporters/ERRORS.md: what is printed for every input that the tests see refused.

    python -m tools.error_catalogue [--check]

Nothing in it is written by hand: the tests that catch our errors (tests/refusals.py) are run, and each error that they
provoke is one line, with its class, what is wrong, where, and the way out. What differs from machine to machine (the
folder of a test, versions, numbers of processes, hashes) is replaced.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parent.parent
CATALOGUE = ROOT / "exporters" / "ERRORS.md"
#: Layers whose classes of errors are listed, and the bases of those classes.
LAYERS = ("device_profiles", "runtimes", "exporters")
BASES = frozenset({"ExportError", "Fault", "ProfileError"})
_LONGEST = 400
#: What a test file imports that catches errors for the catalogue.
_CATCHING = re.compile(r"^from tests\.(refusals|malformed\.packages) import", re.MULTILINE)
_GIVEN = 100
#: What is not the same on every machine, or at every time -> what stands for it
_VARYING: tuple[tuple[str, str], ...] = (
    (r"/\S*?pytest-of-[^/\s]+/pytest-\d+/(popen-gw\d+/)?[^/\s'\":;,)]+/?", ""),
    (r"/tmp/\w+/?", ""),
    (re.escape(f"{ROOT}/"), ""),
    (re.escape(sys.prefix), "<venv>"),
    (r"\b(?=\d*[a-f])[0-9a-f]{16,}\b", "<hash>"),
    (r"\b0x[0-9a-f]{6,}\b", "<address>"),
    (r"\bprocess \d+", "process <number>"),
    (r"\b\d+\.\d+\.\d+[.\w+-]*", "<version>"),
    (r"\b\d[\d,]* bytes are free", "<number> bytes are free"),
)


@dataclass(frozen=True)
class Refusal:
    """One error that a test provoked.

    Attributes:
        test: its id, "tests/malformed/test_x.py::test_y[case]".
        error: name of the class.
        what, where, way_out: of the error, with what varies replaced.
    """

    test: str
    error: str
    what: str
    where: str
    way_out: str

    @property
    def function(self) -> str:
        """The test without its case."""
        return self.test.partition("[")[0]

    @property
    def area(self) -> str:
        """Of its file: "tests/malformed/test_config_inputs.py" -> "Config inputs"."""
        return Path(self.test.partition("::")[0]).stem.removeprefix("test_").replace("_", " ").capitalize()

    @property
    def given(self) -> str:
        """The test's name in words, and its case."""
        name, bracket, case = self.test.partition("::")[2].partition("[")
        words = name.removeprefix("test_").replace("_", " ")
        return _cell(f"{words}: {case[:-1]}" if bracket else words, _GIVEN)

    @property
    def row(self) -> str:
        """The line of the catalogue."""
        return f"| {self.given} | {self.error} | {_cell(self.where)} | {_cell(self.what)} | {_cell(self.way_out)} |"


def refusal(test: str, error: Exception) -> Refusal:
    """Of an error with the three parts that all of ours have."""
    parts = (steady(str(getattr(error, part))) for part in ("what", "where", "way_out"))
    return Refusal(test, type(error).__name__, *parts)


def steady(text: str) -> str:
    """``text`` without what is not the same on every machine."""
    found = text
    for pattern, stands in _VARYING:
        found = re.sub(pattern, stands, found)
    return found or (text and "<folder>")


def _cell(text: str, longest: int = _LONGEST) -> str:
    """``text`` on one line, as a table takes it."""
    text = "".join(sign if sign.isprintable() else " " for sign in text)
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return re.sub(r"([|<>*_`\\])", r"\\\1", re.sub(r"\s+", " ", text).strip())


def classes() -> Mapping[str, str]:
    """ "module.Class" of every typed error -> the first line of its docstring."""
    found: dict[str, str] = {}
    defined = [
        (path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."), node)
        for layer in LAYERS
        for path in sorted((ROOT / layer).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    known = set(BASES)
    for _ in defined:  # until bases of bases are found
        names = {node.name for _, node in defined if known & {ast.unparse(base) for base in node.bases}}
        if names <= known:
            break
        known |= names
    for module, node in defined:
        if node.name in known:
            found[f"{module}.{node.name}"] = (ast.get_docstring(node) or "").partition("\n")[0]
    return found


def markdown(refusals: Iterable[Refusal]) -> str:
    """The whole catalogue."""
    each = sorted(set(refusals), key=lambda one: (one.area, one.test, one.row))
    lines = [
        "# What is refused, and what is printed",
        "",
        "Made by `python -m tools.error_catalogue` from what the tests provoke; do not edit. An error prints "
        "`WHERE: WHAT. WAY OUT`, and the command ends with a code other than 0. Folders, versions and hashes are left "
        "out.",
    ]
    for area, group in groupby(each, lambda one: one.area):
        lines += ["", f"## {area}", "", "| given | error | where | what | way out |", "| --- | --- | --- | --- | --- |"]
        said: set[tuple[str, ...]] = set()
        for _, case in groupby(group, lambda one: one.test):
            found = list(case)
            new = {(one.function, one.error, one.what, one.way_out) for one in found} - said
            if new:  # of cases of a test that print the same, wherever it is, the first stands for all
                lines += [one.row for one in found]
                said |= new
    counts = Counter(one.error for one in each)
    lines += ["", "## Classes of errors", "", "| class | meaning | cases above |", "| --- | --- | --- |"]
    for name, meaning in classes().items():
        count = counts[name.rpartition(".")[2]]
        lines.append(f"| {_cell(name)} | {_cell(meaning)} | {count or 'none'} |")
    return "\n".join(lines) + "\n"


def collect() -> list[Refusal]:
    """Runs the tests that catch our errors. Raises CalledProcessError where one fails."""
    tests = ROOT / "tests" / "malformed"
    files = [str(path) for path in sorted(tests.glob("test_*.py")) if _CATCHING.search(path.read_text("utf-8"))]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "refusals.json"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not long", "--refusals", str(out), *files]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        return [Refusal(**entry) for entry in json.loads(out.read_text("utf-8"))]


def write_refusals(path: Path, refusals: Iterable[Refusal]) -> None:
    """What `collect` reads."""
    path.write_text(json.dumps([asdict(one) for one in refusals]), "utf-8")


def main() -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Write the error catalogue from what the tests provoke.")
    parser.add_argument("--check", action="store_true", help="only say whether it is what it would be")
    check = parser.parse_args().check
    new = markdown(collect())
    if check:
        return int(CATALOGUE.read_text("utf-8") != new)
    CATALOGUE.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
