"""Continue text with a trained model: ``python tools/generate.py --load CKPT --prompt "..."``.

Model, tokenizer and their settings come from the checkpoint; one process is enough, however many
trained it.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.dist_checkpointing.object_folders import place, store_problem
from megatron.core.errors import ConfigError, DataError
from tools.preprocessing import command_line

if TYPE_CHECKING:
    from megatron.core.tokenizers.base import Tokenizer

DEFAULT_TOKENS = 100


def main(argv: list[str] | None = None) -> None:
    """Parse, load, generate, print."""
    options = parse_options(argv)
    check(options)
    run(options, read_prompts(options))


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; the parser ends the process with code 2 on mistakes."""
    parser = command_line.ToolParser("Continue text with a trained model.")
    add = parser.add_argument
    add(
        "--load",
        type=place,
        required=True,
        help="Folder or URL of checkpoints (--save of the run).",
    )
    add("--ckpt-step", type=int, help="Iteration to load; the latest when not set.")
    add("--prompt", action="append", default=[], help="Text to continue; may be repeated.")
    add("--prompt-file", type=Path, help="Text file with one prompt a line.")
    add(
        "--max-new-tokens",
        type=int,
        help="Most tokens to add; when not set 100, or as many as the model has positions for.",
    )
    add("--greedy", action="store_true", help="Always take the most likely token.")
    add("--temperature", type=float, help="Divides the logits; 1.0 when not set, 0 is greedy.")
    add("--top-k", type=int, default=0, help="Choose among so many tokens; 0 is all.")
    add(
        "--top-p",
        type=float,
        default=0.0,
        help="Choose among the likeliest tokens that reach this probability; 0 is all.",
    )
    add("--seed", type=int, default=1234, help="Of the draws.")
    add(
        "--cache-mla-latents",
        action="store_true",
        help="Of a model with --multi-latent-attention remember latents instead of keys and "
        "values: less memory, the same tokens. As the run said when not set.",
    )
    add("--device", choices=("cpu", "cuda"), help="cuda when there is one, when not set.")
    return parser.parse_tool_args(argv)


def read_prompts(options: argparse.Namespace) -> list[str]:
    """Return the prompts of the command line, then those of the file.

    Raises:
        ConfigError: There is none.
        DataError: The file is no text in UTF-8.
        OSError: The file cannot be read.
    """
    prompts = list(options.prompt)
    if options.prompt_file is not None:
        try:
            lines = options.prompt_file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"--prompt-file {options.prompt_file} is no UTF-8: {error}") from error
        prompts += [line for line in lines if line]
    if not prompts:
        raise ConfigError('nothing to continue: give --prompt "..." or --prompt-file FILE')
    return prompts


def check(options: argparse.Namespace) -> None:
    """Refuse what can be refused before torch is loaded.

    Raises:
        ConfigError: All problems at once.
    """
    problems = []
    if options.greedy and options.temperature not in (None, 0.0):
        problems.append("--greedy and --temperature contradict each other; leave one out")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        problems.append("one process generates: start with python, not torchrun")
    if problem := store_problem(options.load):
        problems.append(f"--load {options.load} {problem}")
    elif not options.load.is_dir():
        problems.append(f"--load {options.load} is not a folder")
    file = options.prompt_file
    if file is not None and (file.is_dir() or not file.exists()):  # a pipe is good
        problems.append(f"--prompt-file {file} is not a file")
    problems += range_problems(options)
    if problems:
        raise ConfigError("; ".join(problems))


def range_problems(options: argparse.Namespace) -> Iterator[str]:
    """Yield a sentence for each number that makes no sense, without loading what samples."""
    if options.max_new_tokens is not None and options.max_new_tokens < 0:
        yield f"--max-new-tokens {options.max_new_tokens} must be 0 or more"
    if options.top_k < 0:
        yield f"--top-k {options.top_k} must be 0 (all tokens) or more"
    if not 0.0 <= options.top_p <= 1.0:
        yield f"--top-p {options.top_p} must lie between 0 and 1"
    temperature = options.temperature
    if temperature is not None and not 0.0 <= temperature < float("inf"):
        yield f"--temperature {temperature} must be 0 (greedy) or more"
    if (options.greedy or temperature == 0) and (options.top_k or options.top_p):
        yield "--top-k and --top-p have no effect on greedy choice; leave them out"


def number_of_tokens(asked: int | None, positions: int | None, prompts: list[list[int]]) -> int:
    """Return how many tokens to add: those asked for, else 100 or what fits."""
    if asked is not None:
        return asked
    room = DEFAULT_TOKENS if positions is None else positions - max(map(len, prompts))
    return max(1, min(DEFAULT_TOKENS, room))


def run(options: argparse.Namespace, prompts: list[str]) -> None:
    """Load the model and print each prompt with its continuation."""
    import torch

    from megatron.core.inference.generate import GenerationOptions, generate
    from megatron.core.inference.sampling import SamplingOptions
    from megatron.training.checkpoint_model import load_trained_model

    temperature = 1.0 if options.temperature is None else options.temperature
    sampling = SamplingOptions(
        temperature=0.0 if options.greedy else temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device found; leave it out or say --device cpu")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained_model(options.load, iteration=options.ckpt_step, device=device)
    if trained.tokenizer is None:
        raise DataError(f"{trained.path} was trained without a tokenizer: there is no text to it")
    model_config, tokenizer = trained.config.model, trained.tokenizer
    if options.cache_mla_latents and not model_config.multi_latent_attention:
        raise ConfigError(
            f"--cache-mla-latents: the model of {trained.path} has no latents, it was trained "
            "without --multi-latent-attention; leave it out"
        )
    model_config.cache_mla_latents |= options.cache_mla_latents
    learned = model_config.position_embedding_type == "learned_absolute"
    positions = model_config.max_position_embeddings if learned else None
    prompt_ids = [tokenizer.tokenize(prompt) for prompt in prompts]
    found = generate(
        trained.model,
        model_config,
        prompt_ids,
        GenerationOptions(
            max_new_tokens=number_of_tokens(options.max_new_tokens, positions, prompt_ids),
            eod=tokenizer.eod,
            vocab_size=tokenizer.vocab_size,
            max_positions=positions,
            sampling=sampling,
            seed=options.seed,
        ),
    )
    for number, (prompt, old, new) in enumerate(zip(prompts, prompt_ids, found, strict=True)):
        if number:
            print("-" * 40)
        print(prompt + continuation(tokenizer, old, new))


def continuation(tokenizer: "Tokenizer", old: list[int], new: list[int]) -> str:
    """Return the text that ``new`` ids add after ``old`` ones: the space between them included."""
    before, text = tokenizer.detokenize(old), tokenizer.detokenize(old + new)
    return text[len(before) :] if text.startswith(before) else tokenizer.detokenize(new)


if __name__ == "__main__":
    command_line.run_tool(main)
