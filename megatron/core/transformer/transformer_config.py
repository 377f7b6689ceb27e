"""TransformerConfig: depth, width and every option of a layer, under Megatron's flat names.

Composed of mixins, so that a module can ask for the narrowest part it needs. Imports no torch:
``--help`` and configuration errors must come before torch is loaded.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from megatron.core.config_field import choice_problems, derived, flag
from megatron.core.errors import ConfigError
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.config.activation import ActivationConfig
from megatron.core.transformer.config.core_attention import CoreAttentionConfig
from megatron.core.transformer.config.fusion import FusionConfig
from megatron.core.transformer.config.init import InitConfig
from megatron.core.transformer.config.mla import MLAConfig
from megatron.core.transformer.config.mtp import MTPConfig
from megatron.core.transformer.config.pipeline import PipelineConfig
from megatron.core.transformer.config.precision import PrecisionConfig
from megatron.core.transformer.config.recompute import RecomputeConfig
from megatron.core.transformer.config.scaling import ScalingConfig
from megatron.core.transformer.moe.per_layer_config import MoEPerLayerConfig


@dataclass(kw_only=True)
class TransformerConfig(
    MoEPerLayerConfig,
    ActivationConfig,
    MLAConfig,
    CoreAttentionConfig,
    ScalingConfig,
    MTPConfig,
    InitConfig,
    PrecisionConfig,
    RecomputeConfig,
    FusionConfig,
    PipelineConfig,
    ModelParallelConfig,
):
    """Model shape."""

    num_layers: int = derived()
    """Transformer layers."""

    hidden_size: int = derived()
    """Width of the residual stream."""

    ffn_hidden_size: int | None = None
    """Width of the dense MLP; 4 x --hidden-size when not set, two thirds of that in multiples of 64
    where the MLP is gated (--swiglu, --geglu, --quick-geglu)."""

    add_bias_linear: bool = field(default=True, metadata=flag("--disable-bias-linear"))
    """Give linear layers a bias."""

    add_mlp_bias: bool = False
    """Give the matrices of MLP, shared experts and routed experts a bias even under
    --disable-bias-linear."""

    hidden_dropout: float = 0.1
    """Probability of dropping an element of an attention or MLP output in training."""

    untie_embeddings_and_output_weights: bool = False
    """Give the output layer a weight of its own instead of the embedding's."""

    def check(self) -> None:
        """Refuse a config that a model cannot be built of; a command line has passed more rules.

        Raises:
            ConfigError: Lists all problems, in the user's flags.
        """
        ConfigError.raise_if_any(self.problems())

    def problems(self) -> Iterator[str]:
        """Yield one sentence for each contradiction, in the user's flags."""
        yield from choice_problems(self)
        yield from self.parallel_problems()
        yield from self.activation_problems()
        yield from self.attention_problems(self.hidden_size)
        if self.num_attention_heads:
            yield from self.rotary_problems(self.rotary_dim)
        yield from self.core_attention_problems(self.num_layers)
        yield from self.scaling_problems()
        yield from self.precision_problems()
        yield from self.moe_problems()
        yield from self.recompute_problems()
        yield from self.layer_problems()
        yield from self.expert_slice_problems()
        yield from self.tensor_slice_problems()
        yield from self.context_slice_problems()

    def tensor_slice_problems(self) -> Iterator[str]:
        """Yield a sentence for each width that tensor-parallel ranks cannot share evenly."""
        size = self.tensor_model_parallel_size
        shown = f"--tensor-model-parallel-size {size}"
        if size > 1 and self.moe_enable_routing_replay:
            yield (
                f"--moe-enable-routing-replay with {shown} is not offered: a router sees a share "
                "of the tokens; replay with --tensor-model-parallel-size 1"
            )
        yield from self.group_slice_problems(size, self.hidden_size)
        widths = {"--num-attention-heads": self.num_attention_heads}
        is_sparse = self.num_moe_experts is not None and not any(self.layer_problems())
        if not (is_sparse and all(self.moe_layer_pattern)):
            widths["--ffn-hidden-size"] = self.ffn_size
        if self.num_moe_experts is not None:
            shared = self.moe_shared_expert_intermediate_size
            widths["--moe-shared-expert-intermediate-size"] = shared or 0
        for what, width in widths.items():
            if size > 0 and width and width % size:
                fits = [str(count) for count in range(1, 2 * size) if width % count == 0]
                yield f"{shown} must divide {what} {width}; sizes that fit: {', '.join(fits[-3:])}"

    def context_slice_problems(self) -> Iterator[str]:
        """Yield a sentence for each thing that the ranks of a sequence cannot do together."""
        size, kinds = self.context_parallel_size, self.cp_comm_type
        if len(kinds) not in (1, self.num_layers):
            yield (
                f"--cp-comm-type has {len(kinds)} entries; give one for all layers, or one for "
                f"each of --num-layers {self.num_layers}"
            )
        if size <= 1:
            return
        shown, tp = f"--context-parallel-size {size}", max(self.tensor_model_parallel_size, 1)
        split = f" / --tensor-model-parallel-size {tp}" if tp > 1 else ""
        heads, groups = self.num_attention_heads // tp, max(self.query_groups // tp, 1)
        if "a2a" in kinds and heads % size:
            yield (
                f"--cp-comm-type a2a spreads --num-attention-heads {self.num_attention_heads}"
                f"{split} = {heads} heads over {shown}, which must divide them; use p2p or "
                "all_gather"
            )
        elif "a2a" in kinds and groups % size and size % groups:
            yield (
                f"--cp-comm-type a2a spreads --num-query-groups {self.query_groups}{split} = "
                f"{groups} groups over {shown}; one of these two must divide the other; use p2p or "
                "all_gather"
            )
        if self.moe_enable_routing_replay:
            yield (
                f"--moe-enable-routing-replay with {shown} is not offered: a router sees a share "
                "of the tokens; replay with --context-parallel-size 1"
            )

    def expert_slice_problems(self) -> Iterator[str]:
        """Yield a sentence if the ranks that share an expert cannot have equal slices of it."""
        ffn, etp = self.moe_ffn_size, self.expert_tensor_size
        if self.num_moe_experts is not None and etp > 0 and ffn % etp:
            fits = [str(size) for size in range(1, 2 * etp) if ffn % size == 0]
            yield (
                f"--expert-tensor-parallel-size {etp} must divide the ffn size of an expert, {ffn} "
                f"(--moe-ffn-hidden-size, else --ffn-hidden-size); sizes that fit: "
                f"{', '.join(fits[-3:])}"
            )

    def layer_problems(self) -> Iterator[str]:
        """Yield one sentence for each way in which a pattern does not fit the layers."""
        freq = self.moe_layer_freq
        if self.num_moe_experts is None:
            if self.moe_num_experts_per_layer is not None:
                yield "--moe-num-experts-per-layer needs --num-experts, its largest entry"
        elif isinstance(freq, int) and freq < 1:
            yield f"--moe-layer-freq {freq} must be at least 1, or a pattern such as ([0]*3+[1]*9)"
        elif not isinstance(freq, int) and len(freq) != self.num_layers:
            yield (
                f"--moe-layer-freq has {len(freq)} entries, one for each of --num-layers "
                f"{self.num_layers} is needed"
            )
        else:
            yield from self.per_layer_problems(self.moe_layer_pattern)

    def moe_problems(self) -> Iterator[str]:
        """Yield one sentence for each contradiction in a MoE layer, naming those that differ."""
        if self.num_moe_experts is None or not self.has_layer_patterns:
            yield from super().moe_problems()
            return
        if any(self.layer_problems()):
            return  # said there; there is no config of a layer
        found: dict[str, list[str]] = {}
        for layer in self.moe_layers:
            for problem in self.for_layer(layer).moe_problems():
                found.setdefault(problem, []).append(str(layer))
        for problem, layers in found.items():
            everywhere = len(layers) == len(self.moe_layers)
            some = f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"
            yield f"{problem} (in {'all MoE layers' if everywhere else some})"

    def for_layer(self, layer_number: int) -> "TransformerConfig":
        """Return the config that one MoE layer is built from: its experts and top-k are numbers.

        Args:
            layer_number: Global index of a MoE layer; those of multi-token prediction, which
                count on, are as the last layer.

        Returns:
            This config itself where all layers are alike.
        """
        if not self.has_layer_patterns:
            return self
        layer_number = min(layer_number, self.num_layers - 1)  # of multi-token prediction
        assert self.moe_layer_pattern[layer_number], f"{layer_number=} is a dense layer"
        experts, topk = self.moe_num_experts_per_layer, self.moe_router_topk_per_layer
        return replace(
            self,
            num_moe_experts=self.num_moe_experts if experts is None else experts[layer_number],
            moe_router_topk=self.moe_router_topk if topk is None else topk[layer_number],
            moe_num_experts_per_layer=None,
            moe_router_topk_per_layer=None,
        )

    def of_last_layer(self) -> "TransformerConfig":
        """Return a config of which every layer is as the last one of this."""
        last = self.num_layers - 1
        config = self.for_layer(last) if self.moe_layer_pattern[last] else self
        has_window = self.attention_window_of(last) is not None
        return replace(
            config,
            cp_comm_type=[self.cp_comm_type_of(last)],
            window_size=self.window_size if has_window else None,
            window_attn_skip_freq=None,
        )

    @property
    def head_dim(self) -> int:
        """Size of one query and key head."""
        if self.multi_latent_attention:
            return self.qk_head_dim + self.qk_pos_emb_head_dim
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def value_head_dim(self) -> int:
        """Size of one value head."""
        return self.v_head_dim if self.multi_latent_attention else self.head_dim

    @property
    def rotary_channels(self) -> int:
        """Channels of a query or key that the tables of rotary positions are made for."""
        return self.qk_pos_emb_head_dim if self.multi_latent_attention else self.head_dim

    @property
    def rotary_dim(self) -> int:
        """How many of ``rotary_channels`` are rotated; even."""
        return int(self.rotary_channels * self.rotary_percent) // 2 * 2

    @property
    def attention_windows(self) -> list[int | None] | None:
        """For each layer the positions that a query sees before its own, see ``--window-size``."""
        return self.attention_windows_of(self.num_layers)

    @property
    def ffn_size(self) -> int:
        """Width of the dense MLP; of gate and up each where it is gated."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        width = 4 * self.hidden_size
        return max(64, width * 2 // 3 // 64 * 64) if self.gated_linear_unit else width

    @property
    def has_mlp_bias(self) -> bool:
        """Whether the matrices of MLP and experts have a bias."""
        return self.add_bias_linear or self.add_mlp_bias

    @property
    def moe_ffn_size(self) -> int:
        """Width of each expert; of gate and up each where it is gated."""
        return self.moe_ffn_hidden_size or self.ffn_size

    @property
    def moe_hidden_size(self) -> int:
        """Width of a token as the routed experts read and write it."""
        return self.moe_latent_size or self.hidden_size

    @property
    def moe_layer_pattern(self) -> tuple[bool, ...]:
        """For each layer, in order, whether it is a MoE layer."""
        if self.num_moe_experts is None:
            return (False,) * self.num_layers
        if isinstance(self.moe_layer_freq, int):
            return tuple(layer % self.moe_layer_freq == 0 for layer in range(self.num_layers))
        assert len(self.moe_layer_freq) == self.num_layers, (
            f"{self.moe_layer_freq=} needs one entry for each of {self.num_layers=}"
        )
        return tuple(map(bool, self.moe_layer_freq))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Global indices of the MoE layers, those of multi-token prediction among them."""
        pattern = self.moe_layer_pattern
        of_mtp = pattern[-1:] * self.mtp_depths
        return tuple(layer for layer, moe in enumerate((*pattern, *of_mtp)) if moe)

    @property
    def moe_experts_by_layer(self) -> tuple[int, ...]:
        """Number of experts of each of ``moe_layers``."""
        return tuple(self.for_layer(layer).num_moe_experts or 0 for layer in self.moe_layers)

    @property
    def moe_topk_by_layer(self) -> tuple[int, ...]:
        """Experts of a token in each of ``moe_layers``."""
        return tuple(self.for_layer(layer).moe_router_topk for layer in self.moe_layers)
