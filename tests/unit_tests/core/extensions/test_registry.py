"""The registry: what is chosen, why, and what happens when a wish cannot be met."""

import importlib.util

import pytest

from megatron.core.errors import BackendError
from megatron.core.extensions import apex, grouped_gemm, torch_native
from megatron.core.extensions.registry import Choice, resolve, table


def test_torch_is_chosen_when_nothing_else_is_there():
    assert resolve("grouped_mm") is torch_native.grouped_mm
    assert resolve("adam") is torch_native.adam
    assert resolve("adam", "torch_native") is torch_native.adam


def test_the_table_names_each_op_its_choice_and_the_others():
    rows = table()
    assert [row.op for row in rows] == ["adam", "grouped_mm"]
    assert rows[0] == Choice(
        op="adam",
        chosen="torch_native",
        why="torch's fused AdamW kernel",
        also_known=f"apex ({apex.unusable()})",
    )
    assert rows[1].also_known == f"grouped_gemm ({grouped_gemm.unusable()})"


@pytest.mark.skipif(apex.unusable() is None, reason="apex can be used here")
def test_an_explicit_choice_that_cannot_be_met_names_package_and_reason():
    with pytest.raises(BackendError, match="apex, which cannot be used: "):
        resolve("adam", "apex")


def test_an_unknown_implementation_is_refused_with_the_known_ones():
    with pytest.raises(BackendError, match="'cutlass'; known: torch_native"):
        resolve("grouped_mm", "cutlass")


def test_an_unknown_op_is_a_bug_of_ours():
    with pytest.raises(AssertionError, match="no implementation of op='gemm'"):
        resolve("gemm")


@pytest.mark.parametrize(
    ("cuda", "fused_adam", "reason"),
    [
        (False, False, "needs a CUDA device"),
        (True, False, "without apex.optimizers.FusedAdam"),
        (True, True, None),
    ],
)
def test_apex_counts_only_with_its_optimizer(monkeypatch, tmp_path, cuda, fused_adam, reason):
    package = tmp_path / "apex" / "optimizers"
    package.mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    (package / "__init__.py").write_text("FusedAdam = object\n" if fused_adam else "")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("apex", "apex.optimizers"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    found = apex.unusable.__wrapped__()
    assert (found is None) if reason is None else (reason in (found or ""))
    for name in ("apex", "apex.optimizers"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    assert importlib.util.find_spec("apex") is not None
