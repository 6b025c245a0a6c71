"""What a refusal of a module says."""

from __future__ import annotations

from exporters.errors import ExportError
from exporters.families.language_models import FAMILIES

#: The way out of every refusal of a module.
SUPPORTED = (
    f"Supported by name: {', '.join(FAMILIES)}; others by the same modules: Linear, norms, RoPE or learned "
    "rows by position, causal attention with or without a window, experts with a gate."
)


class UnsupportedModule(ExportError):
    """A module of the model is not one that can be exported faithfully."""
