"""Negative controls: the import contracts and the banned-import rule refuse what they should."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _lint_imports(root: Path) -> subprocess.CompletedProcess:
    code = (
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True
    )


def test_import_contracts_refuse_a_dispatcher_that_knows_the_router(tmp_path):
    shutil.copytree(ROOT / "megatron", tmp_path / "megatron")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    dispatcher = tmp_path / "megatron/core/transformer/moe/token_dispatcher/base.py"
    dispatcher.write_text(
        dispatcher.read_text() + "\nfrom megatron.core.transformer.moe import router\n"
    )
    result = _lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout.decode() + result.stderr.decode()
    assert "parts do not know each other" in result.stdout.decode()


@pytest.mark.parametrize(
    "source",
    [
        "import apex\n",
        "import torch.distributed as dist\n\ngroup = dist.new_group([0])\n",
        "from torch.distributed import new_group\n",
    ],
)
def test_ruff_refuses_optional_packages_and_groups_outside_their_home(source):
    result = subprocess.run(
        ["ruff", "check", "--select", "TID251", "--stdin-filename", "megatron/core/x.py", "-"],
        cwd=ROOT,
        input=source,
        text=True,
        capture_output=True,
        env={"PATH": str(Path(sys.executable).parent)},
    )
    assert "TID251" in result.stdout
