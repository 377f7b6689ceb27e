"""Megatron's getters of groups, ranks and sizes, for users' scripts only.

A facade over one ``ProcessGroupCollection``. Core never imports it: there, groups are arguments.
"""

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection

_collection: ProcessGroupCollection | None = None


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    *,
    distributed_timeout_minutes: int = 30,
) -> ProcessGroupCollection:
    """Make the groups of these sizes over the whole world, for scripts that use core alone.

    Every rank must call this at the same point, after ``torch.distributed.init_process_group``.
    """
    sizes = ModelParallelConfig(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size,
    )
    collection = ProcessGroupCollection.create(
        sizes.layout(dist.get_world_size()), timedelta(minutes=distributed_timeout_minutes)
    )
    set_process_groups(collection)
    return collection


def set_process_groups(collection: ProcessGroupCollection | None) -> None:
    """Make ``collection`` the one that the getters answer from; None forgets it."""
    global _collection
    _collection = collection


def destroy_model_parallel() -> None:
    """Forget the groups; the processes stay connected."""
    set_process_groups(None)


def model_parallel_is_initialized() -> bool:
    """Tell whether the getters have groups to answer from."""
    return _collection is not None


is_initialized = model_parallel_is_initialized


def get_process_groups() -> ProcessGroupCollection:
    """Return the collection in force, to pass on as ``pg_collection``."""
    assert _collection is not None, "model parallel groups are not initialized"
    return _collection


def get_model_parallel_group() -> ProcessGroup:
    """Return the ranks that together hold one dense model."""
    return get_process_groups().mp


def get_tensor_model_parallel_group() -> ProcessGroup:
    """Return the ranks that share each dense weight matrix."""
    return get_process_groups().tp


def get_tensor_model_parallel_rank() -> int:
    """Return this rank's place in its tensor-parallel group."""
    return get_process_groups().tp.rank()


def get_tensor_model_parallel_world_size() -> int:
    """Return the size of the tensor-parallel group."""
    return get_process_groups().tp.size()


def get_pipeline_model_parallel_group() -> ProcessGroup:
    """Return the ranks that hold the stages of one model."""
    return get_process_groups().pp


def get_pipeline_model_parallel_rank() -> int:
    """Return this rank's stage."""
    return get_process_groups().pp.rank()


def get_pipeline_model_parallel_world_size() -> int:
    """Return the number of pipeline stages."""
    return get_process_groups().pp.size()


def is_pipeline_first_stage() -> bool:
    """Tell whether this rank holds the embedding."""
    return get_pipeline_model_parallel_rank() == 0


def is_pipeline_last_stage() -> bool:
    """Tell whether this rank computes the loss."""
    return get_pipeline_model_parallel_rank() == get_pipeline_model_parallel_world_size() - 1


def get_context_parallel_group() -> ProcessGroup:
    """Return the ranks that share one sequence."""
    return get_process_groups().cp


def get_context_parallel_rank() -> int:
    """Return this rank's place in its context-parallel group."""
    return get_process_groups().cp.rank()


def get_context_parallel_world_size() -> int:
    """Return the number of ranks that share one sequence."""
    return get_process_groups().cp.size()


def get_data_parallel_group(with_context_parallel: bool = False) -> ProcessGroup:
    """Return the ranks that hold the same dense weights and read different samples.

    Args:
        with_context_parallel: Also count the ranks that share a sequence with these.
    """
    groups = get_process_groups()
    return groups.dp_cp if with_context_parallel else groups.dp


def get_data_parallel_rank(with_context_parallel: bool = False) -> int:
    """Return this rank's place in its data-parallel group."""
    return get_data_parallel_group(with_context_parallel).rank()


def get_data_parallel_world_size(with_context_parallel: bool = False) -> int:
    """Return the size of the data-parallel group."""
    return get_data_parallel_group(with_context_parallel).size()


def get_tensor_and_context_parallel_group() -> ProcessGroup:
    """Return the ranks that share one sequence or one dense weight."""
    return get_process_groups().tp_cp


def get_expert_model_parallel_group() -> ProcessGroup:
    """Return the ranks that the experts of a layer are spread over."""
    return get_process_groups().ep


def get_expert_model_parallel_rank() -> int:
    """Return this rank's place in its expert-parallel group."""
    return get_process_groups().ep.rank()


def get_expert_model_parallel_world_size() -> int:
    """Return the number of ranks that the experts of a layer are spread over."""
    return get_process_groups().ep.size()


def get_expert_tensor_parallel_group() -> ProcessGroup:
    """Return the ranks that share each expert's matrices."""
    return get_process_groups().expt_tp


def get_expert_tensor_parallel_rank() -> int:
    """Return this rank's place in its expert-tensor-parallel group."""
    return get_process_groups().expt_tp.rank()


def get_expert_tensor_parallel_world_size() -> int:
    """Return the number of ranks that share each expert's matrices."""
    return get_process_groups().expt_tp.size()


def get_expert_tensor_and_model_parallel_group() -> ProcessGroup:
    """Return the ranks that together hold all experts of a layer."""
    return get_process_groups().tp_ep


def get_expert_data_parallel_group() -> ProcessGroup:
    """Return the ranks that hold the same experts."""
    return get_process_groups().expt_dp


def get_expert_data_parallel_rank() -> int:
    """Return this rank's place in its expert-data-parallel group."""
    return get_process_groups().expt_dp.rank()


def get_expert_data_parallel_world_size() -> int:
    """Return the number of ranks that hold the same experts."""
    return get_process_groups().expt_dp.size()
