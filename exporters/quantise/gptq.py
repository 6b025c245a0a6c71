"""GPTQ: weights rounded one column at a time, each rounding error repaid by the columns still to come.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (arXiv:2210.17323), algorithm 1 with group-wise asymmetric grids and no reordering of
columns, so that the stored groups are contiguous along K.

Written here because no library serves: torchao's prototype (0.18) asserts a CUDA device, llm-compressor (0.14) asks for
older releases of transformers and compressed-tensors than the pinned ones, and NNCF (3.4) has it for OpenVINO graphs.
"""

from __future__ import annotations

import torch

from exporters.quantise.grids import Grid, Width, fit, round_to
from exporters.quantise.layer import Layer

#: Columns whose errors are gathered before the rest of the matrix is updated with one product (section 3.3, step 2).
BLOCK = 128
#: Share of the Hessian's mean diagonal that is added to it.
DAMPING = 0.01


def gptq(weight: torch.Tensor, hessian: torch.Tensor, width: Width, damping: float = DAMPING) -> Grid:
    """Quantise weight float32 [N,K] for inputs whose second moments are hessian float [K,K].

    Raises torch.linalg.LinAlgError when the damped Hessian is not positive definite.
    """
    rows, columns = weight.shape
    group = width.columns(columns)
    # A group begins where no error is still to be subtracted, so that its grid is fitted to what it then holds.
    block = BLOCK if width.group is None or group % BLOCK == 0 else group * max(1, BLOCK // group)
    upper = _inverse_factor(hessian, damping)
    work = weight.double().clone()
    codes = torch.zeros(rows, columns, dtype=torch.int8)
    scales, zeros = torch.zeros(rows, columns // group), torch.zeros(rows, columns // group, dtype=torch.int8)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.zeros(rows, stop - start, dtype=torch.double)
        for column in range(start, stop):
            if column % group == 0:
                scale, zero = fit(work[:, column : column + group].float(), width)
                scales[:, column // group], zeros[:, column // group] = scale[:, 0], zero[:, 0].to(torch.int8)
            code, value = round_to(work[:, column : column + 1].float(), scale, zero, width.bits)
            codes[:, column] = code[:, 0].to(torch.int8)
            error = (work[:, column] - value[:, 0].double()) / upper[column, column]
            errors[:, column - start] = error
            work[:, column + 1 : stop] -= error[:, None] * upper[column, column + 1 : stop]
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return Grid(codes, scales, zeros)


def _inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse, float64 [K,K]."""
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    unused = diagonal == 0
    diagonal[unused] = 1.0
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def quantise_layer(layer: Layer, width: Width) -> None:
    """GPTQ of one decoder layer: each stage on what the quantised stages before it produce."""
    for stage in layer.stages():
        hessian = layer.statistics([stage])[stage].hessian
        for name in stage.linears:
            layer.put(name, gptq(layer.weight(name), hessian, width), width)
