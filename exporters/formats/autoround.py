"""AutoRound checkpoints of integers: GPTQ's or AWQ's tensors under a config of their own.

Source: github.com/intel/auto-round 0.16 (export/export_to_autoround, auto_round_extension/torch). ``packing_format``
says whose tensors they are; GPTQ's have no g_idx, and their zero points are stored as by GPTQ's v1 where the name has
"gptq" but not "gptqmodel", and as they are elsewhere. ``extra_config`` gives modules, by name or by pattern, values of
their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exporters.formats import awq, gptq, scheme
from exporters.formats.scheme import Scheme

if TYPE_CHECKING:
    from exporters.checkpoint import Checkpoint

METHOD = "auto-round"
#: packing_format -> version of GPTQ's zero points; None: AWQ's tensors
PACKINGS: Mapping[str, str | None] = {
    "auto_round:auto_gptq": gptq.V1,
    "auto_round:gptq": gptq.V1,
    "auto_round:gptqmodel": gptq.V2,
    "auto_round": gptq.V2,
    "auto_round:auto_awq": None,
    "auto_round:awq": None,
}


def schemes(config: Mapping[str, Any], modules: Mapping[str, tuple[str, ...]], stored: Checkpoint) -> dict[str, Scheme]:
    """The scheme of every module that has a ``qweight``; what is stored as ``weight`` stays a float one."""
    packing = config.get("packing_format", "auto_round:auto_gptq")
    if not isinstance(packing, str) or packing not in PACKINGS:
        scheme.refuse(
            f"packing_format is {packing!r:.80}",
            ".packing_format",
            f'Supported: {", ".join(PACKINGS)}; or save it in the format "llm_compressor"',
        )
    extra = config.get("extra_config") or {}
    if not isinstance(extra, dict) or len(extra) > 1000 or not all(isinstance(own, dict) for own in extra.values()):
        scheme.refuse("is not an object of modules and their values", ".extra_config", "Give modules and their values")
    own = {name: values for name, values in extra.items() if not _is_float(values)}
    for at, values in (("", config), *((f".extra_config.{name:.100}", values) for name, values in own.items())):
        for key, known in (("data_type", ("int", None)), ("act_bits", (16, None))):
            if values.get(key) not in known:
                scheme.refuse(f"{key} is {values[key]!r:.80}", at, 'Save it in the format "llm_compressor"')
    version = PACKINGS[packing]
    if version is None:
        if own:
            scheme.refuse("gives modules values of their own", ".extra_config", "Save it packed as auto_gptq")
        return awq.schemes({**config, "version": "gemm", "zero_point": True}, modules, stored)
    dynamic = {f"+:{name}$": values for name, values in own.items()}
    return gptq.schemes({**config, "checkpoint_format": version, "dynamic": dynamic}, modules, stored)


def _is_float(values: Mapping[str, Any]) -> bool:
    """Whether a module is left in float: there is no ``qweight`` of it."""
    bits = values.get("bits")
    return isinstance(bits, int) and bits >= 16
