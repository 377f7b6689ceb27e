"""Import paths that Megatron-LM users type exist, also the short ones that packages re-export."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOE = "megatron.core.transformer.moe"

NAMES = [
    "megatron.core.ModelParallelConfig",
    "megatron.core.mpu",
    "megatron.core.parallel_state.get_data_parallel_group",
    "megatron.core.parallel_state.get_expert_model_parallel_world_size",
    "megatron.core.tensor_parallel.ColumnParallelLinear",
    "megatron.core.tensor_parallel.layers.VocabParallelEmbedding",
    "megatron.core.tensor_parallel.mappings.all_to_all",
    "megatron.core.datasets.gpt_dataset.GPTDataset",
    "megatron.core.datasets.blended_dataset.BlendedDataset",
    "megatron.core.datasets.indexed_dataset.IndexedDataset",
    "megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder",
    "megatron.core.distributed.DistributedDataParallel",
    "megatron.core.distributed.DistributedDataParallelConfig",
    "megatron.core.distributed.TorchFullyShardedDataParallel",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.distributed.torch_fully_sharded_data_parallel.TorchFullyShardedDataParallel",
    "megatron.core.models.gpt.GPTModel",
    "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec",
    "megatron.core.optimizer.OptimizerConfig",
    "megatron.core.optimizer.get_megatron_optimizer",
    "megatron.core.optimizer_param_scheduler.OptimizerParamScheduler",
    "megatron.core.process_groups_config.ProcessGroupCollection",
    "megatron.core.transformer.TransformerConfig",
    "megatron.core.transformer.ModuleSpec",
    "megatron.core.transformer.mlp.MLP",
    "megatron.core.transformer.moe.experts.GroupedMLP",
    "megatron.core.transformer.moe.experts.SequentialMLP",
    "megatron.core.transformer.moe.moe_layer.MoELayer",
    "megatron.core.transformer.moe.moe_layer.MoESubmodules",
    "megatron.core.transformer.moe.router.TopKRouter",
    "megatron.core.transformer.moe.router_replay.RouterReplay",
    "megatron.core.transformer.moe.router_replay.RouterReplayAction",
    "megatron.core.transformer.moe.token_dispatcher.MoEAllGatherTokenDispatcher",
    "megatron.core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher",
    "megatron.core.transformer.transformer_layer.TransformerLayer",
    "megatron.training.get_args",
    "megatron.training.get_tokenizer",
    "megatron.training.pretrain",
    "megatron.training.print_rank_0",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_name_can_be_imported(name):
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("package", ["megatron.core", "megatron.core.optimizer"])
def test_a_name_that_is_not_there_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match="nonsense"):
        _ = importlib.import_module(package).nonsense


def _moe_names() -> list[tuple[str, bool]]:
    """(name within the MoE package, whether it is there) of the table in docs/differences.md."""
    text = (ROOT / "docs/differences.md").read_text().split("## Names of Megatron's MoE package")[1]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return [
        (f"{module.strip('`')}.{name}", is_there)
        for module, *columns in rows
        for cell, is_there in zip(columns, (True, False), strict=True)
        for name in re.findall(r"`([\w.]+)`", cell)
    ]


@pytest.mark.parametrize(("name", "is_there"), _moe_names())
def test_names_of_the_moe_package_are_there_or_said_not_to_be(name, is_there):
    module, *path = name.split(".")
    found = importlib.import_module(f"{MOE}.{module}")
    for part in path:
        if not hasattr(found, part):
            assert not is_there, f"{name} is not there; move it in docs/differences.md"
            return
        found = getattr(found, part)
    assert is_there, f"{name} is there; move it in docs/differences.md"


def test_every_function_of_moe_utils_is_in_the_table():
    exported = importlib.import_module(f"{MOE}.moe_utils").__all__
    listed = {name.partition(".")[2] for name, there in _moe_names() if there}
    assert set(exported) - listed == {"topk_routing"}  # ours
