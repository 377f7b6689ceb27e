"""Rows that pad the vocabulary have no share in the softmax, whoever holds them."""

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.cross_entropy import LogitTransform, linear_cross_entropy
from tests.helpers.models import MAX_LENGTH, tiny_config
from tests.helpers.ranks import run_ranks

ROWS, TOKENS = 48, 21
"""The second of two ranks has 24 rows and not one token."""


def _weights() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn((6, 2, 16), generator=generator, dtype=torch.float64)
    weight = torch.randn((ROWS, 16), generator=generator, dtype=torch.float64)
    return hidden, weight, torch.randint(TOKENS, (6, 2), generator=generator)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_loss_and_gradients_are_those_of_the_rows_without_padding(softcap, dtype) -> None:
    hidden, weight, labels = _weights()
    found = []
    for rows, columns in ((TOKENS, None), (ROWS, TOKENS)):
        transform = LogitTransform(0.7, softcap, columns)
        here = hidden.to(dtype, copy=True).requires_grad_()
        part = weight[:rows].to(dtype, copy=True).requires_grad_()
        loss = linear_cross_entropy(here, part, labels, transform=transform)
        loss.square().sum().backward()
        assert part.grad is not None
        assert here.grad is not None
        found.append((loss.detach(), here.grad, part.grad[:TOKENS]))
        assert not part.grad[TOKENS:].any()
        logits = transform.of(here @ part.T)
        assert (logits[..., TOKENS:] == -torch.inf).all()
        want = torch.nn.functional.cross_entropy(
            logits.double().flatten(0, 1), labels.flatten(), reduction="none"
        )
        tolerance = 1e-13 if dtype == torch.float64 else 1e-2
        torch.testing.assert_close(loss.double().flatten(), want, rtol=tolerance, atol=tolerance)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-3
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def _step(rows: int, tokens: int | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the losses and gradients of a model whose tokens have the same rows each time."""
    config = tiny_config(swiglu=True, ffn_hidden_size=24, num_moe_experts=None)
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config),
        rows,
        MAX_LENGTH,
        unpadded_vocab_size=tokens,
        pg_collection=ProcessGroupCollection.create(config.layout(1)),
    )
    embedding = _weights()[1] @ torch.eye(16, config.hidden_size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "word_embeddings" in name:
                param.copy_(embedding[:rows])
            else:
                param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64))
    labels = _weights()[2].T.contiguous()
    loss = model(labels, torch.arange(6).expand(2, 6), labels=labels)
    loss.sum().backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _padded_equals_unpadded() -> None:
    plain, plain_grads = _step(TOKENS, None)
    padded, padded_grads = _step(ROWS, TOKENS)
    shares, _ = _step(ROWS, None)
    torch.testing.assert_close(padded, plain, rtol=1e-12, atol=1e-12)
    assert (shares - plain).abs().max() > 1e-3, "padding that is not left out must be seen"
    for name, grad in plain_grads.items():
        got = padded_grads[name][:TOKENS] if "word_embeddings" in name else padded_grads[name]
        torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-12)


def test_a_padded_model_computes_what_the_unpadded_one_does() -> None:
    run_ranks(_padded_equals_unpadded, 1)


def _split_rows() -> None:
    hidden, weight, labels = _weights()
    group = dist.group.WORLD
    assert group is not None
    from megatron.core.models.common.output_layer import OutputLayer

    config = tiny_config(
        tensor_model_parallel_size=2, untie_embeddings_and_output_weights=True, hidden_size=16
    )
    groups = ProcessGroupCollection.create(config.layout(2))
    layer = OutputLayer(config, ROWS, unpadded_vocab_size=TOKENS, pg_collection=groups)
    assert layer.weight is not None
    own = slice(24 * group.rank(), 24 * group.rank() + 24)
    with torch.no_grad():
        layer.weight.copy_(weight[own])
    whole = weight[:TOKENS].clone().requires_grad_()
    want = linear_cross_entropy(hidden.clone().requires_grad_(), whole, labels)
    loss = layer.loss(hidden.requires_grad_(), None, labels.T)
    torch.testing.assert_close(loss.T, want, rtol=1e-12, atol=1e-12)
    want.sum().backward()
    loss.sum().backward()
    expected = torch.zeros_like(weight)
    expected[:TOKENS] = whole.grad
    torch.testing.assert_close(layer.weight.grad, expected[own], rtol=1e-12, atol=1e-12)
    logits = layer(hidden.detach(), None)
    assert (logits[..., TOKENS:] == -torch.inf).all()
    torch.testing.assert_close(logits[..., :TOKENS], hidden.detach() @ weight[:TOKENS].T)


def test_a_rank_whose_rows_are_all_padding_adds_nothing() -> None:
    run_ranks(_split_rows, 2)
