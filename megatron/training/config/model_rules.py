"""Rules of the model, the MoE layer and the parallel sizes; each yields sentences."""

import importlib.util
import math
from collections.abc import Iterator

from megatron.core.transformer.config.activation import SWIGLU
from megatron.training.config.checks import Check, Rule, divisors, nearest
from megatron.training.config.position_rules import positions


def parallel_sizes(check: Check) -> Iterator[str]:
    """Ranks fill the dense grid and the expert grid, and what they share divides evenly."""
    model, world = check.config.model, check.world_size
    yield from model.parallel_problems()
    yield from _dense_grid(check)
    experts, size = model.num_moe_experts, model.expert_model_parallel_size
    if experts is None:
        if size > 1:
            yield f"{check.show('expert_model_parallel_size')} needs --num-experts"
        if model.expert_tensor_parallel_size is not None:
            yield f"{check.show('expert_tensor_parallel_size')} needs --num-experts"
        return
    yield from model.expert_slice_problems()
    several = model.moe_num_experts_per_layer is not None
    name = "moe_num_experts_per_layer" if several else "num_moe_experts"
    missed = [check.show(name)] if math.gcd(*_expert_counts(check)) % size else []
    alone = check.show("expert_model_parallel_size")
    shown, ranks = _expert_grid(check)
    if world % ranks and shown == alone:
        missed.append(_ranks(world))
    elif world % ranks:
        yield f"{shown} does not divide {_ranks(world)}"
    if missed:
        yield f"{alone} does not divide {' nor '.join(missed)}"


def _expert_grid(check: Check) -> tuple[str, int]:
    """Return the ranks that hold all experts once, in flags and as a number; 1 if that is TP's."""
    model, own = check.config.model, check.config.model.expert_tensor_parallel_size
    if model.expert_model_parallel_size == 1 and own is None:
        return "", 1  # said of the dense grid
    slices = "tensor_model_parallel_size" if own is None else "expert_tensor_parallel_size"
    shown = check.product("expert_model_parallel_size", slices, "pipeline_model_parallel_size")
    size = model.expert_model_parallel_size * model.expert_tensor_size
    return shown, size * model.pipeline_model_parallel_size


def _ranks(world_size: int) -> str:
    return f"the world size {world_size} (ranks of torchrun)"


def _expert_counts(check: Check) -> set[int]:
    """Return the numbers of experts that MoE layers have, each once."""
    model = check.config.model
    pattern = model.moe_num_experts_per_layer
    return {model.num_moe_experts or 0} | {number for number in pattern or () if number > 0}


def _dense_grid(check: Check) -> Iterator[str]:
    """Widths and vocabulary split evenly over tensor-parallel ranks, and those fill the world."""
    model, world = check.config.model, check.world_size
    yield from model.tensor_slice_problems()
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    cp = model.context_parallel_size
    if world % (tp * cp * pp):
        shown = check.product(
            "tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size"
        )
        yield f"{shown} does not divide {_ranks(world)}"
    yield from _context(check)
    if tp > 1 and check.config.logging.moe_routing_trace_path is not None:
        yield (
            "--moe-routing-trace-path is not offered with "
            f"{check.show('tensor_model_parallel_size')}: a router sees a share of the tokens; "
            "trace with --tensor-model-parallel-size 1"
        )
    length = check.config.data.seq_length
    if (model.sequence_parallel or model.num_moe_experts) and tp > 0 and length % tp:
        who = "--sequence-parallel shares" if model.sequence_parallel else "MoE layers share"
        yield (
            f"{who} {check.show('seq_length')} over "
            f"{check.show('tensor_model_parallel_size')}, which does not divide it"
        )
    vocab = check.config.tokenizer.padded_vocab_size
    if vocab is not None and vocab % tp:
        yield (
            f"{check.show('tensor_model_parallel_size')} must divide the padded vocabulary "
            f"{vocab}; leave out --padded-vocab-size, which is then chosen to fit"
        )


def _context(check: Check) -> Iterator[str]:
    """Each rank of a sequence takes two equal chunks, and tensor-parallel ranks share those."""
    model, length = check.config.model, check.config.data.seq_length
    yield from model.context_slice_problems()
    size = model.context_parallel_size
    if size == 1:
        yield from check.useless(
            "cp_comm_type", "with --context-parallel-size 1: no sequence is shared"
        )
        return
    is_shared = model.sequence_parallel or model.num_moe_experts is not None
    tp = model.tensor_model_parallel_size if is_shared else 1
    unit = size * math.lcm(2, tp)
    if length % unit:
        shared = f" with --tensor-model-parallel-size {tp}" if tp > 1 else ""
        near = [
            multiple for multiple in (length // unit * unit, -(-length // unit) * unit) if multiple
        ]
        yield (
            f"{check.show('context_parallel_size')}{shared} cuts a sequence into chunks: "
            f"{check.show('seq_length')} must be a multiple of {unit}, such as "
            f"{' or '.join(map(str, near))}"
        )
    if check.config.logging.moe_routing_trace_path is not None:
        yield (
            f"{check.show('context_parallel_size')} with --moe-routing-trace-path is not offered "
            "yet: a trace holds whole samples; leave one out"
        )


def heads(check: Check) -> Iterator[str]:
    """Heads share the width evenly, and query groups share the heads evenly."""
    model = check.config.model
    count, hidden = model.num_attention_heads, model.hidden_size
    yield from model.core_attention_problems(model.num_layers)
    if model.multi_latent_attention:
        yield from model.attention_problems(hidden)
        return
    if model.kv_channels is None and hidden % count:
        yield (
            f"{check.show('hidden_size')} must be a multiple of "
            f"{check.show('num_attention_heads')}, or give --kv-channels; heads that fit: "
            f"{nearest(count, divisors(hidden))}"
        )
    if not model.group_query_attention:
        yield from check.useless("num_query_groups", "without --group-query-attention")
    elif count % model.num_query_groups:
        yield (
            f"{check.show('num_query_groups')} must divide {check.show('num_attention_heads')}; "
            f"groups that fit: {nearest(model.num_query_groups, divisors(count))}"
        )
    yield from model.qk_norm_problems()


def activations(check: Check) -> Iterator[str]:
    """One activation, and options of gated ones where there is a gate."""
    model = check.config.model
    yield from model.activation_problems()
    if model.add_bias_linear:
        yield from check.useless(
            "add_mlp_bias", "without --disable-bias-linear: all linear layers have a bias"
        )


def number_format(check: Check) -> Iterator[str]:
    """One number format at a time."""
    yield from check.config.model.precision_problems()


def moe_without_experts(check: Check) -> Iterator[str]:
    """Options of the MoE layer need one."""
    if check.config.model.num_moe_experts is not None:
        return
    found = check.given(*(name for name in check.options if name.startswith("moe_")))
    flags = sorted(flag for flag in check.without_effect if flag.startswith("--moe-"))
    if found or flags:
        shown = ", ".join([*([check.show(*found)] if found else []), *flags])
        many = len(found) + len(flags) > 1
        yield (
            f"{shown} {'need' if many else 'needs'} a MoE layer: add --num-experts, or leave "
            f"{'them' if many else 'it'} out"
        )


def routing(check: Check) -> Iterator[str]:
    """What the config says of its MoE layer, and flags that contradict it."""
    model = check.config.model
    if model.num_moe_experts is None:
        return
    yield from model.moe_problems()
    if model.moe_router_topk_per_layer is not None:
        yield from check.useless("moe_router_topk", "with --moe-router-topk-per-layer")
    kind = model.moe_router_score_function
    if not model.moe_router_enable_expert_bias:
        yield from check.useless(
            "moe_router_bias_update_rate", "without --moe-router-enable-expert-bias"
        )
    if model.moe_router_choice != "quantile_balancing":
        yield from check.useless(
            "moe_router_quantile_balancing_ema",
            "without --moe-router-load-balancing-type quantile_balancing",
        )
    if kind != "softmax":
        yield from check.useless(
            "moe_router_pre_softmax", f"with --moe-router-score-function {kind}"
        )
    if model.moe_experts_type == "sequential" and "--moe-grouped-gemm" in check.without_effect:
        yield "--moe-grouped-gemm contradicts --moe-experts-type sequential; leave one out"


def moe_layers(check: Check) -> Iterator[str]:
    """--moe-layer-freq says for each layer whether it is MoE, and at least one is."""
    model = check.config.model
    freq = model.moe_layer_freq
    if model.num_moe_experts is None:
        return
    yield from model.layer_problems()
    if isinstance(freq, int):
        return
    others = sorted({entry for entry in freq if entry not in (0, 1)})
    if others:
        yield f"--moe-layer-freq holds {others[0]}; entries are 0 (dense) or 1 (MoE)"
    elif not any(freq):
        yield f"--moe-layer-freq makes no layer MoE; leave out {check.show('num_moe_experts')}"


def balancing(check: Check) -> Iterator[str]:
    """Without balancing there is no coefficient; the rest is a rule of the config."""
    model = check.config.model
    if model.num_moe_experts is not None and model.moe_router_load_balancing_type == ["none"]:
        yield from check.useless("moe_aux_loss_coeff", "with --moe-router-load-balancing-type none")


def capacity(check: Check) -> Iterator[str]:
    """Dropping and padding need a capacity."""
    model = check.config.model
    if model.num_moe_experts is None:
        return
    if model.chooses_by_expert:  # the config refuses padding and the other policy
        if model.moe_token_drop_policy == "probs":
            yield from check.useless(
                "moe_token_drop_policy", "with --moe-router-type expert_choice: it drops nothing"
            )
    elif model.moe_expert_capacity_factor is None:
        yield from check.useless(
            "moe_token_drop_policy moe_pad_expert_input_to_capacity",
            "without --moe-expert-capacity-factor",
        )


def recomputation(check: Check) -> Iterator[str]:
    """What is recomputed must be there, and options must be of the granularity that reads them."""
    model = check.config.model
    yield from model.recompute_problems()
    if model.recompute_granularity != "full":
        yield from check.useless(
            "recompute_method recompute_num_layers", "without --recompute-granularity full"
        )
    if model.recompute_granularity != "selective":
        yield from check.useless("recompute_modules", "without --recompute-granularity selective")
        return
    modules = model.recomputed_modules
    has_experts, layers = model.num_moe_experts is not None, model.moe_layer_pattern
    shown = f"--recompute-modules {' '.join(sorted(modules))}"
    if modules & {"moe", "moe_act"} and not has_experts:
        yield f"{shown} needs a MoE layer: add --num-experts, or leave it out"
    if "moe_act" in modules and model.moe_experts_type == "sequential":
        yield f"{shown}: moe_act needs --moe-experts-type grouped"
    if "mlp" in modules and all(layers):
        yield f"{shown}: there is no dense MLP, every layer is a MoE layer; give moe instead"
    no_shared = not has_experts or model.moe_shared_expert_intermediate_size is None
    if "shared_experts" in modules and no_shared:
        yield f"{shown} needs shared experts: add --moe-shared-expert-intermediate-size"
    elif "shared_experts" in modules and model.moe_shared_expert_overlap:
        yield f"{shown} contradicts --moe-shared-expert-overlap; leave one out, or give moe"


def grouped_products(check: Check) -> Iterator[str]:
    """A package that is asked for must be there, before anything is started."""
    model = check.config.model
    if model.num_moe_experts is None or model.moe_grouped_mm_backend == "auto":
        return
    shown = check.show("moe_grouped_mm_backend")
    if model.moe_experts_type != "grouped":
        yield f"{shown} has no effect with --moe-experts-type {model.moe_experts_type}"
    elif model.moe_grouped_mm_backend == "grouped_gemm":
        if importlib.util.find_spec("grouped_gemm") is None:
            yield (
                f"{shown} needs the package grouped_gemm, which is not installed: install it, or "
                "use --moe-grouped-mm-backend torch_native"
            )
        elif model.params_dtype_name != "bfloat16":
            instead = "use --bf16 instead of --fp16" if model.fp16 else "add --bf16"
            yield f"{shown} multiplies bf16 only: {instead}, or use torch_native"


def fused_activation(check: Check) -> Iterator[str]:
    """Compiled code that is asked for must have something to compute."""
    model, shown = check.config.model, check.show("moe_fused_activation")
    if model.num_moe_experts is None or model.moe_fused_activation != "compiled":
        return
    if model.activation_kind != SWIGLU:
        others = [flag for flag in model.activation_flags if flag != "--swiglu"]
        limits = check.given("glu_linear_offset", "activation_func_clamp_value")
        others += [check.show(name) for name in limits]
        instead = f"leave out {' and '.join(others)}" if others else "add --swiglu"
        yield f"{shown} computes SwiGLU only: {instead}, or leave it out"
    if model.params_dtype_name in ("float64", "float16"):
        wrong = "--fp64" if model.fp64 else "--fp16"
        yield f"{shown} computes bf16 and fp32 only: leave {wrong} or it out"
    for name, needed in (("moe_experts_type", "grouped"), ("moe_grouped_mm_backend", "auto")):
        if getattr(model, name) != needed:
            yield f"{shown} has no effect with {check.show(name)}; leave one out"
    if check.config.distributed.device == "cuda":
        yield f"{shown} is for CPUs: add --device cpu, or leave it out"


def nodes(check: Check) -> Iterator[str]:
    """Nodes and expert-parallel groups must not cut each other."""
    model = check.config.model
    if model.num_moe_experts is None:
        return
    if model.moe_token_dispatcher_type != "alltoall_hierarchical":
        yield from check.useless(
            "moe_dispatcher_node_size",
            "without --moe-token-dispatcher-type alltoall_hierarchical",
        )
        return
    group, node = model.expert_model_parallel_size, model.moe_dispatcher_node_size
    shown = check.show("expert_model_parallel_size")
    if (etp := model.expert_tensor_size) > 1:
        group *= etp
        shown += f" x {check.show('expert_tensor_parallel_size')} = {group}"
    if node is not None and max(group, node) % min(group, node):
        yield (
            f"{check.show('moe_dispatcher_node_size')} must divide, or be a multiple of, "
            f"{shown}; sizes within a group that fit: "
            f"{nearest(node, divisors(group))}"
        )


MODEL_RULES: tuple[Rule, ...] = (
    parallel_sizes,
    heads,
    positions,
    activations,
    number_format,
    moe_without_experts,
    routing,
    moe_layers,
    balancing,
    capacity,
    nodes,
    recomputation,
    grouped_products,
    fused_activation,
)
