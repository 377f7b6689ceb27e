"""Mistakes about activations and biases of MLPs: command lines, and their messages."""

GOOD = "--num-layers 4 --hidden-size 64 --mock-data"
MOE = f"{GOOD} --num-experts 8"

# as in bad_input.py
ACTIVATION_CASES: dict[str, tuple[int, str, list[str]]] = {
    "two activations": (
        1,
        f"{GOOD} --swiglu --quick-geglu",
        ["--swiglu and --quick-geglu exclude each other: an MLP has one activation"],
    ),
    "three activations": (
        1,
        f"{GOOD} --geglu --openai-gelu --squared-relu",
        ["--geglu and --openai-gelu and --squared-relu exclude each other"],
    ),
    "offset without gate": (
        1,
        f"{GOOD} --squared-relu --glu-linear-offset 1",
        ["--glu-linear-offset 1 needs a gated MLP: add --swiglu, --geglu or --quick-geglu"],
    ),
    "clamp without gate": (
        1,
        f"{GOOD} --activation-func-clamp-value 7",
        ["--activation-func-clamp-value 7 needs a gated MLP"],
    ),
    "clamp at 0": (
        1,
        f"{GOOD} --swiglu --activation-func-clamp-value 0",
        ["--activation-func-clamp-value 0 must be above 0"],
    ),
    "offset out of range": (
        1,
        f"{GOOD} --swiglu --glu-linear-offset 1e9",
        ["must be at least -1000 and at most 1000"],
    ),
    "MLP bias twice": (
        1,
        f"{GOOD} --add-mlp-bias",
        ["--add-mlp-bias has no effect without --disable-bias-linear"],
    ),
    "compiled activation of another kind": (
        1,
        f"{MOE} --quick-geglu --moe-fused-activation compiled",
        ["computes SwiGLU only: leave out --quick-geglu"],
    ),
    "compiled activation with a clamp": (
        1,
        f"{MOE} --swiglu --activation-func-clamp-value 7 --moe-fused-activation compiled",
        ["computes SwiGLU only: leave out --activation-func-clamp-value 7"],
    ),
    "kernels of a CPU": (
        1,
        f"{GOOD} --device cuda --cpu-kernels compiled",
        ["--cpu-kernels compiled is for CPUs: add --device cpu, or leave it out"],
    ),
    "compiled fp64": (
        1,
        f"{GOOD} --fp64 --cpu-kernels compiled",
        ["--cpu-kernels compiled computes bf16 and fp32 only: leave --fp64 or it out"],
    ),
    "settings of CPUs on a GPU": (
        1,
        f"{GOOD} --device cuda --cpu-core-binding none --cpu-allocator default",
        ["--cpu-core-binding none, --cpu-allocator default have no effect with --device cuda"],
    ),
    "fp32 products in fp64": (
        1,
        f"{GOOD} --fp64 --cpu-float32-products onednn",
        ["--cpu-float32-products onednn has no effect with --fp64"],
    ),
    "an allocator that is not there": (
        1,
        f"{GOOD} --cpu-allocator jemalloc",
        ["--cpu-allocator jemalloc", "keep, default"],
    ),
}
