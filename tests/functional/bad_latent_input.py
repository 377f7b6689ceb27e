"""What users get wrong about multi-head latent attention; see ``bad_input``."""

GOOD = "--num-layers 4 --hidden-size 64 --mock-data"
MLA = f"{GOOD} --multi-latent-attention"

# name -> (world size, command line, what the message must say)
LATENT_CASES: dict[str, tuple[int, str, list[str]]] = {
    "latents of nothing": (
        1,
        f"{GOOD} --q-lora-rank 16 --v-head-dim 32",
        ["--q-lora-rank 16, --v-head-dim 32 have no effect without --multi-latent-attention"],
    ),
    "cache of no latents": (
        1,
        f"{GOOD} --cache-mla-latents",
        ["--cache-mla-latents has no effect without --multi-latent-attention"],
    ),
    "nothing made from latents": (
        1,
        f"{GOOD} --recompute-granularity selective --recompute-modules mla_up_proj",
        ["--recompute-modules mla_up_proj needs --multi-latent-attention"],
    ),
    "latents of groups": (
        1,
        f"{MLA} --group-query-attention --num-query-groups 2 --num-attention-heads 4",
        ["--multi-latent-attention with --group-query-attention: all heads share one latent"],
    ),
    "latents and heads of one size": (
        1,
        f"{MLA} --kv-channels 32",
        ["--kv-channels 32 has no effect with --multi-latent-attention; heads have --qk-head-dim"],
    ),
    "latents without rotation": (
        1,
        f"{MLA} --position-embedding-type learned_absolute",
        ["--position-embedding-type learned_absolute must be rope"],
    ),
    "latents of an odd rotation": (
        1,
        f"{MLA} --qk-pos-emb-head-dim 7",
        ["--qk-pos-emb-head-dim 7 = 7 must be even; change --qk-pos-emb-head-dim or --rotary-per"],
    ),
    "latents of width 0": (1, f"{MLA} --kv-lora-rank 0", ["--kv-lora-rank 0 must be at least 1"]),
    "latents over ranks": (
        3,
        f"{MLA} --num-attention-heads 4 --tensor-model-parallel-size 3 --ffn-hidden-size 96",
        ["--tensor-model-parallel-size 3 must divide --num-attention-heads 4"],
    ),
    "latents with norms of all heads": (
        1,
        f"{MLA} --qk-layernorm --qk-layernorm-scope all_heads --normalization RMSNorm",
        ["--multi-latent-attention normalises latents, not heads: --qk-layernorm-scope all_heads"],
    ),
}
