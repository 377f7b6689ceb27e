"""torch, numpy, sentencepiece and pyyaml suffice: every module imports with all else absent."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPTIONAL = [
    "apex", "transformer_engine", "deep_ep", "grouped_gemm", "flash_attn", "matplotlib",
    "tensorboard", "tokenizers", "transformers", "tiktoken", "pyarrow", "zstandard", "tqdm", "rich",
    "wandb", "pandas", "scipy", "safetensors", "triton",
]  # fmt: skip
# imported late, by the module beside it, where the package was found
ONLY_WITH = ["megatron.core.extensions.triton_kernels"]
HIDE = f"""
import importlib.machinery, importlib.util

_find_spec = importlib.machinery.PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in {OPTIONAL!r} else _find_spec(name, path, target)

importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""
IMPORT_ALL = f"""
import importlib, pkgutil, sys
import megatron

names = [m.name for m in pkgutil.walk_packages(megatron.__path__, "megatron.")]
assert set({ONLY_WITH!r}) <= set(names)
for name in set(names) - set({ONLY_WITH!r}):
    importlib.import_module(name)
assert len(names) > 100, names
assert not set({OPTIONAL!r}) & set(sys.modules)
"""
TRAIN = """
import runpy, sys

sys.argv = "pretrain_gpt.py --num-layers 1 --hidden-size 16 --num-experts 4 --mock-data".split()
sys.argv += "--train-iters 2 --seq-length 16 --device cpu --num-workers 0 --log-dir".split()
sys.argv += [LOG_DIR]
runpy.run_path("pretrain_gpt.py", run_name="__main__")
"""


def _run(script: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", HIDE + script], cwd=ROOT, capture_output=True, text=True
    )


def test_hidden_packages_are_not_found():
    assert _run("import tqdm").returncode == 1
    assert _run("assert importlib.util.find_spec('zstandard') is None").returncode == 0


def test_every_module_imports_without_optional_packages():
    result = _run(IMPORT_ALL)
    assert result.returncode == 0, result.stderr


def test_a_model_trains_without_optional_packages(tmp_path):
    result = _run(TRAIN.replace("LOG_DIR", repr(str(tmp_path))))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "iteration        2/       2" in result.stdout
    assert "matplotlib" in result.stdout, "the missing plot is told, with the package to install"
