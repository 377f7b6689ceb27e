"""Bugs to plant: silent mistakes that MoE training suffers from, and the tests that see them.

Each is one exact piece of text, which stands once in its file, and what to put in its place.
`tests/planted/run.py` plants one at a time in a copy of the project. Whoever changes such a line
changes its bug with it. Tests are written as in docs/moe_features.md, with their whole case.
"""

from typing import NamedTuple

MOE = "megatron/core/transformer/moe"
TRAIN_STEP = "megatron/training/train_step.py"
DDP = "megatron/core/distributed/distributed_data_parallel.py"
UNEVEN = "test_train_step.py::test_uneven_masks_give_the_same_loss_and_gradients"
LINEAR = (
    "test_router.py::"
    "test_balance_gradient_is_linear_in_coefficient_and_scale_and_ignores_the_main_one"
)
LOSS_SCALE = "test_fp16.py::test_a_constant_scale_of_a_power_of_two_changes_no_bit"
LEARNS = "test_router.py::test_router_learns_from_the_main_loss_alone"
RULE = "test_routing.py::test_weights_and_gradients_are_those_of_the_plain_rule"
SCOPES = "test_router.py::test_several_balance_losses_each_keep_their_scope_and_coefficient"
ONE_UPDATE = (
    "test_expert_bias.py::"
    "test_a_step_moves_the_bias_once_by_the_counts_of_all_ranks_and_microbatches"
)
REPORT = (
    "test_moe_logging.py::"
    "test_report_sums_over_microbatches_steps_and_ranks_and_counts_recompute_once"
)
NO_TOKENS = "test_moe_layer.py::test_ranks_without_tokens_get_zero_gradients_and_no_hang"
DDP_LAYOUTS = (
    "test_distributed_data_parallel.py::test_gradients_of_every_layout_equal_those_of_one_process"
)
ONE_BIT = "test_replica_check.py::test_one_different_bit_on_one_rank_is_an_error_on_all_ranks"

STAGES = "test_pipeline.py::test_a_pipeline_equals_one_process"


class Bug(NamedTuple):
    name: str
    invariant: str
    """Number in docs/moe_features.md."""
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """Each of them fails when the bug is there."""


BUGS = (
    Bug(
        "balance losses are not divided by the microbatches",
        "R1",
        TRAIN_STEP,
        "aux_loss_scale=1.0 / forwards,",
        "aux_loss_scale=1.0 / run.world.pg_collection.dp.size(),",
        (f"{UNEVEN}[1---micro-batch-size 1]",),
    ),
    Bug(
        "balance losses are not divided by the data ranks",
        "R1",
        TRAIN_STEP,
        "aux_loss_scale=1.0 / forwards,",
        "aux_loss_scale=1.0 / run.num_microbatches,",
        (f"{UNEVEN}[2---micro-batch-size 2]",),
    ),
    Bug(
        "balance losses are not multiplied by the loss scale",
        "R1",
        f"{MOE}/router.py",
        "scale = context.aux_loss_scale * context.loss_scale",
        "scale = context.aux_loss_scale",
        (f"{LOSS_SCALE}[options0]", f"{LOSS_SCALE}[options1]"),
    ),
    Bug(
        "the coefficient of a balance loss enters twice",
        "R1",
        f"{MOE}/router.py",
        "losses[kind] * coeff, context",
        "losses[kind] * coeff * coeff, context",
        (f"{LINEAR}[aux_loss]", f"{LINEAR}[z_loss]"),
    ),
    Bug(
        "the balance loss follows the gradient of the main loss",
        "R1",
        f"{MOE}/load_balancing.py",
        "return grad_output, one * ctx.scale, None",
        "return grad_output, one * ctx.scale * grad_output.sum(), None",
        (f"{LINEAR}[aux_loss]",),
    ),
    Bug(
        "the balance loss of sequences is a sum over them",
        "R1",
        f"{MOE}/load_balancing.py",
        "scale = num_samples / (max(num_tokens, 1) * topk)",
        "scale = num_samples**2 / (max(num_tokens, 1) * topk)",
        (f"{SCOPES}[1]",),
    ),
    Bug(
        "gradients of experts are summed over all data ranks",
        "R2",
        DDP,
        "return groups.expt_dp",
        "return groups.dp_cp",
        (f"{DDP_LAYOUTS}[False-2-2]", f"{DDP_LAYOUTS}[False-4-2]"),
    ),
    Bug(
        "gradients are means over replicas, fewer for experts than for the rest",
        "R2",
        "megatron/core/distributed/param_and_grad_buffer.py",
        "return dist.all_reduce(self.grad_data[start:end], group=self.group, async_op=True)",
        "self.grad_data[start:end] /= self.group.size()\n"
        "        return dist.all_reduce(self.grad_data[start:end], group=self.group, "
        "async_op=True)",
        (
            f"{DDP_LAYOUTS}[False-2-1]",
            f"{UNEVEN}[4---micro-batch-size 1 --expert-model-parallel-size 2]",
        ),
    ),
    Bug(
        "the loss is divided by the tokens of one rank",
        "R2",
        TRAIN_STEP,
        "    dist.all_reduce(counts, group=world.pg_collection.dp_cp)\n",
        "",
        (
            f"{UNEVEN}[2---micro-batch-size 2]",
            "test_train_step.py::test_tokens_losses_and_notes_are_summed_over_all_ranks",
        ),
    ),
    Bug(
        "softmax twice",
        "R4",
        f"{MOE}/routing.py",
        "return softmax_over_experts(scores.masked_fill(",
        "return softmax_over_experts(softmax_over_experts(scores).masked_fill(",
        ("test_routing.py::test_default_weights_are_the_softmax_over_the_chosen_logits[4]",),
    ),
    Bug(
        "the weights of experts have no gradient",
        "R4",
        f"{MOE}/routing.py",
        "return probs if scaling_factor is None else probs * scaling_factor",
        "return probs.detach() * (scaling_factor or 1.0)",
        (f"{LEARNS}[options0]", f"{LEARNS}[options2]"),
    ),
    Bug(
        "balance losses are computed and tied to nothing",
        "R4",
        f"{MOE}/load_balancing.py",
        "return grad_output, one * ctx.scale, None",
        "return grad_output, one * 0.0, None",
        (f"{LINEAR}[aux_loss]", f"{SCOPES}[1]"),
    ),
    Bug(
        "a recomputed forward counts its tokens again",
        "R5",
        f"{MOE}/moe_logging.py",
        "self._counts[row, microbatch, : len(tokens_per_expert)] = tokens_per_expert",
        "self._counts[row, microbatch, : len(tokens_per_expert)] += tokens_per_expert",
        (
            REPORT,
            "test_router.py::test_a_second_forward_routes_the_same_and_is_counted_once",
        ),
    ),
    Bug(
        "tokens per expert are those of one rank",
        "R5",
        f"{MOE}/moe_logging.py",
        "counts = _sum_over(groups, self._count_sums).cpu()",
        "counts = self._count_sums.cpu()",
        (
            REPORT,
            "test_train_step.py::test_experts_are_counted_over_all_microbatches_and_ranks",
        ),
    ),
    Bug(
        "means of losses are sums over ranks",
        "R5",
        f"{MOE}/moe_logging.py",
        "means = sums / finite  # 0 / 0, NaN, where nothing was finite",
        "means = sums / (finite / groups[0].size())",
        (REPORT,),
    ),
    Bug(
        "the expert bias takes the dtype of the model",
        "R6",
        f"{MOE}/router.py",
        "setattr(self, name, buffer.to(self.weight.device))",
        "setattr(self, name, buffer.to(self.weight))",
        ("test_router.py::test_the_expert_bias_stays_fp32_to_the_bit_when_the_model_is_cast",),
    ),
    Bug(
        "the expert bias moves on a skipped step",
        "R6",
        TRAIN_STEP,
        "        if updated:\n            update_expert_biases(",
        "        if True:\n            update_expert_biases(",
        ("test_expert_bias.py::test_a_skipped_step_leaves_the_bias",),
    ),
    Bug(
        "the expert bias follows the tokens of one rank",
        "R6",
        f"{MOE}/moe_logging.py",
        "counts = all_reduce_sum(group, self._counts.sum(dim=1))",
        "counts = self._counts.sum(dim=1)",
        (ONE_UPDATE,),
    ),
    Bug(
        "biased scores weight the experts",
        "R6",
        f"{MOE}/routing.py",
        "    probs = combine_weights(\n",
        "    if expert_bias is not None:\n"
        "        logits = (log_scores(logits, score_function).exp() + expert_bias).logit(1e-6)\n"
        "    probs = combine_weights(\n",
        ("test_routing.py::test_an_expert_bias_chooses_experts_and_never_weights_them",),
    ),
    Bug(
        "replicas are compared with themselves",
        "R7",
        "megatron/core/distributed/replica_check.py",
        "    all_gather_single(every, mine, group=group)\n",
        "    every = mine.repeat(group.size())\n",
        (ONE_BIT,),
    ),
    Bug(
        "expert biases are not compared",
        "R7",
        "megatron/core/distributed/replica_check.py",
        "        yield from _saved_buffers(ddp.module)\n",
        "        yield from ()\n",
        (
            "test_replicas_in_time.py::test_one_bit_of_a_router_that_drifted_ends_the_run_at_the_next_check",
        ),
    ),
    Bug(
        "initial weights depend on the rank",
        "R7",
        "megatron/core/tensor_parallel/weight_init.py",
        'hashlib.sha256(f"{seed}/{key}".encode()).digest()',
        'hashlib.sha256(f"{seed}/{key}/{torch.distributed.get_rank()}".encode()).digest()',
        ("test_gpt_on_ranks.py::test_experts_on_two_ranks_are_those_of_one_process",),
    ),
    Bug(
        "a batch without tokens has a loss of 0/0",
        "R8",
        f"{MOE}/load_balancing.py",
        "        return max(logits.shape[0], 1)",
        "        return logits.shape[0]",
        ("test_load_balancing.py::test_losses_of_no_tokens_are_zero_and_have_an_empty_gradient",),
    ),
    Bug(
        "a capacity may be larger than the number of tokens",
        "R8",
        f"{MOE}/capacity.py",
        "first = topk_indices(by_expert, min(capacity, num_tokens))",
        "first = topk_indices(by_expert, capacity)",
        ("test_capacity.py::test_padding_gives_each_expert_exactly_its_capacity[10000.0-7-probs]",),
    ),
    Bug(
        "an expert without tokens gets no gradient",
        "R8",
        "megatron/core/extensions/torch_native.py",
        "        if not need_weight:\n",
        "        if not need_weight or not tokens_per_expert.all():\n",
        ("test_torch_native.py::test_an_expert_without_rows_has_a_zero_gradient_not_none",),
    ),
    Bug(
        "ties are broken as torch.topk likes",
        "R19",
        f"{MOE}/routing.py",
        "    if logits.dtype != torch.float32:\n",
        "    return logits.topk(topk, dim=1).indices\n    if logits.dtype != torch.float32:\n",
        ("test_routing.py::test_equal_logits_are_broken_by_the_lower_index[dtype0]",),
    ),
    Bug(
        "the gate is multiplied in bf16",
        "R19",
        f"{MOE}/wide_linear.py",
        "torch.mm(input_[rows].to(dtype), wide_weight, out=out[rows])",
        "out[rows] = input_[rows] @ weight.t()",
        ("test_router.py::test_bf16_weights_are_multiplied_in_fp32",),
    ),
    Bug(
        "scores are in the dtype of the model",
        "R19",
        f"{MOE}/routing.py",
        "    logits = logits if logits.dtype == torch.float64 else logits.float()\n",
        "",
        ("test_routing.py::test_scores_are_fp32_for_bf16_logits_and_fp64_for_fp64",),
    ),
    Bug(
        "copies of a tied embedding get the gradients of their own stage only",
        "R2",
        DDP,
        "return groups.dp_cp_ends",
        "return groups.dp_cp",
        (f"{STAGES}[two stages]", f"{STAGES}[sharded]"),
    ),
    Bug(
        "the norm counts a tied embedding on both stages",
        "R2",
        "megatron/core/optimizer/clip_grads.py",
        'is_copy = key.tied_ends == "apart" and groups.pp.rank() > 0',
        "is_copy = False",
        (f"{STAGES}[two stages]", f"{STAGES}[sharded]"),
    ),
    Bug(
        "the norm is that of one stage",
        "R2",
        "megatron/core/optimizer/clip_grads.py",
        "SpreadGradients(groups.mp, dense)",
        "SpreadGradients(groups.tp, dense)",
        (f"{STAGES}[two stages]", f"{STAGES}[zero bubble]"),
    ),
    Bug(
        "gradients are reduced after the first backward of a stage",
        "R2",
        "megatron/core/pipeline_parallel/executor.py",
        "return frozenset(last.values())",
        "return frozenset(steps)",
        (f"{STAGES}[zero bubble]", f"{STAGES}[dualpipev]"),
    ),
    Bug(
        "the report has the layers of one stage",
        "R5",
        f"{MOE}/moe_logging.py",
        "groups = pg_collection.dp, pg_collection.pp",
        "groups = (pg_collection.dp,)",
        (f"{STAGES}[virtual stages]", f"{STAGES}[zero bubble]"),
    ),
    Bug(
        "the held-out loss is known to the last stage only",
        "R5",
        "megatron/training/evaluate.py",
        "    sums = all_reduce_sum(groups.pp, sums)  # zeros where the stage has no loss\n",
        "",
        ("test_stages_of_a_run.py::test_every_rank_gets_the_held_out_loss",),
    ),
)
