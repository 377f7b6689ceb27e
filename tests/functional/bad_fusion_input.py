"""Mistakes about fused kernels: command lines, and their messages."""

GOOD = "--num-layers 4 --hidden-size 64 --mock-data"
MOE = f"{GOOD} --num-experts 8 --swiglu"

# as in bad_input.py
FUSION_CASES: dict[str, tuple[int, str, list[str]]] = {
    "permutation by Triton on a CPU": (
        1,
        f"{MOE} --moe-permute-fusion --device cpu",
        ["--moe-permute-fusion is for CUDA: leave out --device cpu, or --moe-permute-fusion"],
    ),
    "permutation by Triton without experts": (
        1,
        f"{GOOD} --moe-permute-fusion --device cuda",
        ["--moe-permute-fusion needs a MoE layer"],
    ),
    "activation by Triton of another kind": (
        1,
        f"{GOOD} --num-experts 8 --geglu --bias-swiglu-fusion --device cuda --dry-run",
        ["--bias-swiglu-fusion computes plain SwiGLU only: add --swiglu, or leave it out"],
    ),
    "Triton in fp64": (
        1,
        f"{MOE} --fp64 --moe-permute-fusion --device cuda --dry-run",
        ["--moe-permute-fusion computes fp32, bf16 and fp16 only: leave it or --fp64 out"],
    ),
    "CUDA graphs": (
        1,
        f"{GOOD} --cuda-graph-impl local",
        ["--cuda-graph-impl", "steps are launched kernel by kernel (docs/gpu.md says why)"],
    ),
}
