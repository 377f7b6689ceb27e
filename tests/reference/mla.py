"""Multi-head latent attention written out: one sample, one head, one query at a time.

Source: DeepSeek-V2 (arXiv:2405.04434), eq. 9-19.
"""

import torch
from torch import Tensor


def rotate_neighbours(x: Tensor, position: int, frequencies: list[float]) -> Tensor:
    """Turn channels (2 i, 2 i + 1) of x [d] by position * frequencies[i]."""
    out = []
    for i, frequency in enumerate(frequencies):
        angle = torch.tensor(position * frequency, dtype=torch.float64)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x[2 * i], x[2 * i + 1]
        out += [first * cos - second * sin, second * cos + first * sin]
    return torch.stack(out)


def plain_frequencies(channels: int, base: float) -> list[float]:
    """Return the turn a position of each pair of ``channels``."""
    return [base ** (-2 * i / channels) for i in range(channels // 2)]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Divide x [d] by its root mean square."""
    return x / (x.square().mean() + epsilon).sqrt() * weight


def latent_attention(
    x: Tensor,
    weights: dict[str, Tensor],
    *,
    heads: int,
    widths: tuple[int, int, int],
    frequencies: list[float],
    scale: float,
    epsilon: float = 1e-5,
) -> Tensor:
    """Causal latent attention of one sequence.

    Args:
        x: [s, h].
        weights: By the parameter names of ``MLASelfAttention``.
        heads: Of queries, and so of keys and values.
        widths: qk_head_dim, qk_pos_emb_head_dim, v_head_dim.
        frequencies: Of the rotated pairs.
        scale: Of scores.
        epsilon: Of the norms of latents.

    Returns:
        [s, h].
    """
    nope, pe, v_dim = widths
    tokens = [_token(row, weights, epsilon) for row in x]
    results = []
    for t, (query_row, _, _) in enumerate(tokens):
        row = []
        for head in range(heads):
            own = query_row[head * (nope + pe) : (head + 1) * (nope + pe)]
            query = torch.cat([own[:nope], rotate_neighbours(own[nope:], t, frequencies)])
            scores, values = [], []
            for j in range(t + 1):
                _, up, k_pe = tokens[j]
                both = up[head * (nope + v_dim) : (head + 1) * (nope + v_dim)]
                key = torch.cat([both[:nope], rotate_neighbours(k_pe, j, frequencies)])
                scores.append(scale * (query @ key))
                values.append(both[nope:])
            probs = torch.stack(scores).softmax(dim=0)
            row.append(sum(probs[j] * values[j] for j in range(t + 1)))
        results.append(_linear(torch.cat(row), weights, "linear_proj"))
    return torch.stack(results)


def _token(
    row: Tensor, weights: dict[str, Tensor], epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return all queries of a token, all its keys and values, and its one key to be rotated."""
    if "linear_q_proj.weight" in weights:
        query = _linear(row, weights, "linear_q_proj")
    else:
        latent = _linear(row, weights, "linear_q_down_proj")
        latent = rms_norm(latent, weights["q_layernorm.weight"], epsilon)
        query = _linear(latent, weights, "linear_q_up_proj")
    compressed = _linear(row, weights, "linear_kv_down_proj")
    rank = weights["kv_layernorm.weight"].numel()
    latent = rms_norm(compressed[:rank], weights["kv_layernorm.weight"], epsilon)
    return query, _linear(latent, weights, "linear_kv_up_proj"), compressed[rank:]


def _linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    out = weights[f"{name}.weight"] @ x
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out
