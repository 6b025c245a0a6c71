"""Device profiles: one flat, complete file per device, and the loader. Standard library only."""

from device_profiles.listing import profile_rows
from device_profiles.loader import list_profiles, load_profile, load_profile_file
from device_profiles.schema import COMPONENTS, Profile, ProfileError

__all__ = [
    "COMPONENTS",
    "Profile",
    "ProfileError",
    "list_profiles",
    "load_profile",
    "load_profile_file",
    "profile_rows",
]
