"""Checkpoint formats, one file each; a new one is a file and a row in METHODS."""

from __future__ import annotations

from collections.abc import Mapping

from exporters.formats import compressed_tensors
from exporters.formats.scheme import Reader

#: quant_method of config.json -> how its quantization_config is read
METHODS: Mapping[str, Reader] = {compressed_tensors.METHOD: compressed_tensors.schemes}
