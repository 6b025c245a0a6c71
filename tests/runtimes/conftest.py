"""Settings that the property tests of this folder share."""

from __future__ import annotations

from hypothesis import settings

# A property is about values; how long one example takes on a busy machine says nothing.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
