"""Rules of the residual stream and its factors; each yields sentences."""

from collections.abc import Iterator

from megatron.training.config.checks import Check, Rule


def scaling(check: Check) -> Iterator[str]:
    """What the config says of its factors and norms."""
    yield from check.config.model.scaling_problems()


SCALING_RULES: tuple[Rule, ...] = (scaling,)
