"""Package metadata: what to install, in ranges. The versions we test are in constraints.txt."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

EXTRAS = {
    "plots": ["matplotlib>=3.7"],
    "progress": ["tqdm>=4.60"],
    "tensorboard": ["tensorboard>=2.12"],
    "huggingface": ["safetensors>=0.4.3", "tokenizers>=0.20"],
    "tokenizers": ["tokenizers>=0.20"],
    "tiktoken": ["tiktoken>=0.7"],
    "parquet": ["pyarrow>=14"],
    "zstd": ["zstandard>=0.21"],
    "gguf": ["gguf>=0.10"],
    "object-store": ["fsspec>=2024.2", "gcsfs>=2024.2", "s3fs>=2024.2"],
}
# Tests bring a store of their own, for which the fsspec that torch needs is enough. What reads GGUF
# is tested by `make smollm2`, which installs it with the model.
UNTESTED = ("object-store", "gguf")
DEV = [
    "hypothesis>=6.100",
    "import-linter>=2.0",
    "mypy>=1.10",
    "pytest>=8.0",
    "pytest-xdist>=3.5",
    "ruff>=0.6",
    "transformers>=5.20",
    "types-PyYAML",
]

setup(
    name="megatron-moe",
    version="0.1.0",
    description="Megatron-style training of GPT and Mixture-of-Experts models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["megatron", "megatron.*"]),
    package_data={
        "megatron.training.config": ["*.tsv"],
        "megatron.core.cpu_kernels": ["*.cpp", "*.h"],
        "megatron.core.tensor_parallel": ["*.cpp"],
        "megatron.core.transformer": ["*.cpp"],
        "megatron.core.transformer.moe": ["*.cpp", "*.h"],
        "megatron.core.optimizer": ["*.cpp"],
    },
    install_requires=["torch>=2.9", "numpy>=1.26", "sentencepiece>=0.2", "pyyaml>=6.0"],
    extras_require={
        **EXTRAS,
        "quickstart": EXTRAS["plots"] + EXTRAS["progress"] + EXTRAS["tensorboard"],
        "dev": DEV + [p for name, extra in EXTRAS.items() if name not in UNTESTED for p in extra],
    },
)
