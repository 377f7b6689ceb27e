"""One training step of bench-S against the matrix-product limit of this machine, in one run.

bench-S: 4 layers, hidden 512, 8 heads, ffn 1024 SwiGLU, 8 experts top-2, vocabulary 8192,
sequence 512, microbatch 4, AdamW, clip 1.0 (62.9M parameters).
"""

import argparse
import sys
from pathlib import Path

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

VOCABULARY, SEQUENCE, MICROBATCH = 8192, 512, 4


def bench_s(*, bf16: bool) -> TransformerConfig:
    """Return the configuration of bench-S."""
    return TransformerConfig(
        num_layers=4,
        hidden_size=512,
        num_attention_heads=8,
        ffn_hidden_size=1024,
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

    def __init__(self, config: TransformerConfig, device: str) -> None:
        groups = ProcessGroupCollection.create(config.layout(1))
        with torch.device(device):
            model = GPTModel(
                config,
                get_gpt_decoder_block_spec(config),
                VOCABULARY,
                SEQUENCE,
                pg_collection=groups,
            )
        init_weights(model, 1234)
        ddp_config = DistributedDataParallelConfig()
        self.ddp = DistributedDataParallel(ddp_config, model, pg_collection=groups)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(lr=3e-4), self.ddp, pg_collection=groups
        )
        self.tokens = torch.randint(VOCABULARY, (MICROBATCH, SEQUENCE + 1), device=device)
        self.positions = torch.arange(SEQUENCE, device=device).expand(MICROBATCH, SEQUENCE)

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


def gemm_flops(config: TransformerConfig) -> float:
    """Return the matrix-product FLOPs of one step: active experts, causal half, backward 2 x."""
    tokens, hidden = MICROBATCH * SEQUENCE, config.hidden_size
    attention = 4 * hidden * hidden + SEQUENCE * hidden  # projections, causal half of 2 * s * h
    experts = config.moe_router_topk * 3 * hidden * config.moe_ffn_size
    layer = attention + experts + config.num_moe_experts * hidden
    return 6.0 * tokens * (config.num_layers * layer + hidden * VOCABULARY)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=None, help="Folder for step.json.")
    parser.add_argument("--rounds", type=int, default=5, help="Timed steps of each dtype.")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    with world_of_one():
        for name, bf16 in (("fp32", False), ("bf16", True)):
            config = bench_s(bf16=bf16)
            timing = alternate({"step": Step(config, device)}, args.rounds)["step"]
            dtype = torch.bfloat16 if bf16 else torch.float32
            limit = gemm_gflops(512, 512, 2048, dtype, device)
            gflops = 1e-9 * gemm_flops(config) / timing.median
            rows.append(
                {
                    "dtype": name,
                    "step_ms": 1e3 * timing.median,
                    "low_ms": 1e3 * timing.low,
                    "high_ms": 1e3 * timing.high,
                    "tokens_per_s": MICROBATCH * SEQUENCE / timing.median,
                    "gflops": gflops,
                    "gemm_limit_gflops": limit,
                    "share": gflops / limit,
                }
            )
    report("step", rows, args.output)


if __name__ == "__main__":
    main()
