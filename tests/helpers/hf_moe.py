"""MoE blocks of transformers beside ours: options of both, and where their weights are.

Their routers score in fp32 whatever they are given; ``InFp64`` lets the same code run in fp64.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

H, FFN, SHARED_FFN, E = 16, 24, 20, 8
_SIZES = {"num_attention_heads": 2, "hidden_size": H, "num_local_experts": E, "num_experts": E}


@dataclass(frozen=True)
class Family:
    """One MoE block of transformers, and the options with which ours is to equal it."""

    model: str
    """Module of transformers.models."""
    prefix: str
    """Of the names of its classes."""
    router: str
    block: str
    """Their names without the prefix."""
    theirs: Mapping[str, Any] = field(default_factory=dict)
    """Beside sizes and top-k."""
    ours: Mapping[str, Any] = field(default_factory=dict)
    """Of our config."""
    topks: tuple[int, ...] = (2, 3, E)

    def config(self, topk: int) -> Any:
        """Return their config."""
        package = f"transformers.models.{self.model}"
        configs = importlib.import_module(f"{package}.configuration_{self.model}")
        sizes = {"num_experts_per_tok": topk, **_SIZES, **self.theirs}
        config = getattr(configs, f"{self.prefix}Config")(**sizes)
        config._experts_implementation = "eager"
        return config

    def module(self, which: str, topk: int, dtype: torch.dtype) -> nn.Module:
        """Return their ``router`` or ``block``, with random weights, biases and buffers."""
        package = f"transformers.models.{self.model}"
        models = importlib.import_module(f"{package}.modeling_{self.model}")
        module = getattr(models, self.prefix + getattr(self, which))(self.config(topk))
        rng = torch.Generator().manual_seed(topk)
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = torch.randn(tensor.shape, generator=rng).to(dtype)
        return module


_SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_num_groups": 4,
    "moe_router_group_score_topk": 2,
}
_V2 = {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 1.5}
_V3_WIDTHS = {"moe_intermediate_size": FFN, "n_shared_experts": 1, "routed_scaling_factor": 2.5}
_V2_WIDTHS = {"moe_intermediate_size": FFN, "n_shared_experts": 1, "routed_scaling_factor": 1.5}
_QWEN2 = {"moe_intermediate_size": FFN, "shared_expert_intermediate_size": SHARED_FFN}
_QWEN2_OURS = {"moe_shared_expert_intermediate_size": SHARED_FFN, "moe_shared_expert_gate": True}
_ALL = {"moe_router_pre_softmax": True}
_MOE_FFN = {"moe_intermediate_size": FFN}
_MOE = ("TopKRouter", "SparseMoeBlock")

FAMILIES = {
    "mixtral": Family("mixtral", "Mixtral", *_MOE, {"intermediate_size": FFN}),
    "qwen2_moe": Family(
        *("qwen2_moe", "Qwen2Moe", *_MOE),
        {"norm_topk_prob": False, **_QWEN2},
        {**_ALL, **_QWEN2_OURS},
        (1, 2, E),
    ),
    "qwen2_moe normalised": Family(
        *("qwen2_moe", "Qwen2Moe", *_MOE), {"norm_topk_prob": True, **_QWEN2}, _QWEN2_OURS
    ),
    "qwen3_moe": Family(
        *("qwen3_moe", "Qwen3Moe", *_MOE), {"norm_topk_prob": False, **_MOE_FFN}, _ALL, (1, 2, E)
    ),
    "qwen3_moe normalised": Family(
        *("qwen3_moe", "Qwen3Moe", *_MOE), {"norm_topk_prob": True, **_MOE_FFN}
    ),
    "olmoe": Family(
        *("olmoe", "Olmoe", *_MOE),
        {"norm_topk_prob": False, "intermediate_size": FFN},
        _ALL,
        (1, 2, E),
    ),
    "olmoe normalised": Family(
        *("olmoe", "Olmoe", *_MOE), {"norm_topk_prob": True, "intermediate_size": FFN}
    ),
    "granitemoe": Family(
        *("granitemoe", "GraniteMoe", "TopKRouter", "MoE"), {"intermediate_size": FFN}
    ),
    "gpt_oss": Family(
        *("gpt_oss", "GptOss", "TopKRouter", "MLP"),
        {"intermediate_size": FFN, "swiglu_limit": 2.0},  # gates of size 4: many are cut off
        {
            "swiglu": False,
            "quick_geglu": True,
            "glu_linear_offset": 1.0,
            "activation_func_clamp_value": 2.0,
            "add_mlp_bias": True,
            "moe_router_bias": True,
        },
    ),
    "deepseek_v2 greedy": Family(
        *("deepseek_v2", "DeepseekV2", "TopkRouter", "Moe"),
        {"topk_method": "greedy", "n_group": 4, "topk_group": 2, **_V2_WIDTHS},
        {**_V2, "moe_shared_expert_intermediate_size": FFN},
        (1, 2, E),
    ),
    "deepseek_v2": Family(
        *("deepseek_v2", "DeepseekV2", "TopkRouter", "Moe"),
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, **_V2_WIDTHS},
        {
            **_V2,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
            "moe_router_group_score_topk": 1,
            "moe_shared_expert_intermediate_size": FFN,
        },
        (1, 2, 3, 4),
    ),
    "deepseek_v3": Family(
        *("deepseek_v3", "DeepseekV3", "TopkRouter", "MoE"),
        {"norm_topk_prob": True, "n_group": 4, "topk_group": 2, **_V3_WIDTHS},
        {
            **_SIGMOID,
            "moe_router_topk_scaling_factor": 2.5,
            "moe_router_group_topk": 2,
            "moe_shared_expert_intermediate_size": FFN,
        },
        (2, 3, 4),
    ),
    "deepseek_v3 not normalised": Family(
        *("deepseek_v3", "DeepseekV3", "TopkRouter", "MoE"),
        {"norm_topk_prob": False, "n_group": 4, "topk_group": 4, **_V3_WIDTHS},
        {
            **_SIGMOID,
            "moe_router_topk_scaling_factor": 2.5,
            "moe_router_group_topk": 4,
            "moe_router_norm_topk_prob": False,
            "moe_shared_expert_intermediate_size": FFN,
        },
        (1, 2, E),
    ),
}


class InFp64(TorchFunctionMode):
    """What the code under it casts to fp32 becomes fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func`` with fp64 in the place of fp32."""
        kwargs = {name: _wide(value) for name, value in (kwargs or {}).items()}
        if func is Tensor.float:
            func = Tensor.double
        return func(*map(_wide, args), **kwargs)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def ours_of(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of a block of theirs, or their gradients, under our logical names."""
    found: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        last = name.rpartition(".")[2]
        if name.startswith(("gate.", "router.")):
            found[f"router.{'expert_bias' if 'correction' in name else last}"] = tensor
        elif name.startswith("experts."):
            found.update(_experts(last, tensor, theirs))
        elif name.startswith("shared_expert_gate."):
            found["shared_experts.gate_weight"] = tensor
        elif ".down_proj." in name:
            found["shared_experts.linear_fc2.weight"] = tensor
        elif ".gate_proj." in name:
            up = theirs[name.replace("gate_proj", "up_proj")]
            found["shared_experts.linear_fc1.weight"] = torch.cat((tensor, up))
        else:
            assert ".up_proj." in name, f"{name} is unknown"
    return found


def _experts(last: str, tensor: Tensor, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    is_gpt_oss = "experts.down_proj_bias" in theirs  # [in, out], gate and up taking turns
    kind = "bias" if last.endswith("_bias") else "weight"
    matrix = "linear_fc1" if last.startswith("gate_up") else "linear_fc2"
    found = {}
    for expert, own in enumerate(tensor):
        if is_gpt_oss and kind == "weight":
            own = own.t()
        if is_gpt_oss and matrix == "linear_fc1":
            own = torch.cat((own[::2], own[1::2]))
        found[f"experts.local_experts.{expert}.{matrix}.{kind}"] = own
    return found
