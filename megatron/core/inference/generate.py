"""Continue token sequences with a model, several at a time, reading each position once.

Prompts of different lengths are padded on the left, so that all rows end at the same place; a
mask keeps padding out of attention and positions count from each row's own first token.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron.core.errors import ConfigError, MegatronError
from megatron.core.inference.kv_cache import KVCache
from megatron.core.inference.latent_cache import LatentCache
from megatron.core.inference.sampling import SamplingOptions, choose_tokens
from megatron.core.log import log_once
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.precision import params_dtype
from megatron.core.transformer.transformer_config import TransformerConfig

log = logging.getLogger(__name__)

OnToken = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What to generate."""

    max_new_tokens: int
    """Most tokens to add to a prompt."""
    eod: int
    """Id that ends a sequence; it is not part of the result."""
    vocab_size: int
    """Ids of the tokenizer; padded rows of the embedding beyond it are never chosen."""
    max_positions: int | None = None
    """Positions that the model knows; None is no limit."""
    sampling: SamplingOptions = SamplingOptions()
    seed: int = 0
    """Of the draws. Each row has its own stream, so rows do not depend on each other."""


@torch.no_grad()
def generate(
    model: nn.Module,
    config: TransformerConfig,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Continue every prompt until the end of document or ``max_new_tokens``.

    Changes neither the model (its training mode comes back) nor any global generator.

    Args:
        model: A whole GPTModel, on any device; its experts may be spread over ranks, which then all
            call this with the same prompts.
        config: Of the model.
        prompts: Ids of each prompt, at least one each.
        options: How far, and how tokens are chosen.
        on_token: Called as ``on_token(row, id)`` for each new token, for streaming.

    Returns:
        The new ids of each prompt.

    Raises:
        ConfigError: A prompt is empty, or does not fit the model's positions; or the model is split
            in slices or stages.
        MegatronError: The model gives logits that are not numbers.
    """
    _refuse(prompts, options, config)
    if not prompts or options.max_new_tokens == 0:
        return [[] for _ in prompts]
    if config.num_moe_experts is not None and config.chooses_by_expert:
        log_once(
            log,
            "--moe-router-type expert_choice cannot generate, for experts would choose among "
            "tokens that are not there yet: each token goes to its --moe-router-topk best experts "
            "instead, with the same weights",
        )
    was_training = model.training
    model.eval()
    try:
        return _Batch(model, config, prompts, options).run(on_token)
    finally:
        model.train(was_training)


def _refuse(
    prompts: Sequence[Sequence[int]], options: GenerationOptions, config: TransformerConfig
) -> None:
    problems = [*_split_problems(config), *options.sampling.problems()]
    if options.max_new_tokens < 0:
        problems.append(f"--max-new-tokens {options.max_new_tokens} must be 0 or more")
    for row, prompt in enumerate(prompts):
        wanted = len(prompt) + options.max_new_tokens
        if not prompt:
            problems.append(f"prompt {row + 1} is empty: there is nothing to continue")
        elif options.max_positions is not None and wanted > options.max_positions:
            problems.append(
                f"prompt {row + 1} of {len(prompt)} tokens and --max-new-tokens "
                f"{options.max_new_tokens} need {wanted} positions; the model has "
                f"{options.max_positions}"
            )
    ConfigError.raise_if_any(problems)


def _split_problems(config: TransformerConfig) -> Iterator[str]:
    """Yield a sentence where a rank has not all of every layer that every token goes through."""
    for axis in ("tensor_model", "pipeline_model", "context"):
        size = getattr(config, f"{axis}_parallel_size")
        if size > 1:
            yield (
                f"a model split by --{axis.replace('_', '-')}-parallel-size {size} does not "
                "generate: save a checkpoint and load it on one process (tools/generate.py, "
                "load_trained_model), whatever layout saved it"
            )


def make_cache(
    config: TransformerConfig, max_batch: int, max_len: int, device: torch.device | str = "cpu"
) -> KVCache:
    """Return the empty cache that the attention of ``config`` reads and writes."""
    shape, dtype = (config.num_layers, max_batch, max_len), params_dtype(config)
    if config.multi_latent_attention and config.cache_mla_latents:
        widths = config.kv_lora_rank, config.qk_pos_emb_head_dim
        return LatentCache(*shape, *widths, dtype, device)
    heads = config.query_groups, config.head_dim
    return KVCache(*shape, *heads, dtype, device, value_dim=config.value_head_dim)


class _Batch:
    """The rows of one call and what is known of them so far."""

    def __init__(
        self,
        model: nn.Module,
        config: TransformerConfig,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
    ) -> None:
        device = next(model.parameters()).device
        self.model, self.options, self.device = model, options, device
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        self.padding = torch.tensor(padding, device=device)[:, None]  # [b, 1]
        rows = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        self.tokens = torch.tensor(rows, device=device)  # [b, s], those the model reads next
        self.is_padded = longest > min(map(len, prompts))
        positions = longest + options.max_new_tokens
        self.cache = make_cache(config, len(prompts), positions, device)
        self.generators = [_stream(options.seed, row) for row in range(len(prompts))]

    def run(self, on_token: OnToken | None) -> list[list[int]]:
        """Choose tokens until every row has ended."""
        found: list[list[int]] = [[] for _ in self.generators]
        open_rows = set(range(len(found)))
        for _ in range(self.options.max_new_tokens):
            chosen = self._next()
            for row, token in enumerate(chosen.tolist()):
                if row in open_rows and token == self.options.eod:
                    open_rows.discard(row)
                elif row in open_rows:
                    found[row].append(token)
                    if on_token is not None:
                        on_token(row, token)
            if not open_rows:
                break
            self.tokens = chosen[:, None].to(self.device)
        return found

    def _next(self) -> Tensor:
        """Read ``tokens`` and choose one more for each row: [b] on the CPU."""
        start, new = self.cache.length, self.tokens.shape[1]
        places = torch.arange(start, start + new, device=self.device)  # [s]
        logits = self.model(
            self.tokens,
            (places - self.padding).clamp(min=0),
            self._mask(places),
            context=ForwardContext(kv_cache=self.cache),
        )
        last = logits[:, -1].to("cpu")  # [b, v]
        last = last.double() if last.dtype == torch.float64 else last.float()
        if not torch.isfinite(last[:, : self.options.vocab_size]).all():
            raise MegatronError("the model gives logits that are not numbers")
        last[:, self.options.vocab_size :] = float("-inf")
        draws = [torch.rand((), generator=g, dtype=torch.float64) for g in self.generators]
        return choose_tokens(last, self.options.sampling, torch.stack(draws))

    def _mask(self, places: Tensor) -> Tensor | None:
        """Return bool [b, 1, s, positions], True where a query may not look; None without padding.

        Padding looks at itself alone: a row that may look nowhere has no softmax.
        """
        if not self.is_padded:
            return None
        keys = torch.arange(int(places[-1]) + 1, device=self.device)
        is_padding = keys < self.padding  # [b, positions]
        return (is_padding[:, None] & (places[:, None] != keys))[:, None]


def _stream(seed: int, row: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
