"""Mistakes about dispatch, memory and layers that differ: command lines, and their messages."""

GOOD = "--num-layers 4 --hidden-size 64 --mock-data"
MOE = f"{GOOD} --num-experts 8"

# as in bad_input.py
MOE_CASES: dict[str, tuple[int, str, list[str]]] = {
    "flex dispatcher": (
        1,
        f"{MOE} --moe-token-dispatcher-type flex",
        ["alltoall_dedup", "DeepEP (deep_ep)", "use --moe-token-dispatcher-type alltoall"],
    ),
    "deepep backend": (
        1,
        f"{MOE} --moe-flex-dispatcher-backend deepep --moe-enable-deepep",
        ["DeepEP (deep_ep)", "--moe-enable-deepep is a Megatron-LM flag not offered here"],
    ),
    "chunks of 0 tokens": (1, f"{MOE} --moe-expert-chunk-tokens 0", ["must be at least 1"]),
    "overlap without shared experts": (
        1,
        f"{MOE} --moe-shared-expert-overlap",
        ["needs shared experts: add --moe-shared-expert-intermediate-size"],
    ),
    "overlap without all-to-all": (
        1,
        f"{MOE} --moe-shared-expert-overlap --moe-shared-expert-intermediate-size 8 "
        "--moe-token-dispatcher-type allgather",
        ["needs an all-to-all to hide behind"],
    ),
    "overlap of chunks": (
        1,
        f"{MOE} --moe-shared-expert-overlap --moe-shared-expert-intermediate-size 8 "
        "--moe-expert-chunk-tokens 8",
        ["contradicts --moe-expert-chunk-tokens 8"],
    ),
    "hidden dispatch without experts": (
        2,
        f"{GOOD} --overlap-moe-expert-parallel-comm",
        ["--overlap-moe-expert-parallel-comm needs a MoE layer: add --num-experts"],
    ),
    "late weight gradients alone": (
        2,
        f"{MOE} --delay-wgrad-compute --expert-model-parallel-size 2",
        ["--delay-wgrad-compute needs --overlap-moe-expert-parallel-comm: add it"],
    ),
    "hidden dispatch on one rank": (
        2,
        f"{MOE} --overlap-moe-expert-parallel-comm --global-batch-size 8",
        ["comm has no effect with --expert-model-parallel-size 1"],
    ),
    "hidden dispatch of one microbatch": (
        2,
        f"{MOE} --overlap-moe-expert-parallel-comm --expert-model-parallel-size 2 "
        "--micro-batch-size 3 --global-batch-size 6",
        [
            "a step has only one: --global-batch-size 6 = --micro-batch-size 3 x 2 data-parallel",
            "use a --global-batch-size of 12 or more",
        ],
    ),
    "hidden dispatch without all-to-all": (
        2,
        f"{MOE} --overlap-moe-expert-parallel-comm --expert-model-parallel-size 2 "
        "--global-batch-size 8 --moe-token-dispatcher-type allgather",
        ["needs an all-to-all to hide: use --moe-token-dispatcher-type alltoall"],
    ),
    "hidden dispatch of one stage a rank": (
        4,
        f"{MOE} --overlap-moe-expert-parallel-comm --expert-model-parallel-size 2 "
        "--global-batch-size 16 --pipeline-model-parallel-size 2",
        [
            "comm with --pipeline-model-parallel-size 2 needs several virtual stages a rank",
            "add --num-virtual-stages-per-pipeline-rank 2",
        ],
    ),
    "hidden dispatch of split backwards": (
        4,
        f"{MOE} --overlap-moe-expert-parallel-comm --expert-model-parallel-size 2 "
        "--global-batch-size 16 --pipeline-model-parallel-size 2 --pipeline-schedule zb-h1",
        ["comm runs whole backwards beside forwards, and --pipeline-schedule zb-h1 splits them"],
    ),
    "hidden dispatch of a V without a middle": (
        8,
        f"{MOE} --num-layers 8 --overlap-moe-expert-parallel-comm --expert-model-parallel-size 2 "
        "--micro-batch-size 1 --global-batch-size 6 --pipeline-model-parallel-size 4 "
        "--pipeline-schedule dualpipev",
        ["as many microbatches a step as --pipeline-model-parallel-size 4, not 3"],
    ),
    "grouped_gemm": (
        1,
        f"{MOE} --bf16 --moe-grouped-mm-backend grouped_gemm",
        ["needs the package grouped_gemm, which is not installed", "torch_native"],
    ),
    "products of no group": (
        1,
        f"{MOE} --moe-grouped-mm-backend torch_native --moe-experts-type sequential",
        ["no effect with --moe-experts-type sequential"],
    ),
    "fused GELU": (
        1,
        f"{MOE} --moe-fused-activation compiled",
        ["--moe-fused-activation compiled computes SwiGLU only", "add --swiglu"],
    ),
    "fused fp64": (
        1,
        f"{MOE} --swiglu --disable-bias-linear --fp64 --moe-fused-activation compiled",
        ["computes bf16 and fp32 only"],
    ),
    "fused sequential": (
        1,
        f"{MOE} --swiglu --disable-bias-linear --moe-fused-activation compiled "
        "--moe-experts-type sequential",
        ["no effect with --moe-experts-type sequential"],
    ),
    "fused elsewhere": (
        1,
        f"{MOE} --swiglu --disable-bias-linear --moe-fused-activation compiled "
        "--moe-grouped-mm-backend torch_native",
        ["no effect with --moe-grouped-mm-backend torch_native"],
    ),
    "fused unknown": (
        1,
        f"{MOE} --moe-fused-activation jit",
        ["off", "auto", "compiled"],
    ),
    "full without method": (
        1,
        f"{MOE} --recompute-granularity full",
        ["needs --recompute-method and --recompute-num-layers; uniform and 1"],
    ),
    "method without full": (
        1,
        f"{MOE} --recompute-method uniform --recompute-num-layers 1",
        ["have no effect without --recompute-granularity full"],
    ),
    "modules without selective": (
        1,
        f"{MOE} --recompute-modules moe",
        ["no effect without --recompute-granularity selective"],
    ),
    "recomputed norms": (
        1,
        f"{MOE} --recompute-granularity selective --recompute-modules layernorm",
        ["must be one of core_attn, mla_up_proj, moe_act", "or recompute whole layers"],
    ),
    "recomputed experts of a dense model": (
        1,
        f"{GOOD} --recompute-granularity selective --recompute-modules moe",
        ["--recompute-modules moe needs a MoE layer"],
    ),
    "recomputed MLPs of none": (
        1,
        f"{MOE} --recompute-granularity selective --recompute-modules mlp",
        ["there is no dense MLP"],
    ),
    "recomputed shared experts of none": (
        1,
        f"{MOE} --recompute-granularity selective --recompute-modules shared_experts",
        ["needs shared experts"],
    ),
    "shared experts twice": (
        1,
        f"{MOE} --recompute-granularity selective --recompute-modules moe shared_experts "
        "--moe-shared-expert-intermediate-size 8",
        ["moe recomputes shared experts as well"],
    ),
    "moe-layer-recompute": (
        1,
        f"{MOE} --moe-layer-recompute",
        ["--recompute-granularity selective --recompute-modules moe"],
    ),
    "pre-softmax of sigmoid": (
        1,
        f"{MOE} --moe-router-score-function sigmoid --moe-router-pre-softmax",
        ["no effect with --moe-router-score-function sigmoid"],
    ),
    "expert choice and what presumes top-k": (
        1,
        f"{MOE} --moe-router-type expert_choice --moe-router-num-groups 2 "
        "--moe-router-group-topk 1 --moe-router-enable-expert-bias "
        "--moe-router-load-balancing-type aux_loss",
        [
            "--moe-router-type expert_choice excludes --moe-router-num-groups, "
            "--moe-router-group-topk, --moe-router-enable-expert-bias, "
            "--moe-router-load-balancing-type aux_loss: every expert takes exactly its capacity",
        ],
    ),
    "expert choice and dropping": (
        1,
        f"{MOE} --moe-router-type expert_choice --moe-token-drop-policy position "
        "--moe-pad-expert-input-to-capacity",
        ["excludes --moe-token-drop-policy, --moe-pad-expert-input-to-capacity"],
    ),
    "policy of no dropping": (
        1,
        f"{MOE} --moe-router-type expert_choice --moe-token-drop-policy probs",
        ["--moe-token-drop-policy probs has no effect with --moe-router-type expert_choice"],
    ),
    "expert choice and pre-softmax": (
        1,
        f"{MOE} --moe-router-type expert_choice --moe-router-pre-softmax",
        ["excludes --moe-router-pre-softmax"],
    ),
    "hash and force": (
        1,
        f"{MOE} --moe-router-type hash --moe-router-force-load-balancing",
        ["--moe-router-type hash excludes --moe-router-force-load-balancing: a hash alone says"],
    ),
    "hash and a coefficient": (
        1,
        f"{MOE} --moe-router-type hash --moe-aux-loss-coeff 0.1",
        ["no effect with --moe-router-load-balancing-type none"],
    ),
    "hash of one without a gradient": (
        1,
        f"{MOE} --moe-router-type hash --moe-router-topk 1",
        ["needs --moe-router-pre-softmax"],
    ),
    "router type": (1, f"{MOE} --moe-router-type hashh", ["did you mean hash?"]),
    "one number of experts for each layer": (
        1,
        f"{GOOD} --moe-num-experts-per-layer 8",
        ["must be a pattern with one entry for each layer"],
    ),
    "experts of too few layers": (
        1,
        f"{GOOD} --moe-num-experts-per-layer [8]*3",
        ["--moe-num-experts-per-layer has 3 entries, one for each of --num-layers 4"],
    ),
    "experts of a dense layer": (
        1,
        f"{GOOD} --moe-num-experts-per-layer [8]*4 --moe-layer-freq [0,1,1,1]",
        ["holds 8 for layer 0, which --moe-layer-freq makes dense: write 0"],
    ),
    "two numbers of experts": (
        1,
        f"{MOE} --moe-num-experts-per-layer ([8]*2+[16]*2)",
        ["--num-experts 8 must be the largest entry of --moe-num-experts-per-layer, 16"],
    ),
    "two top-k": (
        1,
        f"{MOE} --moe-router-topk-per-layer [2]*4 --moe-router-topk 2",
        ["--moe-router-topk 2 has no effect with --moe-router-topk-per-layer"],
    ),
    "top-k of the small layers": (
        1,
        f"{GOOD} --moe-num-experts-per-layer [4,8,4,8] --moe-router-topk 6",
        ["--moe-router-topk 6 must lie between 1 and --num-experts 4 (in layers 0, 2)"],
    ),
    "ep of the smallest layer": (
        4,
        f"{GOOD} --moe-num-experts-per-layer [2,8,8,8] --expert-model-parallel-size 4",
        ["does not divide --moe-num-experts-per-layer [2,8,8,8]", "EP 2 DP 4; EP 1 DP 4"],
    ),
    "pattern of experts that runs": (
        1,
        f"{GOOD} --moe-num-experts-per-layer exit(3)",
        ["may hold only whole numbers"],
    ),
    "patterns without experts": (
        1,
        f"{GOOD} --moe-router-topk-per-layer [2]*4",
        ["needs a MoE layer: add --num-experts"],
    ),
}
