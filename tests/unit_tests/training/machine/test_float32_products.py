import pytest
import torch
import torch.distributed as dist

from megatron.core.errors import BackendError
from megatron.training.machine import float32_products
from megatron.training.machine.float32_products import EXACT, choose_products, product_error
from tests.helpers.ranks import run_ranks

BF16_ERROR = 2e-3


def test_the_error_tells_fp32_from_bf16(monkeypatch):
    assert product_error() < EXACT / 5
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w: linear(x.bfloat16(), w.bfloat16()).float()
    )
    assert product_error() > 20 * EXACT


def _decide(errors: list[float], wanted: list[bool], choice: str) -> None:
    rank = dist.get_rank()
    float32_products.product_error = lambda: errors[rank]
    found = ["", ""]
    try:
        said = choose_products(choice, wanted_here=wanted[rank])
    except BackendError as error:
        said = str(error)
    dist.all_gather_object(found, (said[:60], torch.get_float32_matmul_precision()))
    precisions = {precision for _, precision in found}
    assert len(precisions) == 1, "ranks compute apart"
    exact = max(errors) < EXACT
    switched = exact and (choice == "onednn" or (choice == "auto" and all(wanted)))
    assert precisions == {"medium" if switched else "highest"}
    if choice == "onednn" and not exact:
        assert all("--cpu-float32-products onednn: a product is wrong" in said for said, _ in found)


@pytest.mark.parametrize("choice", ["auto", "onednn", "torch"])
@pytest.mark.parametrize("errors", [(1e-7, 1e-7), (1e-7, BF16_ERROR)])
@pytest.mark.parametrize("wanted", [(True, True), (True, False)])
def test_all_ranks_decide_alike(errors, wanted, choice):
    run_ranks(_decide, 2, list(errors), list(wanted), choice)


def _here() -> None:
    has_amx = torch.cpu._is_amx_tile_supported()
    said = choose_products("auto", wanted_here=True)
    switched = torch.get_float32_matmul_precision() == "medium"
    assert switched == (not has_amx), said
    assert product_error() < EXACT  # whatever was decided


def test_a_processor_with_amx_is_not_exact_and_left_alone():
    run_ranks(_here, 1)
