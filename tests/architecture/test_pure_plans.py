"""Plans are pure: no process group, no module, so that they are tested in milliseconds."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Plans that may use torch tensors, but no torch.distributed and no nn.Module.
TENSOR_PLANS = [
    "megatron/core/transformer/moe/routing.py",
    "megatron/core/transformer/moe/load_balancing.py",
    "megatron/core/transformer/moe/permutation.py",
    "megatron/core/transformer/moe/sinkhorn.py",
    "megatron/core/transformer/moe/quantile_balancing.py",
]
# Plans that need no torch at all; so does everything on the way to --help and config errors.
TORCH_FREE = [
    "megatron/core/parallel_layout.py",
    "megatron/core/config_field.py",
    "megatron/core/errors.py",
    "megatron/core/model_parallel_config.py",
    "megatron/core/datasets/sample_index.py",
    "megatron/core/datasets/blend.py",
    "megatron/core/optimizer_param_scheduler.py",
    "megatron/core/num_microbatches_calculator.py",
    "megatron/core/dist_checkpointing/folders.py",
    "megatron/core/dist_checkpointing/object_folders.py",
    "megatron/core/extensions/object_store.py",
    "megatron/core/extensions/range_requests.py",
    *(
        str(p.relative_to(ROOT))
        for p in (ROOT / "megatron/core/models/huggingface").rglob("*.py")
        if p.stem not in ("accounting", "exchange", "folder", "quantized", "writer")
    ),
    "megatron/core/dist_checkpointing/foreign.py",
    "megatron/training/huggingface_family.py",
    "megatron/training/huggingface_flags.py",
    "megatron/training/huggingface_start.py",
    "megatron/training/arguments.py",
    "megatron/training/log_line.py",
    "megatron/training/schedule_settings.py",
    "megatron/training/starting_point.py",
    *(str(p.relative_to(ROOT)) for p in (ROOT / "megatron/training/config").glob("*.py")),
    *(str(p.relative_to(ROOT)) for p in (ROOT / "megatron/core/transformer/config").glob("*.py")),
    *(
        str(p.relative_to(ROOT))
        for p in (ROOT / "megatron/core/datasets/indexed_dataset").glob("*.py")
    ),
    *(str(p.relative_to(ROOT)) for p in (ROOT / "megatron/core/tokenizers").glob("*.py")),
    *(
        str(p.relative_to(ROOT))
        for folder in ("megatron/core/pipeline_parallel", "tools/schedules")
        for pattern in ("schedule_*.py", "lay*.py", "svg.py", "text.py", "compare.py")
        for p in (ROOT / folder).glob(pattern)
    ),
    "tools/show_schedule.py",
]


def imported(text: str) -> set[str]:
    """Return every module that the source ``text`` imports anywhere, and ``from`` names dotted."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", TENSOR_PLANS)
def test_tensor_plans_know_no_groups_and_no_modules(path):
    text = (ROOT / path).read_text()
    assert not {name for name in imported(text) if name.startswith("torch.distributed")}
    assert "nn.Module" not in text


@pytest.mark.parametrize("path", TORCH_FREE)
def test_torch_free_files_import_no_torch(path):
    assert not {n for n in imported((ROOT / path).read_text()) if n.split(".")[0] == "torch"}


def test_a_torch_import_is_caught():
    assert "torch.distributed" in imported("def f():\n    import torch.distributed as dist\n")
    assert "torch.distributed" in imported("from torch import distributed\n")
