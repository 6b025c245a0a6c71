"""What a refusal of a module says."""

from __future__ import annotations

from exporters.errors import ExportError

#: The way out of every refusal of a module.
SUPPORTED = (
    "Supported: decoders of Linear, RMSNorm, table RoPE and causal attention, as in Llama, Qwen2, Qwen3, Mistral."
)


class UnsupportedModule(ExportError):
    """A module of the model is not one that can be exported faithfully."""
