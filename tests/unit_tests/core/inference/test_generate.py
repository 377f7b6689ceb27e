import pytest
import torch

from megatron.core.errors import ConfigError, MegatronError
from megatron.core.inference.generate import GenerationOptions, generate
from megatron.core.inference.sampling import SamplingOptions
from megatron.core.models.gpt.gpt_model import GPTModel
from tests.helpers.models import MAX_LENGTH, VOCAB, tiny_config, tiny_gpt

PROMPTS = [[5, 9, 2], [7], [3, 1, 4, 1, 5, 9, 2, 6], [11, 12]]
NEW = 8
GREEDY = SamplingOptions(temperature=0.0)


def model_of(**options: object) -> GPTModel:
    moe = {"num_moe_experts": 4, "moe_router_topk": 2}
    return tiny_gpt(tiny_config(**(moe | options)))


def run(model: GPTModel, prompts: list[list[int]], **options) -> list[list[int]]:
    defaults = {"max_new_tokens": NEW, "eod": VOCAB - 1, "vocab_size": VOCAB, "sampling": GREEDY}
    return generate(model, model.config, prompts, GenerationOptions(**(defaults | options)))


@torch.no_grad()
def plainly(model: GPTModel, prompt: list[int], eod: int) -> list[int]:
    """Greedy generation without cache, padding or batch."""
    model.eval()
    ids = list(prompt)
    for _ in range(NEW):
        tokens = torch.tensor([ids])
        token = model(tokens, torch.arange(len(ids))[None])[0, -1].argmax().item()
        if token == eod:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("positions", ["learned_absolute", "rope"])
def test_prompts_of_any_lengths_together_give_what_each_gives_alone(positions: str) -> None:
    model = model_of(position_embedding_type=positions)
    found = run(model, PROMPTS, eod=VOCAB)
    assert found == [plainly(model, prompt, VOCAB) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in found}) > 2


def test_a_row_ends_at_the_end_of_document_and_the_others_go_on() -> None:
    model = model_of()
    eod = plainly(model, PROMPTS[0], VOCAB)[3]
    found = run(model, PROMPTS, eod=eod)
    assert found == [plainly(model, prompt, eod) for prompt in PROMPTS]
    assert len(found[0]) < NEW


def test_padded_rows_of_the_vocabulary_are_never_chosen() -> None:
    model = model_of()
    first = run(model, PROMPTS)[0][0]
    sampling = SamplingOptions(temperature=5.0)
    found = run(model, PROMPTS, vocab_size=first, eod=first, sampling=sampling, max_new_tokens=15)
    assert all(token < first for ids in found for token in ids)


def test_a_row_draws_the_same_whatever_is_beside_it() -> None:
    model = model_of()
    sampling = SamplingOptions(temperature=2.0)
    together = run(model, PROMPTS, sampling=sampling, seed=3)
    assert run(model, PROMPTS[:1], sampling=sampling, seed=3) == together[:1]
    assert run(model, PROMPTS, sampling=sampling, seed=4) != together


def test_training_is_not_changed() -> None:
    model = model_of(hidden_dropout=0.5)
    model.train()
    weights = [param.clone() for param in model.parameters()]
    state = torch.get_rng_state()
    modes = []
    model.register_forward_hook(lambda *_: modes.append(model.training))
    run(model, PROMPTS, sampling=SamplingOptions())
    assert set(modes) == {False}
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, model.parameters(), weights))
    assert all(param.grad is None for param in model.parameters())


def test_tokens_are_told_as_they_come() -> None:
    model, told = model_of(), []
    options = GenerationOptions(max_new_tokens=NEW, eod=VOCAB, vocab_size=VOCAB, sampling=GREEDY)
    found = generate(model, model.config, PROMPTS[:1], options, lambda *new: told.append(new))
    assert told == [(0, token) for token in found[0]]


def test_nothing_to_do_gives_nothing() -> None:
    model = model_of()
    assert run(model, []) == []
    assert run(model, [[1], [2, 3]], max_new_tokens=0) == [[], []]


def test_impossible_wishes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        run(
            model_of(),
            [[], [1] * 20],
            max_positions=MAX_LENGTH,
            sampling=SamplingOptions(temperature=-1.0),
        )
    text = str(caught.value)
    assert "prompt 1 is empty" in text
    assert (
        "prompt 2 of 20 tokens and --max-new-tokens 8 need 28 positions; the model has 24" in text
    )
    assert "--temperature" in text


@pytest.fixture
def broken() -> GPTModel:
    model = model_of()
    with torch.no_grad():
        model.embedding.word_embeddings.weight[:] = float("nan")
    return model


def test_a_model_without_numbers_is_told(broken: GPTModel) -> None:
    with pytest.raises(MegatronError, match="not numbers"):
        run(broken, PROMPTS)
