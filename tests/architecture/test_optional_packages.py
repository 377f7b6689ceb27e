"""torch, numpy, sentencepiece and pyyaml suffice: every module imports with all else absent."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPTIONAL = [
    "apex", "transformer_engine", "deep_ep", "grouped_gemm", "flash_attn", "matplotlib",
    "tensorboard", "tokenizers", "transformers", "tiktoken", "pyarrow", "zstandard", "tqdm", "rich",
    "wandb", "pandas", "scipy", "safetensors",
]  # fmt: skip
SCRIPT = f"""
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import megatron
names = [m.name for m in pkgutil.walk_packages(megatron.__path__, "megatron.")]
for name in names:
    importlib.import_module(name)
assert len(names) > 80, names
assert not set({OPTIONAL!r}) & set(sys.modules)

"""


def test_every_module_imports_without_optional_packages():
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
