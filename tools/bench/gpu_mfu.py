"""MFU of a Mixtral-shaped MoE layer and of a model of such layers in bf16, on one GPU.

Ours against Hugging Face transformers' grouped_mm path, in turn in one run: forward and backward
of both; then our whole step, clipping and AdamW included, alone, for its state needs the room
(58 GB at the default size). MFU counts active experts and half of attention, backward twice the
forward, against the card's peak for dense bf16; ``of_gemm`` is against the fastest of this layer's
products, measured in this run. Without a GPU it does nothing, unless --device cpu says so.
"""

import argparse
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.optimizer.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from tools.bench.cards import card_name, peak_tflops
from tools.bench.timing import Timing, alternate, gemm_gflops, report
from tools.bench.world import world_of_one

CONTEXT = ForwardContext(same_num_tokens=True)
Row = dict[str, object]


def mixtral(args: argparse.Namespace, **options: Any) -> TransformerConfig:
    """Return Mixtral's configuration at the sizes of ``args``; ``options`` win."""
    heads = args.num_attention_heads
    values: dict[str, Any] = {
        "num_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "num_attention_heads": heads,
        "group_query_attention": True,
        "num_query_groups": max(1, heads // 4),
        "ffn_hidden_size": args.moe_ffn_hidden_size,
        "moe_ffn_hidden_size": args.moe_ffn_hidden_size,
        "num_moe_experts": args.num_experts,
        "moe_router_topk": args.moe_router_topk,
        "moe_aux_loss_coeff": [0.02],
        "swiglu": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": True,
    }
    return TransformerConfig(**(values | options))


def layer_flops(args: argparse.Namespace) -> float:
    """Return the operations of the products of one MoE layer per token, forward and backward."""
    experts = args.moe_router_topk * 3 * args.hidden_size * args.moe_ffn_hidden_size
    return 6.0 * (experts + args.hidden_size * args.num_experts)


def model_flops(args: argparse.Namespace) -> float:
    """Return the same of the whole model: causal half of attention, the output layer too."""
    hidden, groups = args.hidden_size, max(1, args.num_attention_heads // 4)
    keys = hidden * groups // args.num_attention_heads
    attention = 2 * hidden * hidden + 2 * hidden * keys + args.seq_length * hidden
    whole = args.num_layers * (layer_flops(args) / 6.0 + attention)
    return 6.0 * (whole + hidden * args.vocab_size)


def drawn(module: nn.Module) -> nn.Module:
    """Draw the weights of ``module`` where they lie; what is drawn does not matter here."""
    for name, param in module.named_parameters():
        if param.dim() == 1:
            nn.init.ones_(param) if name.endswith("weight") else nn.init.zeros_(param)
        else:
            nn.init.normal_(param, std=0.02)
    return module


class Layers:
    """One MoE layer of ours and transformers' over the same weights."""

    def __init__(self, args: argparse.Namespace, peers: ModuleType | None) -> None:
        config = mixtral(args, num_layers=1)
        groups = ProcessGroupCollection.create(config.layout(1))
        with torch.device(args.device):
            spec = get_moe_module_spec(config)
            ours = drawn(build_module(spec, config, layer_number=0, pg_collection=groups))
            shape = (args.seq_length, args.micro_batch_size, args.hidden_size)
            self.tokens = torch.randn(shape, dtype=torch.bfloat16)
            self.grad = torch.randn_like(self.tokens)
        ddp_config = DistributedDataParallelConfig()
        self.ours = DistributedDataParallel(ddp_config, ours, pg_collection=groups)
        self.calls: dict[str, Callable[[], object]] = {"ours": self._ours}
        if peers is not None:
            self.theirs = _mixtral_block(args, peers, ours)
            self.calls["transformers grouped_mm"] = self._theirs

    def _ours(self) -> None:
        self.ours.zero_grad_buffer()
        self.ours(self.tokens.detach().requires_grad_(), CONTEXT)[0].backward(self.grad)

    def _theirs(self) -> None:
        self.theirs.zero_grad(set_to_none=True)
        as_one_sample = (1, -1, self.tokens.shape[-1])
        output = self.theirs(self.tokens.view(as_one_sample).detach().requires_grad_())
        output.backward(self.grad.view(as_one_sample))


def _mixtral_block(args: argparse.Namespace, peers: Any, ours: Any) -> nn.Module:
    config = peers.MixtralConfig(
        hidden_size=args.hidden_size,
        intermediate_size=args.moe_ffn_hidden_size,
        num_local_experts=args.num_experts,
        num_experts_per_tok=args.moe_router_topk,
        experts_implementation="grouped_mm",
    )
    with torch.device("meta"):
        block: nn.Module = peers.MixtralSparseMoeBlock(config)
    weights = ours.router.weight, ours.experts.weight1, ours.experts.weight2
    gate, up, down = (nn.Parameter(weight.detach()) for weight in weights)
    block.gate.weight = nn.Parameter(gate.to(torch.bfloat16))
    block.experts.gate_up_proj, block.experts.down_proj = up, down
    return block


class OurModel:
    """Our model in bf16 with fp32 sums of gradients."""

    def __init__(self, args: argparse.Namespace, batch: Tensor) -> None:
        config = mixtral(args)
        self.groups = ProcessGroupCollection.create(config.layout(1))
        with torch.device(args.device):
            model = GPTModel(
                config,
                get_gpt_decoder_block_spec(config),
                args.vocab_size,
                args.seq_length,
                pg_collection=self.groups,
            )
        ddp_config = DistributedDataParallelConfig()
        self.ddp = DistributedDataParallel(ddp_config, drawn(model), pg_collection=self.groups)
        self.batch = batch
        length = args.seq_length
        self.positions = torch.arange(length, device=batch.device).expand(len(batch), length)

    def gradients(self) -> None:
        """Do forward and backward."""
        self.ddp.zero_grad_buffer()
        ids, labels = self.batch[:, :-1], self.batch[:, 1:]
        losses = self.ddp(ids, self.positions, labels=labels, context=CONTEXT)
        losses.mean().backward()
        self.ddp.finish_grad_sync()

    def whole_step(self) -> Callable[[], None]:
        """Return what makes a whole step; its fp32 weights and moments are made now."""
        optimizer = get_megatron_optimizer(
            OptimizerConfig(lr=1e-5), self.ddp, pg_collection=self.groups
        )

        def step() -> None:
            self.gradients()
            optimizer.step()

        return step


class TheirModel:
    """transformers' Mixtral, all in bf16."""

    def __init__(self, args: argparse.Namespace, peers: Any, batch: Tensor) -> None:
        config = peers.MixtralConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=args.moe_ffn_hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.num_attention_heads,
            num_key_value_heads=max(1, args.num_attention_heads // 4),
            num_local_experts=args.num_experts,
            num_experts_per_tok=args.moe_router_topk,
            max_position_embeddings=args.seq_length,
            experts_implementation="grouped_mm",
            attn_implementation="sdpa",
            use_cache=False,
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(args.device):
                self.model = drawn(peers.MixtralForCausalLM(config)).train()
        finally:
            torch.set_default_dtype(before)
        self.ids = batch[:, :-1].contiguous()
        self.labels = batch[:, 1:].contiguous()

    def gradients(self) -> None:
        """Do forward and backward; labels are those of ours."""
        self.model.zero_grad(set_to_none=True)
        logits = self.model(input_ids=self.ids).logits
        nn.functional.cross_entropy(logits.flatten(0, 1).float(), self.labels.flatten()).backward()


def rows_of(
    what: str, timings: dict[str, Timing], flops: float, args: argparse.Namespace
) -> Iterator[Row]:
    """Yield a row for each contender; ``flops`` are of one token."""
    tokens = args.seq_length * args.micro_batch_size
    peak = args.peak_tflops or peak_tflops(card_name())
    for name, timing in timings.items():
        tflops = 1e-12 * flops * tokens / timing.median
        yield {
            "what": what,
            "who": name,
            "ms": 1e3 * timing.median,
            "low_ms": 1e3 * timing.low,
            "high_ms": 1e3 * timing.high,
            "tokens_per_s": tokens / timing.median,
            "tflops": tflops,
            "mfu": tflops / peak if peak else None,
            "of_gemm": tflops / args.gemm_tflops,
            "peak_gib": _peak_gib(),
        }


def _peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def bench(args: argparse.Namespace, peers: ModuleType | None) -> Iterator[Row]:
    """Yield the rows of layer, model and step, each freed before the next is built."""
    rounds = {"rounds": args.rounds, "warm_up": args.warm_up}
    layers = Layers(args, peers)
    yield from rows_of("layer", alternate(layers.calls, **rounds), layer_flops(args), args)
    del layers
    _free()
    shape = (args.micro_batch_size, args.seq_length + 1)
    batch = torch.randint(args.vocab_size, shape, device=args.device)
    ours = OurModel(args, batch)
    calls: dict[str, Callable[[], object]] = {"ours": ours.gradients}
    theirs = None if peers is None else TheirModel(args, peers, batch)
    if theirs is not None:
        calls["transformers grouped_mm"] = theirs.gradients
    flops = model_flops(args)
    yield from rows_of("model, forward + backward", alternate(calls, **rounds), flops, args)
    del theirs, calls
    _free()
    step = alternate({"ours": ours.whole_step()}, **rounds)
    yield from rows_of("model, whole step", step, flops, args)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peers_installed() -> ModuleType | None:
    """Return transformers' Mixtral module; None, told, where it is not installed."""
    try:
        return importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    except ImportError as error:
        print(f"transformers is left out: {error}")
        return None


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="cuda when not set.")
    parser.add_argument("--hidden-size", type=int, default=4096, help="Width of a token.")
    parser.add_argument("--moe-ffn-hidden-size", type=int, default=14336, help="Of an expert.")
    parser.add_argument("--num-attention-heads", type=int, default=32, help="4 share a key.")
    parser.add_argument("--num-experts", type=int, default=8, help="Experts of a layer.")
    parser.add_argument("--moe-router-topk", type=int, default=2, help="Experts of a token.")
    parser.add_argument("--num-layers", type=int, default=2, help="Layers of the model.")
    parser.add_argument("--vocab-size", type=int, default=32000, help="Tokens there are.")
    parser.add_argument("--seq-length", type=int, default=4096, help="Tokens of a sample.")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="Samples at a time.")
    parser.add_argument("--rounds", type=int, default=10, help="Timed calls of each.")
    parser.add_argument("--warm-up", type=int, default=3, help="Untimed calls of each before.")
    parser.add_argument("--peak-tflops", type=float, help="Of a card that is not in the table.")
    parser.add_argument("--output", type=Path, default=None, help="Folder for the JSON file.")
    return parser.parse_args(words)


def main() -> None:
    """Print the table."""
    args = parse()
    if args.device is None and not torch.cuda.is_available():
        print("gpu_mfu needs a GPU: nothing is measured (--device cpu tries it out on a CPU)")
        return
    args.device = args.device or "cuda"
    shape = (8192, args.hidden_size, args.moe_ffn_hidden_size)
    rows = args.seq_length * args.micro_batch_size if args.device == "cpu" else shape[0]
    args.gemm_tflops = 1e-3 * gemm_gflops(rows, *shape[1:], torch.bfloat16, args.device)
    print(f"fastest product [{rows}, {shape[1]}] x [{shape[2]}]: {args.gemm_tflops:.3g} TFLOP/s")
    with world_of_one():
        report("gpu_mfu", list(bench(args, peers_installed())), args.output)


if __name__ == "__main__":
    main()
