"""A checkpoint of ours against transformers: next tokens, with and without a cache, and logits."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.core.inference.generate import GenerationOptions, generate
from megatron.core.inference.sampling import SamplingOptions
from megatron.training.checkpoint_model import load_trained_model

NEVER = -1
"""No id: nothing ends a text before its length."""


def compare(ours: Path, theirs: Path, prompts: Tensor, new_tokens: int) -> dict[str, Any]:
    """Compare greedy continuations and the logits of the prompts.

    Args:
        ours: Folder of checkpoints.
        theirs: Folder of Hugging Face's.
        prompts: [prompts, length], int64.
        new_tokens: To add to each; 0 compares logits alone.

    Returns:
        Plain figures: ``largest_logit``, ``logit_difference``, ``tokens``, ``same_with_cache`` and
        ``same_without_cache`` of that many.
    """
    trained = load_trained_model(ours)
    model, config = trained.model, trained.config.model
    with torch.no_grad():
        logits = model(prompts, torch.arange(prompts.shape[1]).expand_as(prompts)).clone()
    cached = torch.tensor(
        generate(
            model,
            config,
            prompts.tolist(),
            GenerationOptions(
                max_new_tokens=new_tokens,
                eod=NEVER,
                vocab_size=logits.shape[2],
                sampling=SamplingOptions(temperature=0.0),
            ),
        ),
        dtype=torch.int64,
    )
    plain = _without_cache(model, torch.cat([prompts, cached.view(len(prompts), -1)], dim=1))
    plain = plain[:, prompts.shape[1] - 1 :]
    del model, trained
    expected, their_logits = _theirs(theirs, prompts, new_tokens)
    difference = (logits - their_logits).abs()
    return {
        "prompts": len(prompts),
        "prompt_tokens": prompts.shape[1],
        "largest_logit": float(their_logits.abs().max()),
        "logit_difference": float(difference.max()),
        "tokens": expected.numel(),
        "same_with_cache": int((cached.view_as(expected) == expected).sum()),
        "same_without_cache": int((plain == expected).sum()),
    }


@torch.no_grad()
def _without_cache(model: torch.nn.Module, text: Tensor) -> Tensor:
    """Return the best next token behind each token of ``text`` [b, s] but the last.

    Causal, so that one forward says for every length what a forward of that length would choose:
    where all are the tokens of the text, choosing one by one without a cache gives the text.
    """
    places = torch.arange(text.shape[1] - 1).expand(len(text), -1)
    best: Tensor = model(text[:, :-1], places).argmax(dim=2)
    return best


@torch.no_grad()
def _theirs(folder: Path, prompts: Tensor, new_tokens: int) -> tuple[Tensor, Tensor]:
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = model(prompts).logits
    if not new_tokens:
        return prompts[:, :0], logits
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # no end
    text = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens
    )
    return text[:, prompts.shape[1] :], logits
