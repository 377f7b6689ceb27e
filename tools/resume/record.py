"""One rank of a recorded run, in a process of its own that runs.py starts.

The functions are those of the user's script, the options those of the plan; ``pretrain`` is called
as the script itself would.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

from megatron.core.errors import ConfigError
from megatron.training.user_errors import exit_on_user_error
from tools.resume.settings import RecordPlan, config_of

_FUNCTIONS = ("train_valid_test_datasets_provider", "model_provider", "forward_step")


def run_rank(plan_file: str, environment: dict[str, str], log_file: str) -> None:
    """Be a rank: a session of its own, with what torchrun would tell it, printing into a file."""
    os.setsid()
    os.environ.update(environment)
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    train(RecordPlan(**json.loads(Path(plan_file).read_text())))


def train(plan: RecordPlan) -> None:
    """Train as the plan says, and write down how it went."""
    with exit_on_user_error():
        config = config_of(plan.words, plan.values, int(os.environ.get("WORLD_SIZE", "1")))
        script = load_script(Path(plan.script))
    from megatron.training import pretrain
    from tools.resume.recorder import Recorder

    recorder = Recorder(
        Path(plan.record), keep_loaded=plan.keep_loaded, keep_after=frozenset(plan.keep_after)
    )
    pretrain(
        script.train_valid_test_datasets_provider,
        script.model_provider,
        recorder.watched(script.forward_step),
        config=config,
        observers=[recorder],
    )


def load_script(path: Path) -> ModuleType:
    """Import a training script that has the functions of pretrain_gpt.py; nothing is started.

    Raises:
        ConfigError: It cannot be read, or a function is not there.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"--script {path}: there is no such Python file")
    sys.path.insert(0, str(path.resolve().parent))  # as for a script that is started
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # workers and pickles find its classes
    spec.loader.exec_module(module)
    missing = [name for name in _FUNCTIONS if not callable(getattr(module, name, None))]
    if missing:
        raise ConfigError(
            f"--script {path} has no {' and no '.join(missing)}: it must define them at its top "
            "level, as pretrain_gpt.py does, and start training only when it is the main program"
        )
    return module
