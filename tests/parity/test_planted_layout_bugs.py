"""R2, R3: bugs that sharing experts invites, planted one at a time; the layout oracle sees each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe import experts, output_bias
from tests.parity.test_layouts import check_layout, one_process

Plant = Callable[[pytest.MonkeyPatch], None]


def _experts_summed_over_all_data_ranks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DistributedDataParallel, "_group", lambda self, key: self.pg_collection.dp_cp)


def _experts_summed_over_their_slices(patch: pytest.MonkeyPatch) -> None:
    def group(self: DistributedDataParallel, key: Any) -> Any:
        groups = self.pg_collection
        return groups.expt_tp if key.is_expert else groups.dp_cp

    patch.setattr(DistributedDataParallel, "_group", group)


def _copies_in_the_norm_of_each_rank(patch: pytest.MonkeyPatch) -> None:
    def owned(gradients: Any, groups: Any) -> list[clip_grads.SpreadGradients]:
        found: dict[bool, list[torch.Tensor]] = {False: [], True: []}
        for key, flat in gradients:
            found[key.is_expert].append(flat)
        return [
            clip_grads.SpreadGradients(groups.tp_ep, found[True]),
            clip_grads.SpreadGradients(groups.tp, found[False]),
        ]

    patch.setattr(optimizer, "owned_gradients", owned)


def _slices_of_one_rank_in_the_norm(patch: pytest.MonkeyPatch) -> None:
    right = clip_grads.owned_gradients

    def owned(gradients: Any, groups: Any) -> list[clip_grads.SpreadGradients]:
        expert, dense = right(gradients, groups)
        return [expert._replace(group=groups.ep), dense]

    patch.setattr(optimizer, "owned_gradients", owned)


def _bias_added_by_every_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(experts, "adds_output_bias", lambda groups: True)


def _bias_learnt_by_the_rank_that_adds_it(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        output_bias._LearnOnly, "backward", staticmethod(lambda ctx, grad: (grad, None, None))
    )


def _gate_and_up_cut_as_one(patch: pytest.MonkeyPatch) -> None:
    right = experts.split_over

    def split(*args: Any, dim: int, parts: tuple[int, ...], **_: Any) -> Any:
        return right(*args, dim=dim, parts=(sum(parts),))

    patch.setattr(experts, "split_over", split)


def _gradients_of_other_slices_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = mappings._sum_own_rows

    def own_only(group: Any, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
        start = sum(sizes[: group.rank()])
        right(group, x, sizes)  # the others wait for it
        return x[start : start + sizes[group.rank()]].clone()

    class Forgets(mappings._AllGatherRows):
        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor, None]:
            return None, own_only(ctx.group, grad, ctx.sizes), None

    patch.setattr(mappings, "_AllGatherRows", Forgets)


# what is planted, where it shows, and the first thing that is wrong
BUGS: list[tuple[Plant, str, tuple[int, int, int], str]] = [
    (_experts_summed_over_all_data_ranks, "alltoall", (2, 1, 2), "step 0: grad_norm"),
    (_experts_summed_over_their_slices, "alltoall", (4, 1, 2), "ranks disagree"),
    (_copies_in_the_norm_of_each_rank, "alltoall", (2, 1, 2), "step 0: grad_norm"),
    (_slices_of_one_rank_in_the_norm, "alltoall", (4, 2, 2), "ranks disagree"),
    (_bias_added_by_every_rank, "alltoall", (2, 1, 2), "step 1: lm_loss"),  # it starts at zero
    (_bias_learnt_by_the_rank_that_adds_it, "sequential", (2, 1, 2), "replicas of .*fc2.bias"),
    (_gate_and_up_cut_as_one, "alltoall", (2, 1, 2), "step 0: lm_loss"),
    (_gradients_of_other_slices_forgotten, "alltoall_dedup", (2, 1, 2), "step 0: grad_norm"),
]


@pytest.mark.parametrize(("plant", "case", "layout", "wrong"), BUGS)
def test_the_oracle_sees_a_planted_bug(plant, case, layout, wrong, monkeypatch):
    one_process(case)  # before the bug is there
    world_size, ep, etp = layout
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=wrong):
        check_layout(
            case, world_size, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp
        )
