import torch.distributed as dist

from megatron.core import parallel_state
from tests.helpers.ranks import run_ranks


def _answers() -> None:
    assert not parallel_state.model_parallel_is_initialized()
    groups = parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    rank = dist.get_rank()
    assert parallel_state.get_process_groups() is groups
    assert parallel_state.get_data_parallel_group(with_context_parallel=True) is groups.dp_cp
    found = {
        "dp": parallel_state.get_data_parallel_rank(),
        "dp size": parallel_state.get_data_parallel_world_size(),
        "ep": parallel_state.get_expert_model_parallel_rank(),
        "ep size": parallel_state.get_expert_model_parallel_world_size(),
        "edp": parallel_state.get_expert_data_parallel_rank(),
        "edp size": parallel_state.get_expert_data_parallel_world_size(),
        "tp size": parallel_state.get_tensor_model_parallel_world_size(),
    }
    assert found == {
        "dp": rank,
        "dp size": 4,
        "ep": rank % 2,
        "ep size": 2,
        "edp": rank // 2,
        "edp size": 2,
        "tp size": 1,
    }
    assert parallel_state.is_pipeline_first_stage()
    assert parallel_state.is_pipeline_last_stage()
    parallel_state.destroy_model_parallel()
    assert not parallel_state.is_initialized()


def test_the_getters_answer_from_the_groups_in_force() -> None:
    run_ranks(_answers, 4)
