"""Multi-token prediction written out: a chain of depths, one sample at a time."""

from dataclasses import replace

import torch
from torch import Tensor

from tests.reference.gpt import gpt_logits, norm, token_losses


def mtp_loss_sums(
    weights: dict[str, Tensor],
    config,
    ids: Tensor,
    positions: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    documents: Tensor,
) -> tuple[list[Tensor], list[int]]:
    """Sum of the losses that count and their number, of each depth of a dense GPT.

    Args:
        weights: By the parameter names of ``GPTModel``.
        config: TransformerConfig; its rotary positions, if any, are whole.
        ids: [b, s].
        positions: [b, s].
        labels: [b, s].
        loss_mask: [b, s].
        documents: [b, s], the document of each token.
    """
    head = weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"])
    hidden = _hidden(weights, config, ids, positions)  # [b, s, h]
    sums, counts = [], []
    for depth in range(config.mtp_num_layers):
        own = _below(weights, f"mtp.layers.{depth}.")
        rows, losses, count = [], [], 0
        for b in range(len(ids)):
            row = _one_depth(own, weights, config, hidden[b], ids[b], positions[b], depth + 1)
            rows.append(row)
            for i in range(ids.shape[1] - depth - 1):
                ahead = i + depth + 1
                if not loss_mask[b, ahead] or documents[b, i] != documents[b, ahead]:
                    continue
                logits = (head @ row[i]) * config.logits_multiplier
                losses.append(token_losses(logits[None, None], labels[b, ahead][None, None]).sum())
                count += 1
        hidden = torch.stack(rows)
        sums.append(torch.stack(losses).sum())
        counts.append(count)
    return sums, counts


def _one_depth(
    own: dict[str, Tensor],
    weights: dict[str, Tensor],
    config,
    hidden: Tensor,
    ids: Tensor,
    positions: Tensor,
    step: int,
) -> Tensor:
    """Hidden states [s, h] of one depth of one sample."""
    length = len(ids)
    ahead = torch.cat([ids[step:], torch.zeros_like(ids[:step])])[:length]
    embedded = weights["embedding.word_embeddings.weight"][ahead] * config.embedding_multiplier
    if config.position_embedding_type == "learned_absolute":
        places = torch.cat([positions[step:], torch.zeros_like(positions[:step])])[:length]
        embedded = embedded + weights["embedding.position_embeddings.weight"][places]
    pair = torch.cat(
        [
            norm(embedded, _below(own, "enorm."), config),
            norm(hidden, _below(own, "hnorm."), config),
        ],
        dim=-1,
    )
    joined = pair @ own["eh_proj.weight"].T
    # a GPT of this one layer, which looks its rows up by number
    alone = {f"decoder.layers.0.{k}": v for k, v in _below(own, "transformer_layer.").items()}
    alone |= {f"decoder.{k}": v for k, v in own.items() if k.startswith("final_layernorm.")}
    alone["embedding.word_embeddings.weight"] = joined
    places = weights.get("embedding.position_embeddings.weight")
    if places is not None:
        alone["embedding.position_embeddings.weight"] = torch.zeros_like(places)
    numbers = torch.arange(length)
    one_layer = replace(config, num_layers=1, mtp_num_layers=None)
    return _hidden(alone, one_layer, numbers[None], numbers[None])[0]


def _hidden(weights: dict[str, Tensor], config, ids: Tensor, positions: Tensor) -> Tensor:
    """Hidden states [b, s, h] behind the last norm: logits of an output layer that changes none."""
    same = torch.eye(config.hidden_size, dtype=torch.float64)
    of_rows = "mtp.layers.0.enorm.weight" not in weights  # rows that are no tokens' vectors
    plain = replace(
        config,
        logits_multiplier=1.0,
        final_logit_softcapping=None,
        embedding_multiplier=1.0 if of_rows else config.embedding_multiplier,
    )
    return gpt_logits(weights | {"output_layer.weight": same}, plain, ids, positions)


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
