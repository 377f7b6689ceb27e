"""Bugs of layouts to plant: right on one process, silently wrong on several.

Each must be seen by a quick layout of `tools/verify_layouts.py`, which also must name the tensor
that is wrong first, and why. Written like `tests/planted/bugs.py`; whoever changes such a line
changes its bug with it.
"""

from typing import NamedTuple

DDP = "megatron/core/distributed/distributed_data_parallel.py"
BUFFER = "megatron/core/distributed/param_and_grad_buffer.py"
TRAIN_STEP = "megatron/training/train_step.py"
NORM = "megatron/core/optimizer/clip_grads.py"
MOE = "megatron/core/transformer/moe"
TP = "megatron/core/tensor_parallel"
CP = "megatron/core/transformer/context_parallel"
EXPERT = r"decoder\.layers\.\d\.mlp\.experts\.local_experts\.\d"


class LayoutBug(NamedTuple):
    name: str
    invariant: str
    file: str
    old: str
    new: str
    layout: str
    """One of the quick layouts."""
    first: str
    """What the tool must say differs first: a regular expression."""
    factor: str
    """What it must say of the factor; empty for any."""
    cause: str
    """Words of the cause."""


LAYOUT_BUGS = (
    LayoutBug(
        "gradients of experts are summed over all data ranks",
        "R2",
        DDP,
        "return groups.expt_dp",
        "return groups.dp_cp",
        "ep2 allgather recompute-moe",
        rf"gradient of {EXPERT}",
        "",
        "gradients of experts only",
    ),
    LayoutBug(
        "gradients are means over replicas",
        "R2",
        BUFFER,
        "return dist.all_reduce(self.grad_data[start:end], group=self.group, async_op=True)",
        "self.grad_data[start:end] /= self.group.size()\n"
        "        return dist.all_reduce(self.grad_data[start:end], group=self.group, "
        "async_op=True)",
        "dp2",
        r"gradient of decoder\.final_layernorm",
        "factor 0.5 = 1 / DP",
        "scaled",
    ),
    LayoutBug(
        "balance losses grow with tensor parallelism",
        "R1",
        TRAIN_STEP,
        "aux_loss_scale=1.0 / forwards,",
        "aux_loss_scale=run.world.pg_collection.tp.size() / forwards,",
        "tp2 sp",
        r"gradient of decoder\.layers\.3\.pre_mlp_layernorm",
        "",
        "backward of what follows",
    ),
    LayoutBug(
        "balance losses are not shared out over the data ranks",
        "R1",
        TRAIN_STEP,
        "aux_loss_scale=1.0 / forwards,",
        "aux_loss_scale=1.0 / run.num_microbatches,",
        "dp2",
        r"gradient of decoder\.layers\.3\.pre_mlp_layernorm",
        "",
        "backward of what follows",
    ),
    LayoutBug(
        "the norm leaves out the experts of other ranks",
        "R3",
        NORM,
        "SpreadGradients(groups.tp_ep_pp, experts)",
        "SpreadGradients(groups.expt_tp, experts)",
        "ep2",
        r"grad norm",
        "",
        "a part is counted twice, or not on every rank",
    ),
    LayoutBug(
        "the norm counts replicas of tensor-parallel ranks",
        "R3",
        NORM,
        "if (key.split_over is not None or sharing.rank() == 0) and not is_copy:",
        "if not is_copy:",
        "tp2",
        r"grad norm",
        "",
        "a part is counted twice",
    ),
    LayoutBug(
        "the norm of the sharded optimizer is that of its slices",
        "R3",
        "megatron/core/optimizer/optimizer.py",
        "(buffer.layout.key, sum_over_ranks(own, buffer.group))",
        "(buffer.layout.key, own)",
        "dp2 zero1 dense-first",
        r"grad norm",
        "",
        "not on every rank",
    ),
    LayoutBug(
        "rows of experts come back to other tokens: blocks of two ranks swapped",
        "R2",
        f"{MOE}/token_dispatcher/alltoall.py",
        "state.splits.reversed(), during=during)\n        return unpermute(rows, state.plan)",
        "state.splits.reversed(), during=during)\n"
        "        rows = rows.roll(sum(state.splits.send[:1]), 0)\n"
        "        return unpermute(rows, state.plan)",
        "ep2",
        r"output of decoder\.layers\.0\.mlp",
        "no single factor",
        "splits of the dispatcher",
    ),
    LayoutBug(
        "routers learn from their share of the tokens",
        "R7",
        f"{MOE}/router.py",
        "sums_over_tp=self.positions is not None",
        "sums_over_tp=False",
        "tp2 sp etp1 ep2",
        r"gradient of decoder\.layers\.3\.mlp\.router\.weight",
        "",
        "gradients of routers only",
    ),
    LayoutBug(
        "norms learn from their share of the sequence",
        "R7",
        DDP,
        "return groups.tp_dp_cp if key.sums_over_tp else groups.dp_cp",
        "return groups.dp_cp",
        "tp2 sp",
        r"gradient of decoder\.final_layernorm",
        "",
        "not summed over tp",
    ),
    LayoutBug(
        "inputs learn from one slice of a matrix",
        "R2",
        f"{TP}/region_entry.py",
        "self._work = dist.all_reduce(grad, group=entry.group, async_op=True)",
        "grad *= self._ranks",
        "tp2",
        r"gradient of decoder\.final_layernorm",
        "no single factor",
        "not the mirror of its forward",
    ),
    LayoutBug(
        "ranks of a sequence read one half each",
        "R14",
        "megatron/training/datasets/batch.py",
        "name: take_own(tensor, rank, ranks, dim=2",
        "name: tensor.chunk(ranks, dim=2 if name == 'attention_mask' else 1)[rank]\n"
        "            if True\n"
        "            else take_own(tensor, rank, ranks, dim=2",
        "cp2-p2p",
        r"output of embedding",
        "no single factor",
        "positions of this rank's part of the sequence",
    ),
    LayoutBug(
        "keys of other ranks learn nothing",
        "R2",
        f"{CP}/ring.py",
        "(gradients,) = _passed(square.group, [gradients]).wait()",
        "gradients = _passed(square.group, [gradients]).wait()[0] * (square.group.size() == 1)",
        "cp2-p2p",
        r"gradient of decoder\.layers\.2",
        "no single factor",
        "backward of what follows",
    ),
    LayoutBug(
        "a rank of the sharded optimizer steps the slice of its neighbour",
        "R3",
        "megatron/core/distributed/bucket_layout.py",
        "    size = (end - start) // ranks\n    return start + rank * size",
        "    size, rank = (end - start) // ranks, (rank + 1) % ranks\n"
        "    return start + rank * size",
        "dp2 zero1 dense-first",
        r"weight of embedding\.word_embeddings",
        "",
        "the slices that the sharded optimizer owns",
    ),
    LayoutBug(
        "the loss is divided by the tokens of one rank",
        "R14",
        TRAIN_STEP,
        "    dist.all_reduce(counts, group=world.pg_collection.dp_cp)\n",
        "",
        "dp2",
        r"lm loss",
        "",
        "over the wrong group",
    ),
    LayoutBug(
        "the loss is added up by every tensor-parallel rank",
        "R14",
        TRAIN_STEP,
        "share = losses.sum() if world.pg_collection.tp.rank() == 0 else "
        "torch.zeros_like(losses[0])",
        "share = losses.sum()",
        "tp2",
        r"lm loss",
        "factor 2 = TP",
        "over the wrong group",
    ),
    LayoutBug(
        "dropout of the residual stream depends on the rank",
        "R7",
        f"{TP}/random.py",
        ".chunk(self.ranks)[self.rank]",
        ".chunk(self.ranks)[0]",
        "tp2 sp",
        r"output of decoder\.layers\.0\.pre_mlp_layernorm",
        "no single factor",
        "dropout that depends on the rank",
    ),
    LayoutBug(
        "every rank drops the attention weights of the first heads",
        "R7",
        "megatron/core/transformer/dot_product_attention.py",
        "self.first_head = tp.rank() * (config.num_attention_heads // tp.size())",
        "self.first_head = 0",
        "tp2",
        r"output of decoder\.layers\.0\.self_attention",
        "",
        "dropout of attention weights",
    ),
    LayoutBug(
        "every rank that shares an expert adds its bias",
        "R2",
        f"{MOE}/output_bias.py",
        "return pg_collection.expt_tp.rank() == 0",
        "return True",
        "etp2",
        r"output of decoder\.layers\.0\.mlp .*step 2",
        "",
        "an output bias added by several ranks",
    ),
    LayoutBug(
        "a token that another rank holds is looked up all the same",
        "R14",
        f"{TP}/layers/vocab_embedding.py",
        "found.masked_fill(missing.unsqueeze(-1), 0.0))",
        "found)",
        "tp2",
        r"output of embedding",
        "",
        "rows of the vocabulary slices",
    ),
    LayoutBug(
        "the softmax of the loss is over one slice of the vocabulary",
        "R14",
        f"{TP}/cross_entropy.py",
        "total, chosen = all_reduce_(shares, torch.stack([total, chosen]))",
        "chosen = all_reduce_(shares, torch.stack([total, chosen]))[1]",
        "tp2",
        r"output of loss of each token",
        "",
        "cross entropy over slices of the vocabulary",
    ),
    LayoutBug(
        "tokens per expert are those of one rank",
        "R5",
        f"{MOE}/moe_logging.py",
        "counts = _sum_over(groups, self._count_sums).cpu()",
        "counts = self._count_sums.cpu()",
        "dp2",
        r"tokens per expert",
        "",
        "figures alone",
    ),
    LayoutBug(
        "a recomputed forward counts its tokens again",
        "R5",
        f"{MOE}/moe_logging.py",
        "self._counts[row, microbatch, : len(tokens_per_expert)] = tokens_per_expert",
        "self._counts[row, microbatch, : len(tokens_per_expert)] += tokens_per_expert",
        "recompute-full",
        r"tokens per expert",
        "factor 2",
        "recomputed forwards counted again",
    ),
    LayoutBug(
        "a tied weight learns at each end of the pipeline alone",
        "R2",
        DDP,
        "return groups.dp_cp_ends",
        "return groups.dp_cp",
        "pp2",
        r"gradient of embedding\.word_embeddings\.weight",
        "",
        "gradient of the embedding only",
    ),
    LayoutBug(
        "the norm counts a tied weight at both ends",
        "R3",
        NORM,
        'is_copy = key.tied_ends == "apart" and groups.pp.rank() > 0',
        "is_copy = False",
        "pp2",
        r"grad norm",
        "",
        "a part is counted twice",
    ),
    LayoutBug(
        "the norm is that of a stage",
        "R3",
        NORM,
        "SpreadGradients(groups.mp, dense)",
        "SpreadGradients(groups.tp, dense)",
        "pp2 ep2 dense-first",
        r"grad norm",
        "",
        "not on every rank",
    ),
    LayoutBug(
        "the gradient of a chunk is lost",
        "R2",
        "megatron/core/pipeline_parallel/executor.py",
        'gradient = self._take(Product("gradient", step.microbatch, stage + 1))',
        'gradient = self._take(Product("gradient", step.microbatch, stage + 1))\n'
        "            gradient *= step.chunk == 0",
        "pp2 untied interleaved",
        r"gradient of decoder\.layers\.2 ",
        "factor 0: it is missing",
        "backward of what follows",
    ),
)
