"""Our training step of bench-S: what ``pretrain_gpt.py`` runs with ``step_flags``, nothing less.

bench-S: 4 layers, hidden 512, 8 heads, ffn 1024 SwiGLU, 8 experts top-2, vocabulary 8192,
sequence 512, microbatch 4, AdamW, clip 1.0 (62.9M parameters).
"""

import argparse
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import parse_args
from megatron.training.config.run_config import RunConfig
from megatron.training.datasets.batch import Batch
from megatron.training.initialize import World
from megatron.training.run import Run, TrainState
from megatron.training.setup_model import setup_run
from megatron.training.train_step import train_step
from pretrain_gpt import forward_step, model_provider

LEARNING_RATE = 3e-4


class Size(NamedTuple):
    """What can be made smaller; the rest is bench-S."""

    hidden: int
    vocabulary: int
    sequence: int
    microbatch: int

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.sequence * self.microbatch


def bench_s(hidden: int, *, bf16: bool) -> TransformerConfig:
    """Return the model options of bench-S, which has a ``hidden`` size of 512."""
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
        moe_router_load_balancing_type="none",
        bf16=bf16,
    )


def step_flags(size: Size, *, bf16: bool) -> list[str]:
    """Return the command line of ``pretrain_gpt.py`` that trains bench-S.

    Without the balance loss, which none of the others computes.
    """
    text = (
        f"--num-layers 4 --hidden-size {size.hidden} --num-attention-heads 8 "
        f"--ffn-hidden-size {2 * size.hidden} --swiglu --normalization RMSNorm "
        "--position-embedding-type rope --disable-bias-linear "
        "--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 "
        "--num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type none "
        f"--seq-length {size.sequence} --max-position-embeddings {size.sequence} "
        f"--micro-batch-size {size.microbatch} --global-batch-size {size.microbatch} "
        f"--train-iters 1000 --lr {LEARNING_RATE} --lr-decay-style constant "
        f"--lr-warmup-iters 0 --clip-grad 1.0 --mock-data --tokenizer-type NullTokenizer "
        f"--vocab-size {size.vocabulary - 1} --padded-vocab-size {size.vocabulary}"
    )
    return [*text.split(), *(["--bf16"] if bf16 else [])]


class Data:
    """Random tokens that all contenders train on; new ones when ``draw`` is called."""

    def __init__(self, size: Size, seed: int = 1) -> None:
        """Draw the first."""
        self.size = size
        self.generator = torch.Generator().manual_seed(seed)
        self.draw()

    def draw(self) -> None:
        """Take new tokens, [b, s + 1] int64 on the CPU."""
        shape = (self.size.microbatch, self.size.sequence + 1)
        self.samples = torch.randint(self.size.vocabulary, shape, generator=self.generator)

    def pair(self, device: str) -> tuple[Tensor, Tensor]:
        """Return tokens and labels, [b, s] each."""
        ids = self.samples.to(device)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


class Step:
    """The run of a model of ours; calling it trains one step on the tokens of ``data``."""

    name = "ours"

    def __init__(
        self, config: TransformerConfig, size: Size, device: str, data: Data | None = None
    ) -> None:
        """Build model, gradient buffers and optimizer as ``pretrain`` does.

        Args:
            config: Of the model; ``bench_s``, or a variation.
            size: Of vocabulary and batch.
            device: Where.
            data: What to train on; new random tokens at each step when None.
        """
        options = run_config(config, size)
        groups = ProcessGroupCollection.create(config.layout(1))
        world = World(rank=0, world_size=1, device=torch.device(device), pg_collection=groups)
        self.run: Run = setup_run(options, world, model_provider, forward_step)
        self.ddp, self.optimizer = self.run.model, self.run.optimizer
        self.state = TrainState(dropout_seed=options.training.seed)
        self.size = size
        self.data = Data(size) if data is None else data
        self._is_alone = data is None
        self.loss = float("nan")

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(param.numel() for param in self.ddp.parameters())

    def __call__(self) -> None:
        """Forward, backward, optimizer step; ``loss`` is that of before it."""
        if self._is_alone:
            self.data.draw()
        outcome = train_step(self.run, self.state, iter([self.batch()]))
        self.loss = outcome.lm_loss
        self.state.iteration += 1
        self.state.consumed_samples += self.size.microbatch

    def batch(self) -> Batch:
        """Return the tokens as the data loader would."""
        tokens, labels = self.data.pair("cpu")
        return Batch(
            tokens=tokens,
            labels=labels,
            loss_mask=torch.ones(tokens.shape),
            position_ids=torch.arange(self.size.sequence).expand(tokens.shape).contiguous(),
            attention_mask=None,
            sample_ids=tuple(range(self.size.microbatch)),
        )

    @torch.no_grad()
    def forward_loss(self) -> float:
        """Return the mean loss of the tokens, without training on them."""
        batch = self.batch().to(self.run.world.device)
        losses = self.ddp(batch.tokens, batch.position_ids, None, labels=batch.labels)
        return float(losses.double().mean())


def run_config(config: TransformerConfig, size: Size) -> RunConfig:
    """Return the options of a run of bench-S, with ``config`` as the model's."""
    options = parse_args(step_flags(size, bf16=config.bf16), world_size=1)
    config.max_position_embeddings = size.sequence
    options.model = config
    return options


def gemm_flops(config: TransformerConfig, size: Size) -> float:
    """Return the matrix-product FLOPs of one step: active experts, causal half, backward 2 x."""
    hidden = config.hidden_size
    attention = 4 * hidden * hidden + size.sequence * hidden  # the causal half of 2 * s * h
    experts = config.moe_router_topk * 3 * hidden * config.moe_ffn_size
    layer = attention + experts + (config.num_moe_experts or 0) * hidden
    return 6.0 * size.tokens * (config.num_layers * layer + hidden * size.vocabulary)


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """Offer what can be made smaller than bench-S."""
    parser.add_argument("--hidden-size", type=int, default=512, help="Width of a token.")
    parser.add_argument("--vocab-size", type=int, default=8192, help="Tokens there are.")
    parser.add_argument("--seq-length", type=int, default=512, help="Tokens of a sample.")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="Samples of a step.")


def size_of(args: argparse.Namespace) -> Size:
    """Return what ``add_size_options`` read."""
    return Size(args.hidden_size, args.vocab_size, args.seq_length, args.micro_batch_size)
