"""Load a discretizer with the library class that owns it: diffusers VQModel or transformers DacModel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.checkpoint import Checkpoint, check_finite
from exporters.discretizer_config import discretizer_kind, library_config
from exporters.errors import ConfigError, WeightsError
from exporters.pth_file import load_pth
from exporters.strict_json import read_json

if TYPE_CHECKING:
    import torch


def _vq_model(config: Mapping[str, Any]) -> torch.nn.Module:
    from diffusers import VQModel

    return VQModel.from_config(dict(config))


def _dac_model(config: Mapping[str, Any]) -> torch.nn.Module:
    from transformers import DacConfig, DacModel

    return DacModel(DacConfig(**{key: value for key, value in config.items() if key != "model_type"}))


_BUILD: Mapping[str, Callable[[Mapping[str, Any]], torch.nn.Module]] = {"VQModel": _vq_model, "dac": _dac_model}


def load_discretizer(folder: Path) -> torch.nn.Module:
    """The module of discretizers/<modality>: float32, eval mode, every weight from the file and none left over."""
    import torch

    where = f"{folder.name}/config.json"
    config = read_json(folder / "config.json")
    kind = discretizer_kind(config, where)
    try:
        with torch.device("meta"):
            module = _BUILD[kind](library_config(config))
    except Exception as error:  # the libraries raise many types, all about the config's content
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{kind} refuses it: {reason}", where=where, way_out="Correct the field") from error
    single = folder / "model.safetensors"
    if single.exists():
        checkpoint = Checkpoint(folder, [single.name])
        state = {name: checkpoint.tensor(name) for name in checkpoint.tensors}
    else:
        state = load_pth(folder / "model.pth")
    for name, tensor in state.items():
        check_finite(tensor, f"{folder.name}: {name}")
    expected = module.state_dict()
    for name in sorted(set(expected) ^ set(state)):
        what = "is missing" if name in expected else "is not part of the model"
        raise WeightsError(f"the tensor {name!r} {what}", where=str(folder), way_out="Export the discretizer again")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise WeightsError(
                f"is {list(tensor.shape)}, config.json asks for {list(expected[name].shape)}",
                where=f"{folder}: {name}",
                way_out="Take config.json and the weights from one checkpoint",
            )
    full = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    module.load_state_dict(full, strict=True, assign=True)
    return module.eval().requires_grad_(False)
