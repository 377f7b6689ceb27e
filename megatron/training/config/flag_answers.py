"""What to say to a Megatron-LM flag that is no option here: tables only, no logic.

A flag is either without effect here (accepted with a notice) or refused with what to do instead.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class NoEffect:
    """A flag that old launch scripts pass and that changes nothing here."""

    why: str
    values: tuple[str, ...] | None = None
    """The only values that change nothing; any other is refused. None takes every value."""
    otherwise: str = ""
    """What to do instead of another value."""


_FUSED = "it names a fused kernel, the results do not depend on it"
_ALWAYS = "it is always so here"
_EARLY = "messages between pipeline stages are always started before they are needed"

NO_EFFECT: dict[str, NoEffect] = {
    "--accumulate-allreduce-grads-in-fp32": NoEffect(_ALWAYS),
    "--attention-backend": NoEffect(
        "PyTorch's scaled_dot_product_attention picks its kernel", ("auto",), "leave it out"
    ),
    "--attention-softmax-in-fp32": NoEffect(_ALWAYS),
    "--calculate-per-token-loss": NoEffect(
        "the loss is always the sum over all tokens of a step divided by their number"
    ),
    "--ckpt-format": NoEffect(
        "checkpoints are sharded safetensors files, which every layout loads",
        ("torch_dist", "torch_dcp"),
        "leave it out",
    ),
    "--ckpt-fully-parallel-load": NoEffect(_ALWAYS),
    "--ckpt-fully-parallel-save": NoEffect(_ALWAYS),
    "--cross-entropy-fusion-impl": NoEffect(_FUSED, ("native",), "leave it out"),
    "--cross-entropy-loss-fusion": NoEffect(_FUSED),
    "--dataloader-type": NoEffect(
        "samples are read in order of their number, as single does", ("single",), "leave it out"
    ),
    "--ddp-average-in-collective": NoEffect(
        "gradients are already divided by the number of tokens of the step"
    ),
    "--disable-gloo-process-groups": NoEffect("no gloo groups are made beside NCCL's"),
    "--disable-jit-fuser": NoEffect(_FUSED),
    "--empty-unused-memory-level": NoEffect("PyTorch's allocator keeps its cache", ("0",)),
    "--exit-on-missing-checkpoint": NoEffect(
        "--load without a checkpoint always ends the run, unless --allow-fresh-start or "
        "--pretrained-checkpoint"
    ),
    "--exit-signal": NoEffect("SIGTERM saves and ends the run", ("15", "SIGTERM")),
    "--exit-signal-handler": NoEffect("SIGTERM always saves and ends the run"),
    "--lazy-mpu-init": NoEffect("process groups are made once, at the start"),
    "--local-rank": NoEffect("torchrun's LOCAL_RANK says which device a rank takes"),
    "--local_rank": NoEffect("torchrun's LOCAL_RANK says which device a rank takes"),
    "--mla-down-proj-fusion": NoEffect("the two ways down to latents are products of their own"),
    "--manual-gc": NoEffect("Python collects its own garbage"),
    "--manual-gc-interval": NoEffect("Python collects its own garbage"),
    "--moe-grouped-gemm": NoEffect("it is already so: --moe-experts-type grouped"),
    "--moe-router-fusion": NoEffect(_FUSED),
    "--no-align-grad-reduce": NoEffect("a pipeline stage reduces gradients when it has them"),
    "--disable-align-grad-reduce": NoEffect("a pipeline stage reduces gradients when it has them"),
    "--no-barrier-with-level-1-timing": NoEffect("there are no such timers"),
    "--no-bias-dropout-fusion": NoEffect(_FUSED),
    "--no-bias-gelu-fusion": NoEffect(_FUSED),
    "--no-check-for-nan-in-loss-and-grad": NoEffect(
        "a step whose gradient is not finite is skipped on every rank"
    ),
    "--no-create-attention-mask-in-dataloader": NoEffect(_ALWAYS),
    "--no-gradient-accumulation-fusion": NoEffect(_FUSED),
    "--no-masked-softmax-fusion": NoEffect(_FUSED),
    "--no-one-logger": NoEffect("there is no One Logger"),
    "--no-overlap-p2p-communication": NoEffect(_EARLY),
    "--no-persist-layer-norm": NoEffect(_FUSED),
    "--no-position-embedding": NoEffect("--position-embedding-type says it"),
    "--no-rope-fusion": NoEffect(_FUSED),
    "--num-dataset-builder-threads": NoEffect("sample indices are built by numpy in one thread"),
    "--overlap-p2p-communication-warmup-flush": NoEffect(_EARLY),
    "--rerun-mode": NoEffect("steps are never rerun", ("disabled",), "leave it out"),
    "--timing-log-level": NoEffect("there are no such timers", ("0",), "leave it out"),
    "--transformer-impl": NoEffect(
        "layers are always PyTorch's own", ("local",), "leave it out, or give local"
    ),
    "--use-cpu-initialization": NoEffect("initial weights are always drawn on the CPU"),
    "--use-dist-ckpt": NoEffect(_ALWAYS),
    "--use-flash-attn": NoEffect(
        "PyTorch's scaled_dot_product_attention takes its flash kernel where it can"
    ),
    "--use-mcore-models": NoEffect("there is one model implementation"),
    "--use-tp-pp-dp-mapping": NoEffect(
        "ranks are always in the order tp-cp-ep-dp-pp; results do not depend on it"
    ),
    "--vocab-extra-ids": NoEffect("no ids are added", ("0",), "leave it out"),
}

_KEPT = "activations stay where they are; --recompute-granularity saves memory"
_RECOMPUTE = "use --recompute-granularity "
_FLEX = (
    "kernels of the packages DeepEP (deep_ep), HybridEP and NCCL EP are not used here, installed "
    "or not; use --moe-token-dispatcher-type alltoall"
)
_SAMPLES = "the run is counted in iterations of --global-batch-size samples; give "
_JSONL = "metrics are in metrics.jsonl under --log-dir, and in --tensorboard-dir"
_SHARDED = (
    "use --use-torch-fsdp2, which shares out weights, gradients and the optimizer's state, or "
    "--use-distributed-optimizer, which shares out the latter"
)

SUBSTITUTES: dict[str, str] = {
    "--auto-detect-ckpt-format": "there is one checkpoint format; leave it out",
    "--batch-size": "use --micro-batch-size",
    "--checkpoint-activations": _RECOMPUTE
    + "full --recompute-method uniform --recompute-num-layers 1",
    "--data-args-path": "put the words of the file after --data-path",
    "--data-parallel-random-init": "initial weights depend on --seed alone, never on a rank",
    "--dataloader-inter-document-masking": "use --reset-attention-mask",
    "--ddp-num-buckets": "use --ddp-bucket-size",
    "--decoder-num-layers": "use --num-layers",
    "--decoder-seq-length": "use --seq-length",
    "--decoupled-lr": "all parameters share --lr",
    "--decoupled-min-lr": "all parameters share --min-lr",
    "--dist-ckpt-format": "there is one checkpoint format; leave it out",
    "--dist-ckpt-strictness": "loading is always strict, both ways; leave it out",
    "--encoder-num-layers": "use --num-layers",
    "--encoder-seq-length": "use --seq-length",
    "--eval-global-batch-size": "evaluation uses --global-batch-size",
    "--eval-micro-batch-size": "evaluation uses --micro-batch-size",
    "--fp16-lm-cross-entropy": "the loss is always computed in fp32",
    "--full-validation": "use --eval-iters",
    "--grad-reduce-in-bf16": "gradients are always reduced in fp32",
    "--init-method-xavier-uniform": "weights are drawn with --init-method-std",
    "--log-memory-to-tensorboard": _JSONL,
    "--log-num-zeros-in-grad": "the gradient norm is logged always",
    "--log-params-norm": "the gradient norm is logged always",
    "--log-progress": _JSONL,
    "--log-timers-to-tensorboard": _JSONL,
    "--log-validation-ppl-to-tensorboard": _JSONL,
    "--log-world-size-to-tensorboard": "the start-up lines say it",
    "--lr-decay-samples": _SAMPLES + "--lr-decay-iters",
    "--lr-warmup-samples": _SAMPLES + "--lr-warmup-iters",
    "--lr-wsd-decay-samples": _SAMPLES + "--lr-wsd-decay-iters",
    "--model-parallel-size": "use --tensor-model-parallel-size",
    "--moe-enable-deepep": _FLEX,
    "--moe-layer-recompute": _RECOMPUTE + "selective --recompute-modules moe",
    "--no-ckpt-fully-parallel-save": "every rank always writes its own part; leave it out",
    "--no-mmap-bin-files": "data files are always memory-mapped; leave it out",
    "--no-pad-vocab-size": "use --make-vocab-size-divisible-by 1",
    "--non-persistent-local-ckpt-algo": (
        "each rank of a node writes its share of what the node holds; leave it out"
    ),
    "--rampup-batch-size": "the batch size is constant; use --global-batch-size",
    "--recompute-activations": _RECOMPUTE + "selective",
    "--replication": "nodes keep no copies of each other's checkpoints; leave it out",
    "--replication-factor": "nodes keep no copies of each other's checkpoints; leave it out",
    "--replication-jump": "nodes keep no copies of each other's checkpoints; leave it out",
    "--spec": "the layers follow from the options of --help",
    "--step-batch-size-schedule": "the batch size is constant; use --global-batch-size",
    "--test-mode": "use --skip-train",
    "--train-samples": _SAMPLES + "--train-iters",
    "--use-precision-aware-optimizer": "moments are always fp32",
    "--use-rotary-position-embeddings": "use --position-embedding-type rope",
    "--warmup": "use --lr-warmup-fraction, a share and not a percentage",
}

CHOICES: dict[tuple[str, str], str] = {
    ("cp_comm_type", "a2a+p2p"): "one way a layer: give p2p, or a2a where heads are enough",
    ("moe_token_dispatcher_type", "flex"): _FLEX,
    ("rope_scaling_type", "dynamic"): (
        "dynamic NTK turns a token's earlier keys otherwise with each new token; ntk with the "
        "factor of one length is a fixed base"
    ),
    ("recompute_modules", "layernorm"): "give mlp, moe or core_attn, or recompute whole layers",
}
"""(option, choice that users of others know and it has not) -> what to say beside those it has."""

_GPU_LIB = "it tunes a package that is not used here; leave it out"
_STAGE_GROUPS = "stages talk over the library of --distributed-backend; leave it out"
_BF16 = "number formats offered are fp32, --bf16, --fp16 and --fp64"
_OTHER_MODEL = "only GPT models with attention are offered"
_GENERATE = "tools/generate.py generates text"
_NO_GRAPHS = "steps are launched kernel by kernel (docs/gpu.md says why); leave it out"

# first match wins
PREFIXES: tuple[tuple[str, str], ...] = (
    ("--fp8", _BF16),
    ("--no-fp8", _BF16),
    ("--fp4", _BF16),
    ("--first-last-layers-bf16", _BF16),
    ("--num-layers-at-", _BF16),
    ("--distribute-saved-activations", _KEPT),
    ("--cpu-offload", _KEPT),
    ("--fine-grained-", _KEPT),
    ("--offload-", _KEPT),
    ("--activation-offload", _KEPT),
    ("--tp-comm-", "communication of tensor parallelism is not overlapped yet"),
    ("--no-tp-comm-", "communication of tensor parallelism is not overlapped yet"),
    ("--pipeline-model-parallel-comm", _STAGE_GROUPS),
    ("--use-ring-exchange-p2p", _STAGE_GROUPS),
    ("--hierarchical-context", "use --cp-comm-type p2p, all_gather or a2a"),
    ("--hybrid-context", "use --context-parallel-size, the same for all batches"),
    ("--moe-flex", _FLEX),
    ("--moe-deepep", _FLEX),
    ("--moe-hybridep", _FLEX),
    ("--moe-ncclep", _FLEX),
    ("--moe-permute-fusion-into", "use --moe-token-dispatcher-type alltoall"),
    (
        "--moe-routing-trace",
        "a trace holds experts and weights of each token: --moe-routing-trace-path",
    ),
    ("--moe-", "this part of the MoE layer is not offered yet; see --help for what is"),
    ("--mtp-", "give --mtp-num-layers and --mtp-loss-scaling-factor alone"),
    ("--mrope", "use --position-embedding-type rope"),
    ("--relative-attention", "use --position-embedding-type rope"),
    ("--mamba", _OTHER_MODEL),
    ("--is-hybrid", _OTHER_MODEL),
    ("--hybrid-", _OTHER_MODEL),
    ("--linear-", _OTHER_MODEL),
    ("--dsa-", _OTHER_MODEL),
    ("--no-dsa-", _OTHER_MODEL),
    ("--bert", _OTHER_MODEL),
    ("--inference-", _GENERATE),
    ("--flash-decode", _GENERATE),
    ("--cuda-graph", _NO_GRAPHS),
    ("--enable-cuda-graph", _NO_GRAPHS),
    ("--external-cuda-graph", _NO_GRAPHS),
    ("--muon", "use --optimizer adam or sgd"),
    ("--lion", "use --optimizer adam or sgd"),
    ("--optimizer-", "the optimizer runs where the model is; leave it out"),
    ("--use-megatron-fsdp", _SHARDED),
    ("--megatron-fsdp", _SHARDED),
    ("--data-parallel-sharding", _SHARDED),
    ("--wandb", _JSONL),
    ("--profile", "start the run under nsys or torch.profiler from a script of your own"),
    ("--fim-", "samples are read as they are; leave it out"),
    ("--use-te-", _GPU_LIB),
    ("--te-", _GPU_LIB),
    ("--use-transformer-engine", _GPU_LIB),
    ("--use-kitchen", _GPU_LIB),
    ("--kitchen", _GPU_LIB),
)

GROUPS: dict[str, str] = {
    "transformer configuration": "the layer does not have this part yet; see --help",
    "network size": "the model does not have this part yet; see --help",
    "regularization": "see --help for the optimizer's options; leave it out",
    "profiling": "start the run under nsys or torch.profiler from a script of your own",
    "training": "the training loop does not have it yet; leave it out",
    "rl": "reinforcement learning is not offered; this project pretrains",
    "RNG and initialization": "randomness depends on --seed alone; leave it out",
    "learning rate and weight decay": "see --help for the schedule's options; leave it out",
    "checkpointing": "see --help for the checkpoint options; leave it out",
    "mixed precision": _BF16,
    "distributed init": "groups are made from the parallel sizes alone; leave it out",
    "validation": "use --eval-interval and --eval-iters",
    "data and dataloader": "see --help for the data options; leave it out",
    "tokenizer": "the tokenizer's own file says it; leave it out",
    "autoresume": "SIGTERM saves the run, and --load resumes it",
    "biencoder": _OTHER_MODEL,
    "vision": _OTHER_MODEL,
    "moe": "this part of the MoE layer is not offered yet; see --help for what is",
    "mla": "see --help for the options of --multi-latent-attention; leave it out",
    "experimental_attention_variant": "only softmax attention is offered",
    "heterogeneous architecture": "all layers share one shape, but for --moe-layer-freq",
    "logging": _JSONL,
    "Logits Distillation": "training is on the next token only; leave it out",
    "straggler": "the log line says how even the ranks are; leave it out",
    "workload inspector": "there is no such server; leave it out",
    "inference": _GENERATE,
    "Transformer-Engine": _GPU_LIB,
    "experimental": "it is experimental there; leave it out",
    "one logger": "there is no One Logger; leave it out",
    "In-process restart": "torchrun --max-restarts restarts failed runs; resume with --load",
    "ft_package": "torchrun --max-restarts restarts failed runs; resume with --load",
    "rerun engine": "steps are never rerun; leave it out",
    "msc": "--save and --load take URLs of object stores as they are; leave it out",
    "sft": "only pretraining is offered so far",
    "fault injector": "faults are not injected; leave it out",
}
