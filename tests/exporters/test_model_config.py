"""model_config: what a config.json says, as the library's object."""

from __future__ import annotations

import json
import math

import pytest
from transformers import GraniteMoeHybridConfig

from exporters.errors import ConfigError
from exporters.model_config import library_config


def test_infinity_is_read_as_the_library_writes_it() -> None:
    written = json.loads(GraniteMoeHybridConfig(time_step_limit=(0.0, math.inf)).to_json_string())
    assert written["time_step_limit"][1] == {"__float__": "Infinity"}
    assert library_config(written).time_step_limit[1] == math.inf


def test_a_number_that_is_none_is_refused() -> None:
    written = json.loads(GraniteMoeHybridConfig().to_json_string()) | {"time_step_limit": [0.0, {"__float__": "much"}]}
    with pytest.raises(ConfigError, match="much"):
        library_config(written)
