"""Forward and backward of one MoE layer: grouped, sequential, the textbook loop, and the limit.

The limit is the time its matrix products would take at the rate of one large product. Routing is
new in each call, as in training; "in training" is the grouped layer with the gradient buffers of
DistributedDataParallel, zeroed in each call.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.weight_init import init_weights
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.reference.moe import ReferenceMoE
from tools.bench.timing import alternate, gemm_gflops, report
from tools.bench.world import world_of_one

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def moe_config(args: argparse.Namespace, dtype: str, experts: str) -> TransformerConfig:
    """Return the configuration of one layer."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=args.hidden_size,
        num_attention_heads=1,
        moe_ffn_hidden_size=args.moe_ffn_hidden_size,
        num_moe_experts=args.num_experts,
        moe_router_topk=args.moe_router_topk,
        moe_experts_type=experts,
        moe_aux_loss_coeff=[0.01],
        swiglu=True,
        add_bias_linear=False,
        bf16=dtype == "bf16",
    )


class Bench:
    """Layers of one dtype, called with tokens that route anew each time."""

    def __init__(self, args: argparse.Namespace, dtype: str, device: str) -> None:
        self.shape = (args.tokens, 1, args.hidden_size)
        self.dtype, self.device = DTYPES[dtype], device
        groups = ProcessGroupCollection.create(moe_config(args, dtype, "grouped").layout(1))
        self.layers = {
            f"layer, {experts}": self._layer(moe_config(args, dtype, experts), groups)
            for experts in ("grouped", "sequential")
        }
        self.trained = DistributedDataParallel(
            DistributedDataParallelConfig(),
            self._layer(moe_config(args, dtype, "grouped"), groups),
            pg_collection=groups,
        )
        self.reference = ReferenceMoE(
            args.hidden_size, args.moe_ffn_hidden_size, args.num_experts, args.moe_router_topk
        ).to(device, self.dtype)

    def calls(self) -> dict[str, Callable[[], object]]:
        """Return one forward and backward by name."""
        context = ForwardContext()
        found: dict[str, Callable[[], object]] = {
            name: lambda layer=layer: self._step(layer, lambda x: layer(x, context)[0])
            for name, layer in self.layers.items()
        }
        found["grouped, in training"] = lambda: self._step(
            self.trained, lambda x: self.trained(x, context)[0]
        )
        found["textbook loop"] = lambda: self._step(
            self.reference, lambda x: self.reference(x.flatten(0, 1)).output
        )
        return found

    def _layer(self, config: TransformerConfig, groups: ProcessGroupCollection) -> nn.Module:
        with torch.device(self.device):
            layer = build_module(
                get_moe_module_spec(config), config, layer_number=0, pg_collection=groups
            )
        init_weights(layer, seed=1)
        return layer

    def _step(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        if isinstance(module, DistributedDataParallel):
            module.zero_grad_buffer()
        else:
            module.zero_grad(set_to_none=True)
        tokens = torch.randn(self.shape, device=self.device, dtype=self.dtype, requires_grad=True)
        output = forward(tokens)
        output.backward(torch.ones_like(output))


def main() -> None:
    """Time the layers and report tokens per second and the share of the limit."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=2048, help="Rows of one microbatch.")
    parser.add_argument("--hidden-size", type=int, default=512, help="Width of a token.")
    parser.add_argument("--moe-ffn-hidden-size", type=int, default=1024, help="Width of an expert.")
    parser.add_argument("--num-experts", type=int, default=8, help="Experts of the layer.")
    parser.add_argument("--moe-router-topk", type=int, default=2, help="Experts of a token.")
    parser.add_argument("--rounds", type=int, default=7, help="Timed calls of each.")
    parser.add_argument("--output", type=Path, default=None, help="Folder for the JSON file.")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, object]] = []
    with world_of_one():
        for dtype in DTYPES:
            pairs = args.tokens * args.moe_router_topk
            work = 9 * 2e-9 * pairs * args.hidden_size * args.moe_ffn_hidden_size  # 3 matrices x 3
            shape = (pairs, args.hidden_size, args.moe_ffn_hidden_size)
            limit = gemm_gflops(*shape, DTYPES[dtype], device)
            for name, timing in alternate(Bench(args, dtype, device).calls(), args.rounds).items():
                rows.append(
                    {
                        "dtype": dtype,
                        "what": name,
                        "ms": timing.median * 1e3,
                        "ms_low": timing.low * 1e3,
                        "ms_high": timing.high * 1e3,
                        "tokens_per_s": args.tokens / timing.median,
                        "gflops": work / timing.median,
                        "share_of_gemm": work / timing.median / limit,
                    }
                )
    report("moe_layer", rows, args.output)


if __name__ == "__main__":
    main()
