"""Mistakes with ZeRO-1 and ZeRO-3: command lines and what the message about them must say."""

GOOD = "--num-layers 4 --hidden-size 64 --mock-data"
MOE = f"{GOOD} --num-experts 8"

SHARDED_CASES: dict[str, tuple[int, str, list[str]]] = {
    "gather of nothing": (
        2,
        f"{GOOD} --overlap-param-gather --overlap-grad-reduce",
        ["--overlap-param-gather needs --use-distributed-optimizer"],
    ),
    "gather without overlapped reduction": (
        2,
        f"{GOOD} --overlap-param-gather --use-distributed-optimizer",
        ["--overlap-param-gather needs --overlap-grad-reduce"],
    ),
    "fully sharded twice": (
        2,
        f"{GOOD} --use-torch-fsdp2 --use-distributed-optimizer --overlap-grad-reduce",
        ["exclude each other", "--overlap-grad-reduce has no effect with --use-torch-fsdp2"],
    ),
    "fully sharded tensor parallel": (
        2,
        f"{GOOD} --num-attention-heads 4 --tensor-model-parallel-size 2 --use-torch-fsdp2",
        ["--use-torch-fsdp2 with --tensor-model-parallel-size 2 is not offered"],
    ),
    "fully sharded pipeline": (
        2,
        f"{GOOD} --pipeline-model-parallel-size 2 --use-torch-fsdp2",
        ["--use-torch-fsdp2 with --pipeline-model-parallel-size 2 is not offered"],
    ),
    "fully sharded in two lanes": (
        2,
        f"{MOE} --expert-model-parallel-size 2 --overlap-moe-expert-parallel-comm "
        "--use-torch-fsdp2",
        ["--use-torch-fsdp2 with --overlap-moe-expert-parallel-comm is not offered"],
    ),
    "fully sharded slices of experts": (
        2,
        f"{MOE} --expert-tensor-parallel-size 2 --use-torch-fsdp2",
        ["--use-torch-fsdp2 with --expert-tensor-parallel-size 2 is not offered"],
    ),
    "layers kept whole without shards": (
        2,
        f"{GOOD} --torch-fsdp2-no-reshard-after-forward",
        ["--torch-fsdp2-no-reshard-after-forward has no effect without --use-torch-fsdp2"],
    ),
}
