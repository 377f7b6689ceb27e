"""Options of pipeline parallelism: how layers are cut into stages, and in which order ranks work.

TransformerConfig inherits them. What they mean together is in megatron.core.pipeline_parallel.
"""

from dataclasses import dataclass, fields
from typing import Literal


@dataclass(kw_only=True)
class PipelineConfig:
    """Pipeline parallelism."""

    pipeline_schedule: Literal["1f1b", "zb-h1", "zb-h2", "dualpipev"] = "1f1b"
    """Order of forwards and backwards on a pipeline rank: one of each by turns (1f1b, interleaved
    with several virtual stages), the same with weight gradients put off to where a rank would wait
    (zb-h1; zb-h2 keeps twice the activations), or two stages a rank in the shape of a V, so that
    the first rank has both ends of the model (dualpipev)."""

    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of each virtual stage: a pipeline rank holds several of them, and waits less."""

    num_virtual_stages_per_pipeline_rank: int | None = None
    """Virtual stages of each pipeline rank, instead of --num-layers-per-virtual-pipeline-stage. 1
    when neither is set."""

    microbatch_group_size_per_virtual_pipeline_stage: int | None = None
    """Microbatches that go through one virtual stage before the next one's turn;
    --pipeline-model-parallel-size when not set."""

    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first pipeline rank; the others share the rest evenly."""

    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last pipeline rank; the others share the rest evenly."""

    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as one layer when layers are split evenly."""

    account_for_loss_in_pipeline_split: bool = False
    """Count output layer and loss as one layer when layers are split evenly."""

    pipeline_model_parallel_layout: str | None = None
    """What each stage holds, such as "Et*3|(tt|)*2tL": E embedding, t layer, L output layer and
    loss, | between stages, *N repeats. auto cuts so that the most expensive stage costs least, by
    estimated cost."""


PIPELINE_OPTIONS = tuple(field.name for field in fields(PipelineConfig))
"""Options that are about one number of stages; another number has none of them."""
