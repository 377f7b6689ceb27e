"""Options of the core of attention: what makes weights of scores. TransformerConfig inherits them.

Megatron's meaning of a window and of its layers: the last of every --window-attn-skip-freq layers
sees everything.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from megatron.core.config_field import flag
from megatron.core.transformer.config.layer_pattern import parse_layer_pattern


def parse_window(text: str) -> list[int]:
    """Turn ``127,0`` or ``(127, 0)`` into two numbers.

    Raises:
        ValueError: The text is anything else.
    """
    try:
        found = ast.literal_eval(text.strip())
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} must be two whole numbers, such as 127,0") from error
    if not isinstance(found, tuple | list) or [type(side) for side in found] != [int, int]:
        raise ValueError(f"{text!r} must be two whole numbers, such as 127,0")
    return list(found)


@dataclass(kw_only=True)
class CoreAttentionConfig:
    """Scores of attention and their weights."""

    softmax_scale: float | None = None
    """What products of queries and keys are multiplied by before the softmax; 1 / sqrt(size of a
    head) when not set."""

    window_size: list[int] | None = field(default=None, metadata=flag(parse=parse_window))
    """Left and right reach of attention, such as 127,0: a position sees itself and the 127 before
    it. -1,0 sees all earlier ones, as when not set. The right one must be 0: attention is causal.
    Work and memory of a layer then grow with the window, not with the square of the sequence."""

    window_attn_skip_freq: int | list[int] | None = field(
        default=None, metadata=flag(parse=parse_layer_pattern)
    )
    """Layers without the window of --window-size: the last of every N layers (N = 2: a window,
    none, a window, ...), or a pattern such as ([1,0]*12), 1 for a window, 0 for none. All layers
    have it when not set."""

    softmax_type: Literal["vanilla", "off-by-one", "learnable"] = "vanilla"
    """Denominator of attention weights: the sum over keys (vanilla), or one more logit in each
    head, which takes weight and gives no value: of 0 (off-by-one) or learnt (learnable)."""

    attn_logit_softcapping: float | None = None
    """Cap c of attention scores: c * tanh(score / c). Attention then keeps its weights for
    backward, on GPUs too: memory grows with the square of the sequence unless
    --recompute-granularity selective (core_attn) computes them again."""

    @property
    def attention_window(self) -> int | None:
        """Positions that a query sees before its own where a layer has the window; None for all."""
        left = -1 if self.window_size is None else self.window_size[0]
        return None if left < 0 else left

    def attention_windows_of(self, num_layers: int) -> list[int | None] | None:
        """Return ``attention_window_of`` each layer; None if all see everything."""
        windows = [self.attention_window_of(layer) for layer in range(num_layers)]
        return None if set(windows) == {None} else windows

    def attention_window_of(self, layer_number: int) -> int | None:
        """Return ``attention_window`` of one layer, None if it sees everything.

        Args:
            layer_number: Global index of the layer, from 0.
        """
        freq = self.window_attn_skip_freq
        if isinstance(freq, int):
            sees_all = (layer_number + 1) % freq == 0
        else:
            # layers of multi-token prediction count on, and are as the last
            sees_all = freq is not None and not freq[min(layer_number, len(freq) - 1)]
        return None if sees_all else self.attention_window

    def mean_keys_of(self, layer_number: int, seq_length: int) -> float:
        """Return how many keys a query of a layer meets, mean over ``seq_length`` positions.

        s / 2 without a window, as Megatron counts the causal half of the square; w - w^2 / 2s with
        a window of w positions, the query's own among them: the triangle at the beginning of the
        sequence is not there.

        Args:
            layer_number: Global index of the layer, from 0.
            seq_length: s, positions of one sample.
        """
        window = self.attention_window_of(layer_number)
        width = seq_length if window is None else min(window + 1, seq_length)
        return width - width * width / (2 * seq_length)

    def core_attention_problems(self, num_layers: int) -> Iterator[str]:
        """Yield one sentence for each contradiction, in the user's flags."""
        window, freq = self.window_size, self.window_attn_skip_freq
        if window is not None:
            yield from _window_problems(list(window))
        if freq is None:
            return
        if window is None:
            yield "--window-attn-skip-freq has no effect without --window-size"
        if isinstance(freq, int):
            if freq < 1:
                yield (
                    f"--window-attn-skip-freq {freq} must be at least 1, or a pattern such as "
                    "([1,0]*12)"
                )
        elif len(freq) != num_layers:
            yield (
                f"--window-attn-skip-freq has {len(freq)} entries, one for each of --num-layers "
                f"{num_layers} is needed"
            )
        elif not set(freq) <= {0, 1}:
            yield f"--window-attn-skip-freq {freq} may hold 1 (a window) and 0 (none) only"


def _window_problems(window: list[int]) -> Iterator[str]:
    shown = f"--window-size {','.join(map(str, window))}"
    if len(window) != 2:
        yield f"{shown} must be two numbers, such as 127,0"
    elif window[1] != 0:
        yield f"{shown}: the right side must be 0, attention sees no later position"
    elif window[0] < -1:
        yield f"{shown}: the left side must be at least 0, or -1 for all earlier positions"
