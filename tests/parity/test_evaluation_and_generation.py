"""R15: evaluation and generation change no later step, and tokens do not depend on the layout.

Each layout trains twice: three steps, and three steps with an evaluation, a save and where a rank
can, a generation after each. What was saved in between is then continued by one process.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.mapping import model_tensors, optimizer_tensors
from megatron.core.dist_checkpointing.rng_state import capture_rng_state
from megatron.core.errors import ConfigError
from megatron.core.inference.generate import GenerationOptions, generate
from megatron.core.inference.sampling import SamplingOptions
from megatron.training.checkpoint_model import load_trained_model
from megatron.training.checkpointing import save_checkpoint, unwrap
from megatron.training.evaluate import evaluate
from megatron.training.run import Run, TrainState
from megatron.training.train_step import train_step
from tests.helpers.layouts import VOCAB, make_config, make_run, microbatches
from tests.helpers.ranks import run_ranks

ROOT = Path(__file__).parents[2]
STEPS, BATCH = 3, 8
MODEL: dict[str, Any] = {
    "optimizer": "adam",
    "lr": 1e-2,
    "init_method_std": 0.4,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.05,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "EP 2": (2, {"expert_model_parallel_size": 2}),
    "TP 2": (2, {"tensor_model_parallel_size": 2}),
    "PP 2": (2, {"pipeline_model_parallel_size": 2}),
}
PROMPTS = [[3], [9, 8, 7, 6, 5, 4], [11, 12, 13]]
GREEDY, DRAWN = SamplingOptions(temperature=0.0), SamplingOptions(temperature=1.5, top_k=20)


def tokens_of(model: torch.nn.Module, run_config: Any, sampling: SamplingOptions) -> list:
    options = GenerationOptions(
        max_new_tokens=6, eod=VOCAB - 1, vocab_size=VOCAB, max_positions=12, sampling=sampling
    )
    return generate(model, run_config.model, PROMPTS, options)


def disturb(run: Run, state: TrainState, folder: Path) -> list | None:
    """Do all that must change nothing; return what the live model generates, if it can."""
    held_out = chain.from_iterable(microbatches(run, 800 + BATCH * n) for n in range(2))
    evaluate(run, held_out, 2)
    result = save_checkpoint(
        folder, state, config=run.config, model=run.model, optimizer=run.optimizer
    )
    assert result.error == ""
    if dist.get_world_size() == 1:
        trained = load_trained_model(folder)
        tokens_of(trained.model, trained.config, DRAWN)
    if run.config.model.tensor_model_parallel_size * run.world.pg_collection.pp.size() > 1:
        with pytest.raises(ConfigError, match=r"-parallel-size 2 does not generate: save a check"):
            tokens_of(unwrap(run.model), run.config, GREEDY)
        return None
    return [tokens_of(unwrap(run.model), run.config, how) for how in (GREEDY, DRAWN)]


class End(NamedTuple):
    """What a short run leaves on one rank."""

    steps: list[tuple]
    tensors: dict[str, torch.Tensor]
    generators: dict[str, torch.Tensor]
    tokens_per_expert: list


def train(options: dict[str, Any], folder: Path | None) -> End:
    run, steps = make_run(make_config(**(MODEL | options))), []
    for iteration in range(STEPS):
        done = BATCH * iteration
        state = TrainState(iteration=iteration, consumed_samples=done, dropout_seed=3)
        outcome = train_step(run, state, microbatches(run, done))
        steps.append((outcome.lm_loss, outcome.grad_norm, outcome.updated))
        if folder is not None and iteration < STEPS - 1:
            after = TrainState(iteration=iteration + 1, consumed_samples=done + BATCH)
            live = disturb(run, after, folder)
            (folder / f"live{dist.get_rank()}.json").write_text(json.dumps(live))
    assert run.moe_metrics is not None
    counts = run.moe_metrics.report(run.world.pg_collection).tokens_per_expert
    kept = model_tensors(unwrap(run.model)) | optimizer_tensors(run.optimizer.named_state())
    tensors = {name: tensor for name, tensor in kept.items() if isinstance(tensor, torch.Tensor)}
    assert len(tensors) > 30
    return End(steps, tensors, capture_rng_state(), counts.tolist())


def both_ways(folder: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(5)  # forked ranks begin where the parent stands
    alone = train(options, None)
    torch.manual_seed(5)
    disturbed = train(options, folder)
    assert alone.steps == disturbed.steps
    assert alone.tokens_per_expert == disturbed.tokens_per_expert
    for one, other in (
        (alone.tensors, disturbed.tensors),
        (alone.generators, disturbed.generators),
    ):
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train on every layout; the bodies themselves compare with and without what lies between."""
    found = {}
    for name, (world_size, options) in LAYOUTS.items():
        found[name] = tmp_path_factory.mktemp("run")
        run_ranks(both_ways, world_size, found[name], options)
    return found


@pytest.fixture
def alone() -> Iterator[None]:
    """Tests that fork ranks must find no group afterwards."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_the_next_steps_are_the_same_with_and_without(folders: dict[str, Path]) -> None:
    assert len(folders) == len(LAYOUTS)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_every_layout_gives_the_same_tokens(
    folders: dict[str, Path], alone: None, sampling: SamplingOptions
) -> None:
    found = {}
    for name, folder in folders.items():
        trained = load_trained_model(folder)
        assert trained.path.name == f"iter_{STEPS - 1:07d}"
        found[name] = tokens_of(trained.model, trained.config, sampling)
    first = found["one process"]
    assert found == dict.fromkeys(found, first)
    assert len({token for row in first for token in row}) > 4
    live = [
        json.loads((folders[name] / f"live{rank}.json").read_text())
        for name, rank in (("one process", 0), ("EP 2", 0), ("EP 2", 1))
    ]
    assert all(tokens[sampling is DRAWN] == first for tokens in live)


def test_tokens_do_not_depend_on_prompts_beside_them(folders: dict[str, Path], alone: None) -> None:
    trained = load_trained_model(folders["TP 2"])
    together = tokens_of(trained.model, trained.config, GREEDY)
    for prompt, tokens in zip(PROMPTS, together, strict=True):
        options = GenerationOptions(
            max_new_tokens=6, eod=VOCAB - 1, vocab_size=VOCAB, sampling=GREEDY
        )
        assert generate(trained.model, trained.config.model, [prompt], options) == [tokens]


def test_the_tool_under_torchrun_is_refused_at_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/generate.py"), "--load", str(tmp_path), "--prompt", "x"],
        env={"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "one process generates: start with python, not torchrun" in done.stderr
    assert "Traceback" not in done.stderr
