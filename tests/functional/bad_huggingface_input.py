"""Mistakes in the exchange with Hugging Face; see ``bad_input``."""

_LLAMA = (
    "--num-layers 4 --hidden-size 64 --mock-data --normalization RMSNorm --swiglu "
    "--disable-bias-linear --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --hidden-dropout 0"
)

HUGGINGFACE_CASES: dict[str, tuple[int, str, list[str]]] = {
    "out of no checkpoint": (
        1,
        f"{_LLAMA} --save-hf y",
        ["--save-hf y needs --save: it is made of the last checkpoint"],
    ),
    "nothing was trained": (
        1,
        f"{_LLAMA} --save x --save-hf y --skip-train",
        ["--save-hf y has no effect with --skip-train; tools/checkpoint/convert.py exports"],
    ),
    "of no family": (
        1,
        f"{_LLAMA} --save x --save-hf y --squared-relu --num-experts 4".replace("--swiglu ", ""),
        ["--save-hf y: no family of Hugging Face's is this model"],
    ),
    "where something is": (
        1,
        f"{_LLAMA} --save x --save-hf /usr",
        ["--save-hf /usr is there already and not empty"],
    ),
    "into an object store": (
        1,
        f"{_LLAMA} --save x --save-hf s3://bucket/model",
        ["--save-hf s3://bucket/model is not offered", "in an object store; use a folder"],
    ),
}
