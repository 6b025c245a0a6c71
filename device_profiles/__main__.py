"""`python -m device_profiles`: lists the profiles, shows one, or prints the schema."""

from __future__ import annotations

import argparse
import json
import sys

from device_profiles import ProfileError, load_profile, profile_rows
from device_profiles.schema import schema_table


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
            for row in profile_rows():
                print("  ".join((f"{row['name']:26}", f"{row['memory']:>10}", f"{row['bandwidth']:>14}", row["title"])))
    except ProfileError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
