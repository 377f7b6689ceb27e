"""Small dense models of four families with weights that hide nothing, saved as checkpoints."""

from datetime import timedelta
from pathlib import Path

import torch

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.param_role import deferred_init
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.weight_init import init_weights
from megatron.training.arguments import parse_args
from megatron.training.checkpoint_state import TrainState
from megatron.training.checkpointing import save_checkpoint
from megatron.training.config.run_config import RunConfig
from megatron.training.initialize import Launch, connect

SEQ = 32
BASE = (
    f"--mock-data --vocab-size 255 --num-layers 4 --hidden-size 64 --seq-length {SEQ} "
    "--num-attention-heads 4 --global-batch-size 8 --micro-batch-size 4 --train-iters 10 --lr 1e-2 "
    "--lr-decay-style constant --eval-iters 1 --device cpu --ffn-hidden-size 96"
)
FAMILIES = {
    "gpt2": "--normalization LayerNorm --position-embedding-type learned_absolute",
    "llama": "--normalization RMSNorm --position-embedding-type rope --swiglu "
    "--disable-bias-linear --group-query-attention --num-query-groups 2 "
    "--untie-embeddings-and-output-weights",
    "qwen2": "--normalization RMSNorm --position-embedding-type rope --swiglu "
    "--disable-bias-linear --add-qkv-bias --group-query-attention --num-query-groups 1",
    "qwen3": "--normalization RMSNorm --position-embedding-type rope --swiglu "
    "--disable-bias-linear --qk-layernorm --group-query-attention --num-query-groups 2 "
    "--kv-channels 32",
}
TITLES = {
    "gpt2": "GPT-2 like: LayerNorm, biases everywhere, GELU, learned positions, tied",
    "llama": "Llama like: RMSNorm, no biases, SwiGLU, rotary, grouped queries, untied",
    "qwen2": "Qwen2 like: as Llama with biases of queries, keys and values, tied",
    "qwen3": "Qwen3 like: as Llama with norms of queries and keys, wide heads, tied",
}


def dense_config(family: str, extra: str = "") -> RunConfig:
    """Return the options of a dense model."""
    return parse_args(f"{BASE} {FAMILIES[family]} {extra}".split(), world_size=1)


def save_dense(folder: Path, family: str, extra: str = "") -> None:
    """Save a dense model of ``family`` as of iteration 3, its norms and biases far from 1 and 0.

    Args:
        folder: Gets the checkpoint.
        family: Key of ``FAMILIES``.
        extra: More flags.
    """
    config = dense_config(family, extra)
    connect(Launch(0, 1, 0, 1), "gloo", torch.device("cpu"), timedelta(minutes=1))
    with deferred_init():
        model = GPTModel(
            config.model,
            get_gpt_decoder_block_spec(config.model),
            vocab_size=config.tokenizer.padded_vocab_size or 0,
            max_sequence_length=SEQ,
            pg_collection=ProcessGroupCollection.create(config.model.layout(1)),
        )
    init_weights(model, config.training.seed)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, param in model.named_parameters():
            # larger biases would make all tokens alike, and routers send them one way
            spread = 0.05 if name.endswith(".bias") else 0.3 if param.dim() == 1 else 0.08
            param += spread * torch.randn(param.shape, generator=generator).to(param.dtype)
    done = save_checkpoint(
        folder, TrainState(iteration=3), config=config, model=model, optimizer=None
    )
    assert not done.error, done.error
