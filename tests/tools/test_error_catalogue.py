"""The error catalogue: what it is made of.

Each test that catches an error of ours also compares it with the catalogue's line (tests/refusals.py).
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator

from tools.error_catalogue import BASES, CATALOGUE, LAYERS, ROOT, Refusal, classes, markdown, refusal, steady


def _raised() -> Iterator[tuple[str, ast.Call]]:
    """Where an error of ours is made by what, where and the way out: not those with a constructor of their own."""
    named = {name.rpartition(".")[2] for name in classes()}
    for path in (path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))):
        tree = ast.parse(path.read_text("utf-8"))
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and _constructs(node)} - BASES
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in named - own:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def _constructs(node: ast.ClassDef) -> bool:
    return any(isinstance(item, ast.FunctionDef) and item.name == "__init__" for item in node.body)


def test_every_error_names_its_place_and_a_way_out() -> None:
    found = list(_raised())
    assert len(found) > 300
    without = [
        f"{place}: {part}"
        for place, call in found
        for at, part in ((2, "where"), (3, "way_out"))
        if len(call.args) < at and part not in {keyword.arg for keyword in call.keywords}
        and not any(keyword.arg is None for keyword in call.keywords)
    ]  # fmt: skip
    assert without == []


def test_the_catalogue_lists_every_class() -> None:
    from exporters import errors

    text = CATALOGUE.read_text("utf-8")
    listed = text[text.index("## Classes of errors") :].replace("\\", "")
    assert all(f"| {name} |" in listed for name in classes())
    ours = {f"exporters.errors.{name}" for name, value in vars(errors).items() if inspect.isclass(value)}
    assert ours <= set(classes()) and {"runtimes.session.KvOverflow", "runtimes.errors.Fault"} <= set(classes())


def test_every_line_says_all_of_it() -> None:
    text = CATALOGUE.read_text("utf-8")
    lines = [line for line in text[: text.index("## Classes of errors")].splitlines() if line.startswith("| ")]
    rows = [line.replace("\\|", "¦").strip("| ").split(" | ") for line in lines]
    assert len(rows) > 300 and all(len(row) == 5 and all(row) for row in rows)


def test_what_varies_is_left_out() -> None:
    text = "/tmp/pytest-of-root/pytest-7/popen-gw1/test_x0/a/b.json, process 71, version 1.24.3, 0123456789abcdef01"
    assert steady(text) == "a/b.json, process <number>, version <version>, <hash>"


def test_a_line() -> None:
    from exporters.errors import ConfigError

    error = ConfigError("holds 'a|b'", where="x.json", way_out="Correct\nit")
    found = refusal("tests/malformed/test_x.py::test_a_thing[one]", error)
    assert found.row == "| a thing: one | ConfigError | x.json | holds 'a\\|b' | Correct it |"
    again = Refusal("tests/malformed/test_x.py::test_a_thing[two]", *(getattr(found, part) for part in _PARTS))
    assert markdown([found, again]).count("ConfigError | x.json") == 1


_PARTS = ("error", "what", "where", "way_out")
