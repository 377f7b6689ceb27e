"""The table of mistakes: command lines and what the message about them must say."""

from tests.functional.bad_activation_input import ACTIVATION_CASES
from tests.functional.bad_attention_input import ATTENTION_CASES
from tests.functional.bad_checkpoint_input import CHECKPOINT_CASES
from tests.functional.bad_context_input import CONTEXT_CASES
from tests.functional.bad_core_attention_input import CORE_ATTENTION_CASES
from tests.functional.bad_dry_run_input import DRY_RUN_CASES
from tests.functional.bad_fusion_input import FUSION_CASES
from tests.functional.bad_huggingface_input import HUGGINGFACE_CASES
from tests.functional.bad_latent_input import LATENT_CASES
from tests.functional.bad_loss_scale_input import LOSS_SCALE_CASES
from tests.functional.bad_moe_input import MOE_CASES
from tests.functional.bad_mtp_input import MTP_CASES
from tests.functional.bad_optimizer_input import OPTIMIZER_CASES
from tests.functional.bad_pipeline_input import PIPELINE_CASES
from tests.functional.bad_router_input import ROUTER_CASES
from tests.functional.bad_scaling_input import SCALING_CASES
from tests.functional.bad_sharded_input import SHARDED_CASES
from tests.functional.bad_store_input import STORE_CASES
from tests.functional.bad_upcycling_input import UPCYCLING_CASES

SHAPE = "--num-layers 4 --hidden-size 64"
GOOD = f"{SHAPE} --mock-data"
MOE = f"{GOOD} --num-experts 8"

# name -> (world size, command line, what the message must say)
BAD: dict[str, tuple[int, str, list[str]]] = {
    "no model": (1, "--mock-data", ["--num-layers is missing", "--hidden-size is missing"]),
    "no data": (1, SHAPE, ["--data-path PREFIX", "--mock-data"]),
    "both precisions": (1, f"{GOOD} --bf16 --fp64", ["--bf16 and --fp64 exclude each other"]),
    **ACTIVATION_CASES,
    **FUSION_CASES,
    **LOSS_SCALE_CASES,
    **UPCYCLING_CASES,
    "typo": (1, f"{MOE} --moe-rooter-topk 2", ["did you mean --moe-router-topk?"]),
    "abbreviation": (1, f"{MOE} --moe-router-top 2", ["did you mean --moe-router-topk?"]),
    "attention backend": (1, f"{GOOD} --attention-backend flsh", ["did you mean flash?"]),
    "wrong type": (1, f"{GOOD} --lr fast", ["--lr fast: must be a number"]),
    "wrong choice": (1, f"{GOOD} --lr-decay-style cosin", ["did you mean cosine?"]),
    "too few tokens": (
        1,
        f"{GOOD} --vocab-size 100 --unpadded-vocab-size 90",
        ["--unpadded-vocab-size 90 must lie between the 101 ids of --tokenizer-type NullTokenizer"],
    ),
    **MOE_CASES,
    **ATTENTION_CASES,
    "scaling by 0": (1, f"{MOE} --moe-router-topk-scaling-factor 0", ["must be above 0"]),
    "tensor parallel positions of experts": (
        2,
        f"{MOE} --tensor-model-parallel-size 2 --num-attention-heads 4 --seq-length 63",
        ["MoE layers share --seq-length 63 over --tensor-model-parallel-size 2, which does not"],
    ),
    "tensor parallel shared experts": (
        2,
        f"{MOE} --tensor-model-parallel-size 2 --num-attention-heads 4 "
        "--moe-shared-expert-intermediate-size 33",
        ["must divide --moe-shared-expert-intermediate-size 33; sizes that fit: 1, 3"],
    ),
    "tensor parallel replay": (
        2,
        f"{MOE} --tensor-model-parallel-size 2 --num-attention-heads 4 --moe-enable-routing-replay",
        ["--moe-enable-routing-replay with --tensor-model-parallel-size 2 is not offered"],
    ),
    "tensor parallel trace": (
        2,
        f"{MOE} --tensor-model-parallel-size 2 --num-attention-heads 4 "
        "--moe-routing-trace-path trace",
        ["--moe-routing-trace-path is not offered with --tensor-model-parallel-size 2"],
    ),
    "tensor parallel heads": (
        3,
        f"{GOOD} --num-attention-heads 4 --ffn-hidden-size 96 --tensor-model-parallel-size 3 "
        "--group-query-attention --num-query-groups 2",
        ["must divide --num-attention-heads 4; sizes that fit: 1, 2, 4", "--num-query-groups 2"],
    ),
    "tensor parallel groups": (
        4,
        f"{GOOD} --num-attention-heads 12 --kv-channels 8 --group-query-attention "
        "--num-query-groups 6 --tensor-model-parallel-size 4 --ffn-hidden-size 96",
        [
            "must divide --num-query-groups 6 or be a multiple of it; sizes that fit: 2, 3, 6",
        ],
    ),
    "tensor parallel rows of a group": (
        4,
        f"{GOOD} --num-attention-heads 4 --kv-channels 5 --group-query-attention "
        "--num-query-groups 1 --tensor-model-parallel-size 4 --ffn-hidden-size 96",
        [
            "--num-query-groups 1 on 4 ranks, which must divide the rows",
            "(--num-attention-heads 4 / 1 + 2) x 5 = 30; make --kv-channels a multiple of 2",
        ],
    ),
    "tensor parallel ffn": (
        2,
        f"{GOOD} --num-attention-heads 4 --ffn-hidden-size 99 --tensor-model-parallel-size 2",
        ["must divide --ffn-hidden-size 99; sizes that fit: 1, 3"],
    ),
    "tensor parallel world": (
        6,
        f"{GOOD} --tensor-model-parallel-size 4 --num-attention-heads 4",
        ["--tensor-model-parallel-size 4 does not divide the world size 6", "legal layouts on 6 r"],
    ),
    "tensor parallel vocabulary": (
        2,
        f"{GOOD} --num-attention-heads 4 --tensor-model-parallel-size 2 --padded-vocab-size 50257",
        ["must divide the padded vocabulary 50257", "leave out --padded-vocab-size"],
    ),
    "sequence parallel length": (
        2,
        f"{GOOD} --num-attention-heads 4 --tensor-model-parallel-size 2 --seq-length 63 "
        "--sequence-parallel",
        ["--sequence-parallel shares --seq-length 63 over --tensor-model-parallel-size 2"],
    ),
    **CORE_ATTENTION_CASES,
    **LATENT_CASES,
    **HUGGINGFACE_CASES,
    **SHARDED_CASES,
    **CONTEXT_CASES,
    **PIPELINE_CASES,
    **OPTIMIZER_CASES,
    **DRY_RUN_CASES,
    **STORE_CASES,
    **CHECKPOINT_CASES,
    "ep of experts": (
        4,
        f"{MOE} --expert-model-parallel-size 3",
        ["does not divide --num-experts 8", "world size 4", "EP 4 DP 4; EP 2 DP 4; EP 1 DP 4"],
    ),
    "ep of world": (
        2,
        f"{MOE} --expert-model-parallel-size 4",
        ["does not divide the world size 2", "EP 2 DP 2; EP 1 DP 2"],
    ),
    "slices of world": (
        4,
        f"{MOE} --expert-model-parallel-size 2 --expert-tensor-parallel-size 4",
        [
            "size 2 x --expert-tensor-parallel-size 4 = 8 does not divide the world size 4",
            "4 ranks: EP 1 ETP 4 DP 4; EP 2 ETP 2 DP 4; EP 2 ETP 1 DP 4; or as asked on 8 ranks",
        ],
    ),
    "slices of experts": (
        6,
        f"{MOE} --expert-model-parallel-size 3 --expert-tensor-parallel-size 2",
        ["size 3 does not divide --num-experts 8", "EP 1 ETP 2 DP 6"],
    ),
    "slices of ffn": (
        3,
        f"{MOE} --moe-ffn-hidden-size 64 --expert-tensor-parallel-size 3",
        ["--expert-tensor-parallel-size 3 must divide the ffn size of an expert, 64", "fit: 1, 2"],
    ),
    "slices of nothing": (2, f"{GOOD} --expert-tensor-parallel-size 2", ["needs --num-experts"]),
    "slices below 1": (1, f"{MOE} --expert-tensor-parallel-size 0", ["must be at least 1"]),
    "nodes that cut shared experts": (
        8,
        f"{MOE} --expert-model-parallel-size 4 --expert-tensor-parallel-size 2 "
        "--moe-dispatcher-node-size 3 --moe-token-dispatcher-type alltoall_hierarchical",
        ["x --expert-tensor-parallel-size 2 = 8; sizes within a group that fit: 1, 2, 4"],
    ),
    "ep of nothing": (2, f"{GOOD} --expert-model-parallel-size 2", ["needs --num-experts"]),
    "heads": (
        1,
        f"{GOOD} --num-attention-heads 5",
        ["--hidden-size 64 must be a multiple of --num-attention-heads 5", "fit: 2, 4, 8"],
    ),
    "groups": (
        1,
        f"{GOOD} --num-attention-heads 8 --group-query-attention --num-query-groups 3",
        ["--num-query-groups 3 must divide --num-attention-heads 8", "fit: 1, 2, 4"],
    ),
    "groups alone": (1, f"{GOOD} --num-query-groups 2", ["no effect without --group-query"]),
    "odd rope": (
        1,
        f"{GOOD} --num-attention-heads 64 --position-embedding-type rope",
        ["head size 1", "must be even"],
    ),
    "rotary alone": (1, f"{GOOD} --rotary-base 500", ["no effect without --position-embedding"]),
    "reset positions": (
        1,
        f"{GOOD} --position-embedding-type rope --reset-position-ids",
        ["--reset-position-ids has no effect with --position-embedding-type rope"],
    ),
    "reset no positions": (
        1,
        f"{GOOD} --position-embedding-type none --reset-position-ids",
        ["--reset-position-ids has no effect with --position-embedding-type none"],
    ),
    "no positions": (1, f"{GOOD} --no-position-embedding", ["rope or none"]),
    "long samples": (
        1,
        f"{GOOD} --seq-length 2048 --max-position-embeddings 1024",
        ["--seq-length 2048 must not be larger than --max-position-embeddings 1024"],
    ),
    "topk 9": (1, f"{MOE} --moe-router-topk 9", ["between 1 and --num-experts 8"]),
    "topk 0": (1, f"{MOE} --moe-router-topk 0", ["--moe-router-topk 0 must be at least 1"]),
    "topk 1": (1, f"{MOE} --moe-router-topk 1", ["needs --moe-router-pre-softmax"]),
    "moe without experts": (
        1,
        f"{GOOD} --moe-router-topk 2 --moe-grouped-gemm",
        ["--moe-router-topk 2, --moe-grouped-gemm need a MoE layer"],
    ),
    "one moe flag, no experts": (1, f"{GOOD} --moe-router-topk 3", ["topk 3 needs a MoE layer"]),
    "negative coefficient": (1, f"{MOE} --moe-aux-loss-coeff -0.1", ["must be at least 0"]),
    "two coefficients": (1, f"{MOE} --moe-aux-loss-coeff 0.1 0.2", ["has 2 values for the 1"]),
    "balancing twice": (
        1,
        f"{MOE} --moe-router-load-balancing-type aux_loss aux_loss",
        ["names one way twice"],
    ),
    "balancing and none": (
        1,
        f"{MOE} --moe-router-load-balancing-type aux_loss none",
        ["none excludes the others"],
    ),
    "coefficient of none": (
        1,
        f"{MOE} --moe-router-load-balancing-type none --moe-aux-loss-coeff 0.1",
        ["no effect with --moe-router-load-balancing-type none"],
    ),
    "unknown balancing": (
        1,
        f"{MOE} --moe-router-load-balancing-type sinkhorm",
        ["sinkhorn, quantile_balancing, none"],
    ),
    **ROUTER_CASES,
    **SCALING_CASES,
    **MTP_CASES,
    "capacity": (1, f"{MOE} --moe-expert-capacity-factor 0", ["must be above 0"]),
    "nodes that cut groups": (
        4,
        f"{MOE} --expert-model-parallel-size 4 --moe-dispatcher-node-size 3 "
        "--moe-token-dispatcher-type alltoall_hierarchical",
        ["--moe-dispatcher-node-size 3 must divide", "that fit: 1, 2, 4"],
    ),
    "nodes of another dispatcher": (
        1,
        f"{MOE} --moe-dispatcher-node-size 2",
        ["no effect without --moe-token-dispatcher-type alltoall_hierarchical"],
    ),
    "padding without capacity": (
        1,
        f"{MOE} --moe-pad-expert-input-to-capacity --moe-token-drop-policy position",
        ["have no effect without --moe-expert-capacity-factor"],
    ),
    "trace limits alone": (
        1,
        f"{MOE} --moe-routing-trace-max-training-iters 5 --moe-routing-trace-max-mb 3",
        ["have no effect without --moe-routing-trace-path"],
    ),
    "trace of nothing": (1, f"{GOOD} --moe-routing-trace-path x", ["x needs a MoE layer"]),
    "trace to a file": (
        1,
        f"{MOE} --moe-routing-trace-path {__file__}",
        ["--moe-routing-trace-path", "is a file; a folder is needed"],
    ),
    "trace of 0 MB": (
        1,
        f"{MOE} --moe-routing-trace-path x --moe-routing-trace-max-mb 0",
        ["--moe-routing-trace-max-mb 0 must be above 0"],
    ),
    "trace of 0 steps": (
        1,
        f"{MOE} --moe-routing-trace-path x --moe-routing-trace-max-training-iters 0",
        ["must be at least 1"],
    ),
    "trace of logits": (
        1,
        f"{MOE} --moe-routing-trace-path x --moe-routing-trace-capture-logits",
        ["--moe-routing-trace-capture-logits", "experts and weights of each token"],
    ),
    "losses of no layer": (1, f"{GOOD} --moe-per-layer-logging", ["needs a MoE layer"]),
    "replicas every 0 steps": (
        2,
        f"{GOOD} --check-weight-hash-across-dp-replicas-interval 0",
        ["--check-replica-hash 0 must be at least 1"],
    ),
    "gate of no shared expert": (
        1,
        f"{MOE} --moe-shared-expert-gate",
        ["needs shared experts: add --moe-shared-expert-intermediate-size"],
    ),
    "shared experts of width 0": (
        1,
        f"{MOE} --moe-shared-expert-intermediate-size 0",
        ["must be at least 1"],
    ),
    "latent space of width 0": (1, f"{MOE} --moe-latent-size 0", ["must be at least 1"]),
    "bias of softmax": (
        1,
        f"{MOE} --moe-router-enable-expert-bias",
        ["needs --moe-router-score-function sigmoid or sqrtsoftplus"],
    ),
    "rate of no bias": (
        1,
        f"{MOE} --moe-router-bias-update-rate 0.1",
        ["no effect without --moe-router-enable-expert-bias"],
    ),
    "jitter of 1": (1, f"{MOE} --moe-input-jitter-eps 1", ["must be above 0 and below 1"]),
    "groups without top-k": (1, f"{MOE} --moe-router-num-groups 2", ["need each other"]),
    "top-k of no groups": (1, f"{MOE} --moe-router-group-topk 2", ["need each other"]),
    "groups of 8 experts": (
        1,
        f"{MOE} --moe-router-num-groups 3 --moe-router-group-topk 2",
        ["--moe-router-num-groups 3 must divide --num-experts 8"],
    ),
    "more groups than top-k": (
        1,
        f"{MOE} --moe-router-num-groups 4 --moe-router-group-topk 4",
        ["--moe-router-topk 2 must be a multiple of --moe-router-group-topk 4"],
    ),
    "more groups than groups": (
        1,
        f"{MOE} --moe-router-num-groups 2 --moe-router-group-topk 4 --moe-router-topk 4",
        ["must not be larger than --moe-router-num-groups 2"],
    ),
    "groups too small": (
        1,
        f"{MOE} --moe-router-num-groups 4 --moe-router-group-topk 1 --moe-router-topk 4",
        ["does not fit in --moe-router-group-topk 1 groups of 2 experts"],
    ),
    "grouped and sequential": (
        1,
        f"{MOE} --moe-grouped-gemm --moe-experts-type sequential",
        ["contradicts --moe-experts-type sequential"],
    ),
    "short pattern": (
        1,
        f"{MOE} --moe-layer-freq [0,1]",
        ["has 2 entries, one for each of --num-layers 4"],
    ),
    "pattern of twos": (1, f"{MOE} --moe-layer-freq [0,1,2,1]", ["entries are 0", "holds 2"]),
    "pattern of zeros": (1, f"{MOE} --moe-layer-freq [0]*4", ["makes no layer MoE"]),
    "pattern that runs": (1, f"{MOE} --moe-layer-freq exit(3)", ["may hold only whole numbers"]),
    "frequency 0": (1, f"{MOE} --moe-layer-freq 0", ["must be at least 1"]),
    "batch": (
        2,
        f"{GOOD} --micro-batch-size 2 --global-batch-size 6",
        ["--global-batch-size 6", "--micro-batch-size 2 x 2 data-parallel ranks (= 4)", "4 or 8"],
    ),
    "batch of 3": (2, f"{GOOD} --global-batch-size 3", ["--global-batch-size 3", "x 2 data"]),
    "dropout": (1, f"{GOOD} --hidden-dropout 1.0", ["at least 0 and below 1"]),
    "negative lr": (1, f"{GOOD} --lr -1", ["--lr -1 must be at least 0"]),
    "min lr": (
        1,
        f"{GOOD} --lr 1e-4 --min-lr 1e-3",
        ["--min-lr 0.001 must lie between 0 and --lr"],
    ),
    "warm-up": (
        1,
        f"{GOOD} --train-iters 10 --lr-warmup-iters 10",
        [
            "warm-up of 20 samples must end before the decay does, at 20",
            "here: --lr-warmup-iters 10, --train-iters 10, --global-batch-size 2",
        ],
    ),
    "warm-up init": (
        1,
        f"{GOOD} --lr 1e-4 --lr-warmup-iters 2 --lr-warmup-init 1e-3",
        ["--lr-warmup-init 0.001 must lie between 0 and --lr 0.0001"],
    ),
    "two warm-ups": (
        1,
        f"{GOOD} --lr-warmup-iters 1 --lr-warmup-fraction 0.1",
        ["exclude each other"],
    ),
    "WSD": (1, f"{GOOD} --lr-decay-style WSD", ["needs --lr-wsd-decay-iters"]),
    "WSD options": (1, f"{GOOD} --lr-wsd-decay-iters 3", ["without --lr-decay-style WSD"]),
    "long final decay": (
        1,
        f"{GOOD} --train-iters 10 --lr-decay-style WSD --lr-wsd-decay-iters 8 --lr-warmup-iters 5",
        [
            "--lr-wsd-decay-iters (= 16 samples) must",
            "(= 10 samples); here: --lr-warmup-iters 5, --train-iters 10, "
            "--lr-wsd-decay-iters 8, --global-batch-size 2",
        ],
    ),
    "save interval": (1, f"{GOOD} --save-interval 5", ["no effect without --save"]),
    "keep last": (1, f"{GOOD} --save x --keep-last 0", ["--keep-last 0 must be at least 1"]),
    "load": (1, f"{GOOD} --load /no/such/folder", ["is no folder", "--allow-fresh-start"]),
    "finetune": (1, f"{GOOD} --finetune", ["no effect without --load"]),
    "nccl on cpu": (1, f"{GOOD} --device cpu --distributed-backend nccl", ["needs --device cuda"]),
    "two sources": (1, f"{GOOD} --data-path x", ["no effect with --mock-data"]),
    "split words": (1, f"{SHAPE} --data-path x --split a,b", ["--split"]),
    "missing data": (1, f"{SHAPE} --data-path x", ["x.bin", "x_text_document.idx"]),
    "null tokenizer": (1, f"{GOOD} --tokenizer-type NullTokenizer", ["needs --vocab-size"]),
    "tokenizer file": (
        1,
        f"{GOOD} --tokenizer-type SentencePieceTokenizer --tokenizer-model no.model",
        ["no.model does not exist"],
    ),
    "tokenizer files": (1, f"{GOOD} --tokenizer-type GPT2BPETokenizer", ["--vocab-file"]),
    "padded vocabulary": (1, f"{GOOD} --vocab-size 500 --padded-vocab-size 100", ["501 ids"]),
    "tensorboard": (1, f"{GOOD} --tensorboard-log-interval 5", ["without --tensorboard-dir"]),
    "yaml file": (1, f"{GOOD} --yaml-cfg /no/such.yaml", ["cannot be read"]),
}
