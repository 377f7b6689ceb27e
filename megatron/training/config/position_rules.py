"""Rules of positions: how far they reach, and how rotary ones are stretched."""

from collections.abc import Iterator
from dataclasses import fields

from megatron.core.transformer.config.rotary import READ_BY, RotaryConfig
from megatron.training.config.checks import Check

_ROTARY = [
    field.name
    for field in fields(RotaryConfig)
    if field.name not in ("position_embedding_type", "max_position_embeddings")
]


def positions(check: Check) -> Iterator[str]:
    """Positions must reach as far as samples; rotary options need rotary positions."""
    model, length = check.config.model, check.config.data.seq_length
    if length > model.max_position_embeddings:
        yield (
            f"{check.show('seq_length')} must not be larger than "
            f"{check.show('max_position_embeddings')}"
        )
    if not model.has_rotary_positions:
        yield from check.useless(" ".join(_ROTARY), "without --position-embedding-type rope")
    else:
        yield from _stretching(check)
        rotated = int(model.rotary_channels * model.rotary_percent)
        if rotated < 2 or rotated % 2:
            share = (
                "" if model.rotary_percent == 1 else f" x --rotary-percent {model.rotary_percent:g}"
            )
            size, change = "head size", "--num-attention-heads, --kv-channels"
            if model.multi_latent_attention:
                size = change = "--qk-pos-emb-head-dim"
            yield (
                f"rotary positions turn pairs: {size} {model.rotary_channels}{share} = {rotated} "
                f"must be even; change {change} or --rotary-percent"
            )
    learned = model.position_embedding_type == "learned_absolute"
    if not learned:
        yield from check.useless(
            "reset_position_ids",
            f"with {check.show('position_embedding_type')}: only a learned table is asked by "
            "position",
        )
    elif "--no-position-embedding" in check.without_effect:
        yield (
            "--no-position-embedding contradicts --position-embedding-type learned_absolute, the "
            "default; add --position-embedding-type rope or none"
        )


def _stretching(check: Check) -> Iterator[str]:
    """What is given must be read by the way in which positions are stretched, and fit together."""
    model = check.config.model
    problems = list(model.rotary_problems(model.rotary_dim))
    yield from problems
    if problems:
        return
    kind = model.rope_scaling
    unread = [name for name, kinds in READ_BY.items() if kind not in kinds]
    if model.rotary_seq_len_interpolation_factor is not None:
        shown = check.show("rotary_seq_len_interpolation_factor")
        yield from check.useless("rope_scaling_factor", f"with {shown}")
    for kinds in dict.fromkeys(READ_BY[name] for name in unread):
        names = " ".join(name for name in unread if READ_BY[name] == kinds)
        yield from check.useless(names, f"without --rope-scaling-type {' or '.join(kinds)}")
