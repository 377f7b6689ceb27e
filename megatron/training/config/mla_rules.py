"""Rules of multi-head latent attention beyond what its config says of itself."""

from collections.abc import Iterator

from megatron.core.transformer.config.mla import MLA_SHAPE
from megatron.training.config.checks import Check, Rule


def latent_attention(check: Check) -> Iterator[str]:
    """Options of latent attention need it."""
    model = check.config.model
    if model.multi_latent_attention:
        return
    names = " ".join((*MLA_SHAPE, "cache_mla_latents"))
    yield from check.useless(names, "without --multi-latent-attention")
    if "mla_up_proj" in (model.recompute_modules or []):
        yield "--recompute-modules mla_up_proj needs --multi-latent-attention"


MLA_RULES: tuple[Rule, ...] = (latent_attention,)
