"""Options of positions: the table of learned ones, rotary ones and how these are stretched.

Several flags say how rotary positions are stretched; ``rope_scaling`` is what they say together.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from megatron.core.config_field import derived, flag

ScalingType = Literal["none", "linear", "ntk", "yarn", "llama3", "longrope"]

READ_BY: dict[str, tuple[ScalingType, ...]] = {
    "rope_scaling_factor": ("linear", "ntk", "yarn", "llama3", "longrope"),
    "rope_scaling_original_max_position_embeddings": ("yarn", "llama3", "longrope"),
    "rope_scaling_low_freq_factor": ("llama3",),
    "rope_scaling_high_freq_factor": ("llama3",),
    "rope_attention_factor": ("yarn", "longrope"),
    "yarn_beta_fast": ("yarn",),
    "yarn_beta_slow": ("yarn",),
    "yarn_correction_range_round_to_int": ("yarn",),
    "mscale": ("yarn",),
    "mscale_all_dim": ("yarn",),
    "longrope_short_factor": ("longrope",),
    "longrope_long_factor": ("longrope",),
}
"""Option -> the kinds of scaling that it is part of."""

_FACTORS: dict[ScalingType, float] = {"llama3": 8.0}
_LENGTHS: dict[ScalingType, int] = {"llama3": 8192, "yarn": 4096}


@dataclass(kw_only=True)
class RotaryConfig:
    """Positions."""

    position_embedding_type: Literal["learned_absolute", "rope", "yarn", "none"] = (
        "learned_absolute"
    )
    """How tokens know their place: a learned table, rotated queries and keys, these stretched by
    YaRN (rope with --rope-scaling-type yarn), or not at all."""

    max_position_embeddings: int = derived()
    """Longest position that the learned table holds; --seq-length when not set."""

    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""

    rotary_percent: float = 1.0
    """Share of each head that is rotated, in (0, 1]."""

    rotary_interleaved: bool = False
    """Rotate channels 2 i and 2 i + 1 of a head together, not i and i + half of them."""

    rotary_seq_len_interpolation_factor: int | None = None
    """Divide positions by it: --rope-scaling-type linear with this factor."""

    use_rope_scaling: bool = False
    """Stretch rotary positions as Llama 3.1 does: --rope-scaling-type llama3."""

    rope_type: Literal["rope", "yarn"] | None = None
    """With yarn, --rope-scaling-type yarn; with rope, or when not set, what the others say."""

    rope_scaling_type: ScalingType = "none"
    """How rotary positions reach beyond the length they were trained on: positions divided by a
    factor, a larger base (ntk), each frequency by its own rule (yarn, llama3), or a factor for each
    frequency (longrope)."""

    rope_scaling_factor: float | None = field(
        default=None, metadata=flag("--rope-scaling-factor", "--rotary-scaling-factor")
    )
    """Longest length over the original one, by which positions are stretched. When not set, 8 for
    llama3, and for longrope --max-position-embeddings over the original length."""

    rope_scaling_original_max_position_embeddings: int | None = field(
        default=None,
        metadata=flag(
            "--rope-scaling-original-max-position-embeddings",
            "--yarn-original-max-position-embeddings",
        ),
    )
    """Original length in tokens. When not set, 8192 for llama3 and 4096 for yarn."""

    rope_scaling_low_freq_factor: float = 1.0
    """Llama3: frequencies with fewer turns than this within the original length are divided by the
    factor."""

    rope_scaling_high_freq_factor: float = 4.0
    """Llama3: frequencies with more turns than this within the original length are kept."""

    rope_attention_factor: float | None = None
    """Rotated channels are multiplied by it, under yarn and longrope. When not set, 0.1 ln(factor)
    + 1 for yarn (see --mscale), sqrt(1 + ln(factor) / ln(original length)) for longrope."""

    yarn_beta_fast: float = 32.0
    """YaRN: frequencies with more turns than this within the original length are kept."""

    yarn_beta_slow: float = 1.0
    """YaRN: frequencies with fewer turns than this within the original length are divided by the
    factor."""

    yarn_correction_range_round_to_int: bool = True
    """YaRN: round the range of channels between the two to whole channels, outwards."""

    mscale: float = 1.0
    """YaRN: where --mscale-all-dim is not 0, rotated channels are multiplied by (0.1 mscale ln(
    factor) + 1) over the same of --mscale-all-dim."""

    mscale_all_dim: float = 0.0
    """YaRN: see --mscale."""

    longrope_short_factor: list[float] | None = None
    """LongRoPE: what each frequency is divided by, for sequences up to the original length."""

    longrope_long_factor: list[float] | None = None
    """LongRoPE: what each frequency is divided by, for longer sequences."""

    @property
    def has_rotary_positions(self) -> bool:
        """Whether queries and keys are rotated."""
        return self.position_embedding_type in ("rope", "yarn")

    @property
    def position_kind(self) -> str:
        """Say how positions are known, whichever way they are stretched."""
        return "rope" if self.has_rotary_positions else self.position_embedding_type

    @property
    def rope_scaling(self) -> ScalingType:
        """How rotary positions are stretched, whichever flag says it."""
        return next(iter(self._scaling_asked().values()), "none")

    def _scaling_asked(self) -> dict[str, ScalingType]:
        """Map each way of asking for a kind of scaling that is used to the kind."""
        ways: dict[str, ScalingType] = {}
        if not self.has_rotary_positions:
            return ways
        if self.position_embedding_type == "yarn":
            ways["--position-embedding-type yarn"] = "yarn"
        if self.rope_type == "yarn":
            ways["--rope-type yarn"] = "yarn"
        if self.use_rope_scaling:
            ways["--use-rope-scaling"] = "llama3"
        if (factor := self.rotary_seq_len_interpolation_factor) is not None:
            ways[f"--rotary-seq-len-interpolation-factor {factor}"] = "linear"
        if self.rope_scaling_type != "none":
            ways[f"--rope-scaling-type {self.rope_scaling_type}"] = self.rope_scaling_type
        return ways

    @property
    def rope_factor(self) -> float:
        """By how much rotary positions are stretched; 1 where they are not."""
        kind = self.rope_scaling
        if kind == "none":
            return 1.0
        if kind == "linear" and self.rotary_seq_len_interpolation_factor is not None:
            return float(self.rotary_seq_len_interpolation_factor)
        if self.rope_scaling_factor is not None:
            return self.rope_scaling_factor
        if kind == "longrope":
            return self.max_position_embeddings / (self.rope_original_length or 1)
        return _FACTORS.get(kind, 1.0)

    @property
    def rope_original_length(self) -> int | None:
        """Length in tokens that rotary positions are stretched from, where the kind reads it."""
        given, kind = self.rope_scaling_original_max_position_embeddings, self.rope_scaling
        return _LENGTHS.get(kind) if given is None else given

    def rope_is_long(self, length: int) -> bool:
        """Return whether frequencies are those of long sequences, for one of ``length`` tokens."""
        return self.rope_scaling == "longrope" and length > (self.rope_original_length or 0)

    def rotary_problems(self, dim: int) -> Iterator[str]:
        """Yield one sentence for each contradiction in how positions are stretched.

        Args:
            dim: Channels of a head that are rotated.
        """
        ways = self._scaling_asked()
        if len(set(ways.values())) > 1:
            yield (
                f"{' and '.join(ways)} stretch rotary positions in different ways; keep one of them"
            )
            return
        if self.rope_type == "rope" and "yarn" in ways.values():
            yield f"--rope-type rope contradicts {' and '.join(ways)}; leave one out"
        if len(ways) > 1 and self.rope_scaling == "linear":
            yield f"{' and '.join(ways)} both stretch linearly; leave one out"
        if ways:
            yield from self._missing_numbers(next(iter(ways)))
            yield from self._wrong_numbers(next(iter(ways)), dim)

    def _missing_numbers(self, shown: str) -> Iterator[str]:
        kind = self.rope_scaling
        by_flag = self.rotary_seq_len_interpolation_factor is not None
        if kind in ("linear", "ntk", "yarn") and not by_flag and self.rope_scaling_factor is None:
            yield f"{shown} needs --rope-scaling-factor, the longest length over the original one"
        if kind == "longrope":
            if self.rope_original_length is None:
                yield f"{shown} needs --rope-scaling-original-max-position-embeddings"
            for name in ("longrope_short_factor", "longrope_long_factor"):
                if getattr(self, name) is None:
                    yield f"{shown} needs --{name.replace('_', '-')}, a number for each frequency"

    def _wrong_numbers(self, shown: str, dim: int) -> Iterator[str]:
        kind, base = self.rope_scaling, self.rotary_base
        low, high = self.rope_scaling_low_freq_factor, self.rope_scaling_high_freq_factor
        if kind == "llama3" and low >= high:
            yield (
                f"--rope-scaling-high-freq-factor {high:g} must be above "
                f"--rope-scaling-low-freq-factor {low:g}"
            )
        if kind == "yarn" and self.yarn_beta_fast <= self.yarn_beta_slow:
            yield (
                f"--yarn-beta-fast {self.yarn_beta_fast:g} must be above --yarn-beta-slow "
                f"{self.yarn_beta_slow:g}"
            )
        if kind == "yarn" and base <= 1:
            yield f"{shown} needs a --rotary-base above 1, not {base:g}"
        if kind == "ntk" and dim <= 2:
            yield f"{shown} needs more than the {dim} channels of a head that are rotated"
        if kind == "longrope" and (self.rope_original_length or 2) < 2:
            yield f"{shown} needs an original length above 1"
        for name in ("longrope_short_factor", "longrope_long_factor"):
            factors = getattr(self, name)
            if kind == "longrope" and factors is not None and len(factors) != dim // 2:
                yield (
                    f"--{name.replace('_', '-')} has {len(factors)} numbers; one for each pair of "
                    f"the {dim} channels of a head that are rotated is needed, {dim // 2}"
                )


def written_out(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of positions without other ways to say them and without defaults.

    Args:
        options: Of a model, by field name; those of other parts are not looked at.

    Returns:
        Options of the same function: ``rope_scaling_type`` says the kind of scaling, its factor and
        original length are given where it has them.
    """
    names = {entry.name for entry in fields(RotaryConfig)}
    config = RotaryConfig(**{name: value for name, value in options.items() if name in names})
    kind = config.rope_scaling
    found: dict[str, Any] = {
        "position_embedding_type": config.position_kind,
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": False,
        "rope_type": None,
        "rope_scaling_type": kind,
    }
    if kind != "none":
        found["rope_scaling_factor"] = config.rope_factor
        found["rope_scaling_original_max_position_embeddings"] = config.rope_original_length
    return found
