"""Checkpoint formats, one file each; a new one is a file and a row in METHODS."""

from __future__ import annotations

from collections.abc import Mapping

from exporters.formats import autoround, awq, bitsandbytes, compressed_tensors, fine_grained_fp8, gptq, qat, torchao
from exporters.formats.scheme import Reader

#: quant_method of config.json -> how its quantization_config is read
METHODS: Mapping[str, Reader] = {
    autoround.METHOD: autoround.schemes,
    awq.METHOD: awq.schemes,
    bitsandbytes.METHOD: bitsandbytes.schemes,
    compressed_tensors.METHOD: compressed_tensors.schemes,
    fine_grained_fp8.METHOD: fine_grained_fp8.schemes,
    gptq.METHOD: gptq.schemes,
    qat.METHOD: qat.schemes,
    torchao.METHOD: torchao.schemes,
}
