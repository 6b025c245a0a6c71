"""The distribution `edge-export`: what a device needs is the base; everything else is an extra.

Versions live in constraints.txt alone: install with `pip install -c constraints.txt -e ".[export,onnx,dev]"`.
"""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PACKAGES = [
    "device_profiles",
    "exporters",
    "exporters.families",
    "exporters.formats",
    "exporters.ops",
    "exporters.passes",
    "exporters.quantise",
    "runtimes",
    "tools",
    "tools.reference_student",
]


def pinned(name: str) -> str:
    """The requirement with the exact version that constraints.txt gives it.

    Only for torch: a looser requirement lets pip take a build that pulls several gigabytes of CUDA packages.
    """
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


EXTRAS = {
    "export": [
        pinned("torch"),
        "compressed-tensors",
        "diffusers",
        "ml_dtypes",
        "onnx",
        "onnx-ir",
        "onnxscript",
        "pydantic",
        "transformers",
    ],
    "onnx": ["onnxruntime"],
    "openvino": ["openvino", "nncf"],
    "tvm": ["apache-tvm", "apache-tvm-ffi"],
    "coreml": ["coremltools"],
    "tensorrt": ["tensorrt_rtx"],
    # Compilers of our CUDA kernels, on the build machine: nvcc of CUDA 13, and NVRTC of CUDA 12 for JetPack 6.
    "cuda": [
        "nvidia-cuda-cccl",
        "nvidia-cuda-crt",
        "nvidia-cuda-nvcc",
        "nvidia-cuda-nvrtc-cu12",
        "nvidia-cuda-runtime",
        "nvidia-cuda-runtime-cu12",
        "nvidia-nvvm",
    ],
    # Libraries of checkpoint formats, for tools/library_weights.py alone.
    "formats": ["bitsandbytes", "torchao"],
    "loadgen": ["mlcommons_loadgen"],
    # What our sizes and speeds are measured against (tools/bench_genai.py).
    "peers": ["onnxruntime-genai"],
    "sign": ["cryptography"],
    "dev": ["cryptography", "hypothesis", "mypy", "pytest", "pytest-xdist", "ruff", "scipy"],
}

setup(
    name="edge-export",
    version="0.1.0",
    description="A distilled, quantised multimodal student in; a verified, device-ready bundle out.",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=PACKAGES,
    package_data={
        "device_profiles": ["*.toml", "*.md"],
        "exporters": ["reference_student/**/*", "coreml_docs/*", "onnx_functions/*"],
        "tools.reference_student": ["*.md", "package/**/*"],
    },
    install_requires=["numpy", "pillow", "rich", "safetensors", "tokenizers"],
    extras_require=EXTRAS,
)
