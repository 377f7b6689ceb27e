import torch

from megatron.core.dist_checkpointing.validation import TensorFacts, mismatch_problem

VECTOR = TensorFacts((3,), torch.float32)
MATRIX = TensorFacts((3, 4), torch.float32)


def test_keys_spread_over_ranks_fit_together() -> None:
    assert mismatch_problem({"a": VECTOR, "b": MATRIX}, [{"a": VECTOR}, {"b": MATRIX}]) == ""


def test_missing_and_unexpected_keys_are_both_named() -> None:
    problem = mismatch_problem({"a": VECTOR, "b": VECTOR}, [{"a": VECTOR}, {"c": VECTOR}])
    assert "1 tensors missing in the checkpoint:\n  - c" in problem
    assert "no rank of this run wants them:\n  - b" in problem


def test_shapes_and_dtypes_are_named_with_both_values() -> None:
    half = TensorFacts((3,), torch.bfloat16)
    problem = mismatch_problem({"a": VECTOR, "b": VECTOR}, [{"a": half, "b": MATRIX}])
    assert "a is float32 [3] on disk and bfloat16 [3] in the model" in problem
    assert "b is float32 [3] on disk and float32 [3, 4] in the model" in problem


def test_long_lists_are_cut_with_their_number() -> None:
    problem = mismatch_problem({}, [{f"w{i}": VECTOR for i in range(10)}])
    assert problem.startswith("10 tensors missing")
    assert problem.endswith("... and 4 more")
