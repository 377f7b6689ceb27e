"""One training step of bench-S against the matrix-product limit of this machine, in one run.

bench-S: 4 layers, hidden 512, 8 heads, ffn 1024 SwiGLU, 8 experts top-2, vocabulary 8192,
sequence 512, microbatch 4, AdamW, clip 1.0 (62.9M parameters).
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.weight_init import init_weights
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.transformer_config import TransformerConfig
from tools.bench.timing import alternate, gemm_gflops, report
from tools.bench.world import world_of_one


class Size(NamedTuple):
    """What can be made smaller; the rest is bench-S."""

    hidden: int
    vocabulary: int
    sequence: int
    microbatch: int


def bench_s(hidden: int, *, bf16: bool) -> TransformerConfig:
    """Return the configuration of bench-S, which has a ``hidden`` size of 512."""
    return TransformerConfig(
        num_layers=4,
        hidden_size=hidden,
        num_attention_heads=8,
        ffn_hidden_size=2 * hidden,
        swiglu=True,
        normalization="RMSNorm",
        position_embedding_type="rope",
        add_bias_linear=False,
        untie_embeddings_and_output_weights=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=8,
        moe_router_topk=2,
        bf16=bf16,
    )


class Step:
    """A model, its optimizer and one batch; calling it trains one step."""

    def __init__(self, config: TransformerConfig, size: Size, device: str) -> None:
        groups = ProcessGroupCollection.create(config.layout(1))
        with torch.device(device):
            model = GPTModel(
                config,
                get_gpt_decoder_block_spec(config),
                size.vocabulary,
                size.sequence,
                pg_collection=groups,
            )
        init_weights(model, 1234)
        ddp_config = DistributedDataParallelConfig()
        self.ddp = DistributedDataParallel(ddp_config, model, pg_collection=groups)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(lr=3e-4), self.ddp, pg_collection=groups
        )
        batch = (size.microbatch, size.sequence)
        self.tokens = torch.randint(size.vocabulary, (batch[0], batch[1] + 1), device=device)
        self.positions = torch.arange(size.sequence, device=device).expand(batch)

    def __call__(self, context: ForwardContext | None = None) -> None:
        """Forward, backward, optimizer step."""
        self.ddp.zero_grad_buffer()
        losses = self.ddp(
            self.tokens[:, :-1],
            self.positions,
            labels=self.tokens[:, 1:],
            context=context or ForwardContext(),
        )
        losses.mean().backward()
        self.ddp.finish_grad_sync()
        self.optimizer.step()


def gemm_flops(config: TransformerConfig, size: Size) -> float:
    """Return the matrix-product FLOPs of one step: active experts, causal half, backward 2 x."""
    tokens, hidden = size.microbatch * size.sequence, config.hidden_size
    attention = (
        4 * hidden * hidden + size.sequence * hidden
    )  # projections, causal half of 2 * s * h
    experts = config.moe_router_topk * 3 * hidden * config.moe_ffn_size
    layer = attention + experts + config.num_moe_experts * hidden
    return 6.0 * tokens * (config.num_layers * layer + hidden * size.vocabulary)


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """Offer what can be made smaller than bench-S."""
    parser.add_argument("--hidden-size", type=int, default=512, help="Width of a token.")
    parser.add_argument("--vocab-size", type=int, default=8192, help="Tokens there are.")
    parser.add_argument("--seq-length", type=int, default=512, help="Tokens of a sample.")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="Samples of a step.")


def size_of(args: argparse.Namespace) -> Size:
    """Return what ``add_size_options`` read."""
    return Size(args.hidden_size, args.vocab_size, args.seq_length, args.micro_batch_size)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=None, help="Folder for step.json.")
    parser.add_argument("--rounds", type=int, default=5, help="Timed steps of each dtype.")
    add_size_options(parser)
    args = parser.parse_args()
    size = size_of(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    with world_of_one():
        for name, bf16 in (("fp32", False), ("bf16", True)):
            config = bench_s(size.hidden, bf16=bf16)
            timing = alternate({"step": Step(config, size, device)}, args.rounds)["step"]
            dtype = torch.bfloat16 if bf16 else torch.float32
            limit = gemm_gflops(512, 512, 2048, dtype, device)
            gflops = 1e-9 * gemm_flops(config, size) / timing.busy
            rows.append(
                {
                    "dtype": name,
                    "step_ms": 1e3 * timing.busy,
                    "wall_ms": 1e3 * timing.median,
                    "low_ms": 1e3 * timing.low,
                    "high_ms": 1e3 * timing.high,
                    "tokens_per_s": size.microbatch * size.sequence / timing.busy,
                    "gflops": gflops,
                    "gemm_limit_gflops": limit,
                    "share": gflops / limit,
                }
            )
    report("step", rows, args.output)


if __name__ == "__main__":
    main()
