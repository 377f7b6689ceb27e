"""What the makers of each example's model say of its size, and where it was trained. Data only."""

from typing import NamedTuple


class Published(NamedTuple):
    """A model as published; parameters in billions, as precise as its makers give them."""

    example: str
    """Family and name: ``mixtral/8x7b`` is ``examples/mixtral/train_8x7b.sh``."""
    total: str
    active: str | None
    """Parameters that a token meets; None for a dense model, or where none is published."""
    source: str
    cluster: str
    """Where it was trained, or whose reference layout the example takes."""
    without_embedding: bool = False
    """The published number of active parameters leaves the embedding's rows out."""
    without_mtp: bool = False
    """Published numbers leave out the layers for multi-token prediction."""


PUBLISHED = (
    Published("mixtral/8x7b", "46.7", "12.9", "arXiv:2401.04088", "Megatron Core's reference"),
    Published("mixtral/8x22b", "141", "39", "model card", "128 GPUs, our layout"),
    Published(
        "deepseek/v3",
        "671",
        "37",
        "arXiv:2412.19437",
        "2048 H800, PP 16, EP 64, ZeRO-1 (section 3.2)",
        without_embedding=True,
        without_mtp=True,
    ),
    Published(
        "deepseek/v2",
        "236",
        "21",
        "arXiv:2405.04434",
        "H800, PP 16, EP 8, ZeRO-1 (section 3.1.3)",
        without_embedding=True,
    ),
    Published(
        "deepseek/v2_lite",
        "15.7",
        "2.4",
        "arXiv:2405.04434, B",
        "one node, our layout",
        without_embedding=True,
    ),
    Published("qwen/qwen3_30b_a3b", "30.5", "3.3", "model card", "Megatron Bridge's reference"),
    Published("qwen/qwen3_235b_a22b", "235", "22", "model card", "Megatron Bridge's reference"),
    Published("qwen/qwen2_57b_a14b", "57.4", "14", "arXiv:2407.10671", "our layout"),
    Published("qwen/qwen3_8b", "8.2", None, "model card", "one node, our layout"),
    Published("olmoe/1b_7b", "6.9", "1.3", "arXiv:2409.02060", "256 H100 (section 4)"),
    Published(
        "gpt_oss/20b",
        "20.91",
        "3.61",
        "arXiv:2508.10925, table 1",
        "our layout",
        without_embedding=True,
    ),
    Published(
        "gpt_oss/120b",
        "116.83",
        "5.13",
        "arXiv:2508.10925, table 1",
        "Megatron Bridge's reference",
        without_embedding=True,
    ),
    Published("llama/llama3_8b", "8.03", None, "model card", "one node, our layout"),
    Published("llama/llama3_70b", "70.6", None, "model card", "our layout"),
    Published(
        "llama/llama3_405b", "405", None, "arXiv:2407.21783", "8,192 H100, TP 8, PP 16 (table 4)"
    ),
    Published("grok/grok1", "314", None, "release of the weights", "not published; our layout"),
)
