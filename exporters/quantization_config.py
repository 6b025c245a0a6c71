"""config.json's quantization_config -> a Scheme per module, by the format that it names; everything else is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporters.formats import METHODS
from exporters.formats.compressed_tensors import SUPPORTED
from exporters.formats.refused import OTHERWISE, REFUSED
from exporters.formats.scheme import Scheme, refuse

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint


def module_schemes(config: Any, modules: Mapping[str, tuple[str, ...]], stored: Checkpoint) -> dict[str, Scheme]:
    """The scheme of every quantised module.

    Args:
        config: the parsed quantization_config.
        modules: name -> class names (most derived first) of every Linear and Embedding of the model.
        stored: the checkpoint's tensors.
    """
    if not isinstance(config, dict):
        refuse(f"is {config!r:.80}, not an object", "", "Write the object that the quantising library writes")
    method = config.get("quant_method")
    if isinstance(method, str) and method in REFUSED:
        again = f"Quantise it again, or its float weights by the build (--quantise). Known: {', '.join(METHODS)}"
        refuse(f"quant_method {method!r} is not read: {REFUSED[method]}", ".quant_method", OTHERWISE.get(method, again))
    if not isinstance(method, str) or method not in METHODS:
        refuse(f"unsupported quant_method {method!r:.100}", "", f"Known: {', '.join(METHODS)}. {SUPPORTED}")
    return METHODS[method](config, modules, stored)
