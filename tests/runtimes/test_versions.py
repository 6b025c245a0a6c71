"""An artifact is refused by a runtime that is not the one it was made for."""

from __future__ import annotations

from importlib import metadata

import pytest

from runtimes.versions import WrongRuntime, check_runtime


def test_the_installed_release_is_taken() -> None:
    version = metadata.version("numpy")
    check_runtime({"numpy": version, "pillow": metadata.version("pillow").split(".")[0]}, "lm")
    check_runtime({"numpy": ".".join(version.split(".")[:2])}, "lm")
    check_runtime({}, "lm")


@pytest.mark.parametrize("release", ["0.1", "999.0", "2", "1.2.3.post4"])
def test_newer_and_older_are_refused_with_both_versions(release: str) -> None:
    version = metadata.version("numpy")
    if version.split(".")[0] == release:
        release += "9"
    with pytest.raises(WrongRuntime, match=rf"needs numpy {release}, installed is {version}.*pip install"):
        check_runtime({"numpy": release}, "lm (openvino/ir/exact)")


def test_a_number_that_only_begins_alike_is_another_release() -> None:
    major, minor = metadata.version("numpy").split(".")[:2]
    with pytest.raises(WrongRuntime):
        check_runtime({"numpy": f"{major}.{minor}9"}, "lm")


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ModuleNotFoundError) as caught:
        check_runtime({"no-such-runtime": "1.0"}, "lm")
    assert caught.value.name == "no-such-runtime"
