"""Megatron's functions of MoE that look groups up, by its names; the only ones in core that do.

For users' scripts, which made their groups by ``parallel_state``: nothing of ours calls these.
"""

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_reduce_sum
from megatron.core.transformer.moe.load_balancing import updated_expert_bias


def get_default_pg_collection() -> ProcessGroupCollection:
    """Return the groups that ``parallel_state.initialize_model_parallel`` made."""
    return parallel_state.get_process_groups()


def get_updated_expert_bias(
    tokens_per_expert: Tensor,
    expert_bias: Tensor,
    expert_bias_update_rate: float,
    tp_dp_cp_group: ProcessGroup | None = None,
) -> Tensor:
    """Return the bias moved by the rate: up where tokens are fewer than the mean, down where more.

    Args:
        tokens_per_expert: [..., num_experts], integers or whole floats, of this rank.
        expert_bias: Of the same shape, fp32; it is not changed.
        expert_bias_update_rate: Of one step.
        tp_dp_cp_group: Ranks to sum the counts over. None: ``tp_dp_cp`` of ``parallel_state``,
            or this rank alone where it has no groups.

    Source: Wang et al. 2024 (arXiv:2408.15664), algorithm 1.
    """
    if tp_dp_cp_group is None and parallel_state.model_parallel_is_initialized():
        tp_dp_cp_group = parallel_state.get_process_groups().tp_dp_cp
    with torch.no_grad():
        counts = tokens_per_expert.long()  # exact, also over many ranks
        if tp_dp_cp_group is not None:
            counts = all_reduce_sum(tp_dp_cp_group, counts)
        return updated_expert_bias(expert_bias, counts, expert_bias_update_rate)


def maybe_move_tensor_to_cpu(
    tensor: object, as_numpy: bool = False, record_stream: bool = False
) -> object:
    """Return ``tensor`` on the CPU, if it is a tensor on another device; anything else as it is.

    Args:
        tensor: Anything.
        as_numpy: Return a numpy array of it, wherever it was.
        record_stream: Do not wait for the device: the caller does, before reading. Not with
            ``as_numpy``, which would be read at once.
    """
    if not torch.is_tensor(tensor):
        return tensor
    if tensor.device.type != "cpu":
        later = record_stream and not as_numpy
        moved = tensor.to("cpu", non_blocking=later)
        if later:
            tensor.record_stream(torch.cuda.current_stream())
        tensor = moved
    if not as_numpy:
        return tensor
    array: np.ndarray = tensor.detach().numpy()
    return array
