"""Methods that transformers knows and that are not read here: why, for the one who meets the refusal.

Source: transformers 5.23 (utils/quantization_config, integrations) and the methods' own libraries.
"""

from __future__ import annotations

from collections.abc import Mapping

_ROTATED = "its weights are those of rotated inputs, and the rotation is a kernel's"
_FLOAT_ZEROS = "its zero points are floats, not codes"
_LIBRARY = "its tensors are packed by rules of its own library"

#: quant_method -> why it is not read
REFUSED: Mapping[str, str] = {
    "aqlm": "its weights are sums of vectors from codebooks",
    "bitnet": "its layers add norms and round their inputs by rules of their own",
    "eetq": "its int8 weights are interleaved for the kernels of one GPU",
    "fbgemm_fp8": "its inputs are rounded below a bound (activation_scale_ub), which no backend here does",
    "fouroversix": _LIBRARY,
    "fp_quant": _ROTATED,
    "gemma": "its layout is that of one model's own modules",
    "gguf": "its weights are a file of llama.cpp",
    "higgs": f"its codes are vectors of a grid, and {_ROTATED}",
    "hqq": _FLOAT_ZEROS,
    "metal": _FLOAT_ZEROS,
    "mxfp4": "the experts of a layer are stored as one tensor (*_blocks, *_scales), as gpt-oss does",
    "mxfp8": "it quantises as it loads; its checkpoints are float ones",
    "nvfp4": "it quantises as it loads; its checkpoints are float ones",
    "quanto": _LIBRARY,
    "quark": _LIBRARY,
    "sinq": f"it scales rows and columns, and {_FLOAT_ZEROS}",
    "spqr": "its outliers are stored beside its codes as a sparse matrix",
    "vptq": "its weights are vectors from codebooks",
}
#: quant_method -> the way out, where there is a shorter one than quantising again
OTHERWISE: Mapping[str, str] = {
    "mxfp8": "Drop quantization_config from config.json, and quantise by the build (--quantise)",
    "nvfp4": "Drop quantization_config from config.json, and quantise by the build (--quantise)",
}
