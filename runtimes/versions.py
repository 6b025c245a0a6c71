"""The runtime that an artifact was made for against the one that is installed. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from runtimes.errors import Fault


class WrongRuntime(Fault):
    """The installed runtime is newer or older than the one that the artifact was made for and proven with."""


def check_runtime(needed: Mapping[str, str], where: str) -> None:
    """Holds the installed distributions against the releases that an artifact names.

    Args:
        needed: distribution -> release; "2026.4" takes 2026.4.0 and 2026.4.1, "0.27.0.post1" that version alone.

    Raises:
        WrongRuntime: naming both versions.
        ModuleNotFoundError: a distribution is not installed.
    """
    for name, release in needed.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError as error:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name) from error
        if not _begins(version, release):
            raise WrongRuntime(
                f"needs {name} {release}, installed is {version}",
                where,
                f"Install it: pip install '{name}=={_pattern(release)}', or build the bundle again with {version}",
            )


def _begins(version: str, release: str) -> bool:
    # A local part, as in 2026.4.1+cpu, is the same release.
    parts, wanted = version.split("+")[0].split("."), release.split(".")
    return parts[: len(wanted)] == wanted


def _pattern(release: str) -> str:
    """What pip takes for the release: "2026.4.*" for one that leaves the last part open."""
    return f"{release}.*" if release.count(".") == 1 else release
