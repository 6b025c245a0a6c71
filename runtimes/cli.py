"""What the commands of the device side share: arguments, opening a bundle, and how an error ends a command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from runtimes.bundle import Bundle, load_bundle
from runtimes.errors import Fault
from runtimes.manifest import MODES
from runtimes.signing import TRUST_VARIABLE, open_signed, trust_place


def bundle_parser(name: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser with the arguments that every command has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m runtimes.{name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that exporters.build made")
    parser.add_argument(
        "--backend", metavar="NAME", help="use the artifacts of this backend (default: the preferred ones)"
    )
    parser.add_argument("--mode", choices=MODES, help="numeric mode (default: the preferred one)")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads (default: the backend's choice)")
    trust = f"take bundles signed by this key alone, or by one of the *.pub in a folder (default: ${TRUST_VARIABLE})"
    parser.add_argument("--trust", type=Path, metavar="KEY.pub", help=trust)
    return parser


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def open_bundle(path: Path, trust: Path | None = None) -> Bundle:
    """Loads a bundle and checks every file against its hash, before any of them is read by a native library.

    Where `trust` or the environment names public keys, a signature by one of them is asked for before all else.
    """
    place = trust_place(trust)
    bundle = load_bundle(path) if place is None else open_signed(path, place)[0]
    bundle.verify()
    return bundle


def exit_code(command: Callable[[], int]) -> int:
    """Runs a command: an expected error becomes one line and exit status 2, an interrupt 130."""
    try:
        return command()
    except Fault as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away (`| head`); closing stdout again at exit must not raise a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
