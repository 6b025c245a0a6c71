"""The profiles as rows of a table, for `--list-profiles` and `python -m device_profiles --list`."""

from __future__ import annotations

from device_profiles.loader import list_profiles, load_profile
from device_profiles.schema import Profile


def _amount(profile: Profile, key: str, unit: float, name: str) -> str:
    value = getattr(profile, key)
    return profile.state(key) if value is None else f"{value / unit:.1f} {name}"


def profile_rows() -> list[dict[str, str]]:
    """One row per profile: name, title, os, memory, bandwidth, backends. What nobody knows reads `unknown`."""
    return [
        {
            "name": profile.name,
            "title": profile.title,
            "os": profile.os,
            "memory": _amount(profile, "memory_bytes", 2**30, "GiB"),
            "bandwidth": _amount(profile, "bandwidth_bytes_per_s", 1e9, "GB/s"),
            "backends": ", ".join(profile.backends),
        }
        for profile in map(load_profile, list_profiles())
    ]
