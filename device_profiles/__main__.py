"""`python -m device_profiles`: lists the profiles, shows one, or prints the schema."""

from __future__ import annotations

import argparse
import json
import sys

from device_profiles import ProfileError, list_profiles, load_profile
from device_profiles.schema import schema_table


def rows() -> list[dict[str, str]]:
    """One row per profile for a table: name, title, os, memory, bandwidth, backends. Unknown values read `unknown`."""
    table = []
    for name in list_profiles():
        profile = load_profile(name)
        memory, bandwidth = profile.memory_bytes, profile.bandwidth_bytes_per_s
        table.append(
            {
                "name": name,
                "title": profile.title,
                "os": profile.os,
                "memory": f"{memory / 2**30:.1f} GiB" if memory else profile.state("memory_bytes"),
                "bandwidth": f"{bandwidth / 1e9:.1f} GB/s" if bandwidth else profile.state("bandwidth_bytes_per_s"),
                "backends": ", ".join(profile.backends),
            }
        )
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m device_profiles", description=__doc__)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--list", action="store_true", help="the profiles that there are")
    choice.add_argument("--show", metavar="NAME", help="one profile, every key, as JSON")
    choice.add_argument("--schema", action="store_true", help="the keys of a profile, as a Markdown table")
    given = parser.parse_args(arguments)
    try:
        if given.schema:
            print(schema_table())
        elif given.show is not None:
            print(json.dumps(load_profile(given.show).as_dict(), indent=1, ensure_ascii=False))
        else:
            for row in rows():
                print("  ".join((f"{row['name']:26}", f"{row['memory']:>10}", f"{row['bandwidth']:>14}", row["title"])))
    except ProfileError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
