"""What a run uses where the user says nothing: derived from the rest, and announced.

Pure: takes the options, the world size and what was found on disk, and returns new options.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron.core.dist_checkpointing.object_folders import place
from megatron.core.errors import ConfigError
from megatron.core.extensions.object_store import ObjectPath
from megatron.core.pipeline_parallel.layer_balance import estimated_costs
from megatron.core.pipeline_parallel.layer_homes import V_SHAPED
from megatron.core.pipeline_parallel.layer_split import balanced_split, layout_of
from megatron.training.config.checks import divisors
from megatron.training.config.data_source import DataSource
from megatron.training.config.options import Option
from megatron.training.config.run_config import RunConfig

HEAD_DIM = 64
SEQ_LENGTH = 1024
MICRO_BATCH_SIZE = 2
MOCK_ITERS = 100
LEARNING_RATE = 3e-4
WARMUP_FRACTION = 0.01
EVAL_ITERS = 100


@dataclass(kw_only=True)
class Derivation:
    """Options on the way to being complete; ``config`` is a copy, ``notices`` grow."""

    config: RunConfig
    options: dict[str, Option]
    world_size: int
    source: DataSource
    node_size: int | None = None
    notices: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def is_set(self, name: str) -> bool:
        """Return whether the option has a value already."""
        return self.get(name) is not None

    def get(self, name: str) -> Any:
        """Return the option's value, by field name."""
        return getattr(getattr(self.config, self.options[name].section), name)

    def use(self, name: str, value: Any, why: str = "") -> None:
        """Set an option and announce it, unless ``why`` is empty."""
        setattr(getattr(self.config, self.options[name].section), name, value)
        self.config.sources[name] = "derived"
        if why:
            self.notices.append(f"using {self.options[name].show(value)} ({why})")


def derive(
    config: RunConfig,
    options: dict[str, Option],
    world_size: int,
    source: DataSource,
    *,
    node_size: int | None = None,
) -> Derivation:
    """Complete the options.

    Args:
        config: Options as given; --num-layers and --hidden-size are set. Not changed.
        options: The table of all options.
        world_size: Ranks of the run; all of them are data-parallel.
        source: What was found on disk.
        node_size: Ranks of this node, where the launcher says it.

    Returns:
        The complete options, the announcements, and the problems found on the way.
    """
    run = Derivation(
        config=copy.deepcopy(config),
        options=options,
        world_size=world_size,
        source=source,
        node_size=node_size,
    )
    for step in _STEPS:
        step(run)
    return run


def _experts(run: Derivation) -> None:
    model = run.config.model
    if model.num_moe_experts == 0:
        model.num_moe_experts = None
        run.notices.append("--num-experts 0: all layers are dense")
        return
    experts, topk = model.moe_num_experts_per_layer, model.moe_router_topk_per_layer
    if experts and not run.config.given("num_moe_experts"):
        why = "the largest entry of --moe-num-experts-per-layer"
        run.use("num_moe_experts", max(experts) or None, why)
    if topk and not run.config.given("moe_router_topk"):
        why = "the largest entry of --moe-router-topk-per-layer"
        run.use("moe_router_topk", max(topk), why)


def _router_type(run: Derivation) -> None:
    model = run.config.model
    if model.num_moe_experts is None or model.moe_router_type == "topk":
        return
    by_hash = model.moe_router_type == "hash"
    if not run.config.given("moe_router_load_balancing_type"):
        why = "a loss cannot move a hash" if by_hash else "experts take equal numbers of tokens"
        run.use("moe_router_load_balancing_type", ["none"], why)
    if not by_hash:
        run.notices.append(
            "CAUSALITY: --moe-router-type expert_choice looks at later tokens in training, so the "
            "training loss is too good; evaluation and generation send each token to its k best "
            "experts instead"
        )


def _latent_attention(run: Derivation) -> None:
    if not run.config.model.multi_latent_attention:
        return
    for name, value, why in (
        ("position_embedding_type", "rope", "--multi-latent-attention keeps positions so"),
        ("rotary_interleaved", True, "the pairs of --multi-latent-attention"),
        ("qk_layernorm", True, "the latents of --multi-latent-attention are always normalised"),
    ):
        if run.config.sources.get(name, "default") == "default":
            run.use(name, value, why)
    if run.config.model.rope_scaling == "none" and run.config.given("rope_scaling_factor"):
        why = "what --multi-latent-attention means by --rotary-scaling-factor alone"
        run.use("rope_type", "yarn", why)


def _heads(run: Derivation) -> None:
    if run.is_set("num_attention_heads"):
        return
    model = run.config.model
    hidden, groups = model.hidden_size, run.get("num_query_groups")
    if model.kv_channels is not None:
        heads = max(1, hidden // model.kv_channels)
        run.use("num_attention_heads", heads, f"hidden {hidden} / heads of {model.kv_channels}")
        return
    even = [d for d in divisors(hidden) if d % 2 == 0 and hidden // d % groups == 0]
    sizes = even or [d for d in divisors(hidden) if hidden // d % groups == 0] or [hidden]
    size = min(sizes, key=lambda d: max(d / HEAD_DIM, HEAD_DIM / d))
    run.use("num_attention_heads", hidden // size, f"hidden {hidden} / heads of {size}")


def _sequence(run: Derivation) -> None:
    if not run.is_set("seq_length"):
        length, why = SEQ_LENGTH, "the default"
        longest = run.get("max_position_embeddings")
        if longest is not None and longest < length:
            length, why = longest, "all of --max-position-embeddings"
        facts = run.source.facts
        while facts is not None and length > 1 and facts.samples_per_epoch(length) < 1:
            length //= 2
            why = f"the training split has only {facts.num_tokens:,} tokens"
        run.use("seq_length", length, why)
    if not run.is_set("max_position_embeddings"):
        run.use("max_position_embeddings", run.get("seq_length"))


def _batches(run: Derivation) -> None:
    micro, whole = run.get("micro_batch_size"), run.get("global_batch_size")
    world = run.config.model.data_ranks(run.world_size)
    if micro is None:
        micro, why = MICRO_BATCH_SIZE, "the default"
        if whole is not None and whole % world == 0:
            share = whole // world
            micro = max(d for d in range(1, MICRO_BATCH_SIZE + 1) if share % d == 0)
            why = f"divides --global-batch-size {whole} / {world} data-parallel ranks"
        elif whole is not None:
            micro = 1
        run.use("micro_batch_size", micro, why)
    if whole is None:
        ranks = f"{world} data-parallel rank{'s' if world > 1 else ''}"
        run.use("global_batch_size", micro * world, f"--micro-batch-size {micro} x {ranks}")


def _iterations(run: Derivation) -> None:
    if run.is_set("train_iters"):
        return
    facts, length, batch = run.source.facts, run.get("seq_length"), run.get("global_batch_size")
    if facts is None:
        run.use("train_iters", MOCK_ITERS, "mock data has no end")
        return
    samples = facts.samples_per_epoch(length)
    run.use(
        "train_iters",
        max(1, samples // batch),
        f"one epoch: {facts.num_tokens:,} training tokens / --seq-length {length} = {samples:,} "
        f"samples, {batch} a step",
    )


def _schedule_of_checkpoint(run: Derivation) -> None:
    stored = run.source.schedule
    if stored is None:
        return
    batch, iters = run.get("global_batch_size"), run.get("train_iters")
    found = stored.options(batch=batch, train_iters=iters)
    run.problems += found.problems
    if stored.values:
        lines = found.lines(run.config.flat(), run.config.given, run.options)
        run.notices.append(f"{stored.told}: {', '.join(lines) or 'as the flags say'}")
    elif stored.told:
        run.notices.append(stored.told)
    for name, value in found.values.items():
        run.use(name, value)
        run.config.sources[name] = "checkpoint"


def _schedule(run: Derivation) -> None:
    if not run.is_set("lr_decay_iters"):
        run.use("lr_decay_iters", run.get("train_iters"))
    if run.is_set("lr"):
        return
    run.use("lr", LEARNING_RATE, "the default")
    silent = not run.config.given("lr_warmup_iters") and not run.is_set("lr_warmup_fraction")
    if silent and run.get("optimizer") == "adam":
        run.use("lr_warmup_fraction", WARMUP_FRACTION, "since --lr is not given either")


def _tokenizer(run: Derivation) -> None:
    source = run.source
    for name, value in source.tokenizer.items():
        run.use(name, value, f"from {source.tokenizer_from}")
    if source.vocab_size is None:
        return
    padded = run.get("padded_vocab_size")
    if padded is None:
        unit = run.get("make_vocab_size_divisible_by") * run.get("tensor_model_parallel_size")
        padded = -(-source.vocab_size // unit) * unit
        run.use("padded_vocab_size", padded, f"{source.vocab_size} ids, a multiple of {unit}")
    elif padded < source.vocab_size:
        run.problems.append(
            f"--padded-vocab-size {padded} must be at least the {source.vocab_size} ids of "
            f"--tokenizer-type {run.get('tokenizer_type')}"
        )
        return
    _unpadded(run, source.vocab_size, padded)


def _unpadded(run: Derivation, ids: int, padded: int) -> None:
    tokens = run.get("unpadded_vocab_size")
    if tokens is None:
        run.use("unpadded_vocab_size", ids)
    elif not ids <= tokens <= padded:
        run.problems.append(
            f"--unpadded-vocab-size {tokens} must lie between the {ids} ids of --tokenizer-type "
            f"{run.get('tokenizer_type')} and the {padded} rows of the embedding"
        )


def _pipeline_layout(run: Derivation) -> None:
    model = run.config.model
    pp = model.pipeline_model_parallel_size
    vocab_size = run.get("padded_vocab_size")
    wanted = model.pipeline_model_parallel_layout == "auto" and pp > 1
    if not wanted or vocab_size is None or any(model.layer_problems()):
        return
    stages_a_rank = 2 if model.pipeline_schedule in V_SHAPED else 1
    stages_a_rank = model.num_virtual_stages_per_pipeline_rank or stages_a_rank
    costs = estimated_costs(model, seq_length=run.get("seq_length"), vocab_size=vocab_size)
    try:
        split = balanced_split(costs, pp * stages_a_rank)
    except ConfigError as error:
        run.problems += error.problems or (str(error),)
        return
    why = "balanced by estimated cost of dense and MoE layers, embedding and output layer"
    run.use("pipeline_model_parallel_layout", layout_of(split), why)


def _evaluation(run: Derivation) -> None:
    if run.is_set("eval_iters"):
        if run.get("eval_iters") == 0:
            run.notices.append("no evaluation: --eval-iters 0")
        return
    if not _has_validation(run):
        run.use("eval_iters", 0, "there is no validation data")
        return
    iters = run.get("train_iters")
    tenth = max(1, iters // 10)
    why = "the default" if tenth >= EVAL_ITERS else f"a tenth of --train-iters {iters}"
    run.use("eval_iters", min(EVAL_ITERS, tenth), why)


def _has_validation(run: Derivation) -> bool:
    from megatron.core.datasets.splits import DEFAULT_SPLIT, parse_split
    from megatron.core.errors import ConfigError

    data = run.config.data
    if data.mock_data or data.valid_data_path:
        return True
    if data.data_path is None:
        return False
    try:
        return parse_split(data.split or DEFAULT_SPLIT)[1] > 0
    except ConfigError:
        return True  # a rule reports the split


def _nodes(run: Derivation) -> None:
    hierarchical = run.get("moe_token_dispatcher_type") == "alltoall_hierarchical"
    if hierarchical and not run.is_set("moe_dispatcher_node_size"):
        size = run.node_size or run.world_size
        run.use("moe_dispatcher_node_size", size, "ranks that torchrun started on a node")


def _figures(run: Derivation) -> None:
    """Files that grow line by line have no place in a store where an object is written at once."""
    save = run.get("save")
    if save is not None and not run.is_set("log_dir") and isinstance(place(save), ObjectPath):
        why = "--save is an object store, and metrics need a folder"
        run.use("log_dir", f"runs/{save.partition('://')[2].strip('/')}", why)


def _checks_of_ranks(run: Derivation) -> None:
    """Leave out checks that compare ranks where there is one: a script may keep them."""
    if run.world_size > 1:
        return
    for name, nothing in (("check_replica_hash", None), ("check_collectives", False)):
        if run.get(name):
            run.notices.append(
                f"{run.options[name].show(run.get(name))}: nothing to compare on one rank"
            )
            run.use(name, nothing)


def _sequence_parallelism(run: Derivation) -> None:
    model = run.config.model
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        model.sequence_parallel = False
        run.notices.append(
            "--sequence-parallel: nothing to split with --tensor-model-parallel-size 1"
        )


def _balancing(run: Derivation) -> None:
    model = run.config.model
    if model.num_moe_experts is None:
        return
    if model.moe_router_force_load_balancing:
        run.notices.append(
            "routing is RANDOM (--moe-router-force-load-balancing): for benchmarks only, the model "
            "learns no routing"
        )
    if model.moe_router_force_biased is not None:
        run.notices.append(
            "routing is RANDOM and skewed (--moe-router-force-biased): for benchmarks only, the "
            "model learns no routing"
        )
    if model.moe_enable_routing_replay:
        run.notices.append(
            "routing replay: each router owns a RouterReplay; nothing is recorded or replayed "
            "until a script says so (RouterReplay.set_global_router_replay_action)"
        )
    if model.moe_router_choice != "topk":
        return
    kinds = model.moe_router_load_balancing_type
    if kinds != ["none"] and model.moe_aux_loss_coeff is None:
        run.use("moe_aux_loss_coeff", [0.01] * len(kinds))
        run.notices.append(
            f"load balancing: {', '.join(kinds)} with coefficient 0.01 (Megatron-LM's default 0.0 "
            "would turn balancing off; set --moe-aux-loss-coeff)"
        )
    elif model.moe_router_type != "topk":
        return  # said by _router_type
    elif not model.aux_loss_coeffs and not model.moe_router_enable_expert_bias:
        run.notices.append(
            "load balancing: OFF, by request; watch tokens per expert in the log, experts may die"
        )


_STEPS: tuple[Callable[[Derivation], None], ...] = (
    _experts,
    _latent_attention,
    _heads,
    _sequence,
    _sequence_parallelism,
    _checks_of_ranks,
    _figures,
    _batches,
    _iterations,
    _schedule_of_checkpoint,
    _schedule,
    _tokenizer,
    _pipeline_layout,
    _evaluation,
    _router_type,
    _balancing,
    _nodes,
)
