"""Omissions to plant: what a checkpoint may leave out, or a resumed run may not take up.

None of them ends a run or changes what is printed at the first glance. `tools/verify_resume.py`
must fail, name the item and say what to suspect. Written like `tests/planted/bugs.py`; whoever
changes such a line changes its omission with it.
"""

from typing import NamedTuple

MAPPING = "megatron/core/dist_checkpointing/mapping.py"
MOMENT = '            prefix = f"{OPTIMIZER}{state}."\n'
SCHEDULE = "    run.scheduler.step(run.optimizer, state.consumed_samples)\n"


class Omission(NamedTuple):
    name: str
    invariant: str
    file: str
    old: str
    new: str
    item: str
    """What the tool must call the cause."""
    words: str
    """Words of what it says of the first difference or of its likely cause."""
    flags: str = ""
    """Without which nothing would be left out."""


OMISSIONS = (
    Omission(
        "RNG: the state of torch's generator is not restored",
        "R12",
        "megatron/core/dist_checkpointing/rng_state.py",
        '    torch.set_rng_state(state["torch"])\n',
        "",
        "random generators",
        "rank 0, torch",
    ),
    Omission(
        "dropout goes on with a fresh stream",
        "R12",
        "megatron/training/checkpointing.py",
        '    dropout_seed = common["dropout_seed"]\n',
        "    dropout_seed = restart_seed(seed, iteration)\n",
        "dropout stream",
        "the seed of the dropout masks",
    ),
    Omission(
        "data position: a resumed run reads from the first sample",
        "R12",
        "megatron/training/training.py",
        "batches(session, 0, state.consumed_samples, loader_workers(run))",
        "batches(session, 0, 0, loader_workers(run))",
        "sample ids",
        "position in the data",
    ),
    Omission(
        "first moment: is in no checkpoint",
        "R11",
        MAPPING,
        MOMENT,
        f'            if state == "exp_avg":\n                continue\n{MOMENT}',
        "first moment",
        "all are 0 here",
    ),
    Omission(
        "second moment: is in no checkpoint",
        "R11",
        MAPPING,
        MOMENT,
        f'            if state == "exp_avg_sq":\n                continue\n{MOMENT}',
        "second moment",
        "all are 0 here",
    ),
    Omission(
        "expert bias: is a buffer that is not saved",
        "R10",
        "megatron/core/transformer/moe/router.py",
        'self.register_buffer("expert_bias", bias)',
        'self.register_buffer("expert_bias", bias, persistent=False)',
        "expert bias",
        "is it a persistent buffer",
    ),
    Omission(
        "learning-rate step: the schedule counts samples for itself",
        "R13",
        "megatron/training/train_step.py",
        SCHEDULE,
        '    done = getattr(run.optimizer, "scheduled", 0)\n'
        "    run.scheduler.step(run.optimizer, done)\n"
        "    run.optimizer.scheduled = done + run.global_batch_size\n",
        "learning rate",
        "the schedule counts steps of its own",
    ),
    Omission(
        "one expert: number 2 is in no checkpoint",
        "R10",
        MAPPING,
        "        _add(tensors, prefix + key, storable(found))\n",
        '        if prefix != MODEL or ".local_experts.2." not in key:\n'
        "            _add(tensors, prefix + key, storable(found))\n",
        "experts",
        "only number 2 differs",
    ),
    Omission(
        "loss scale: begins anew at its first value",
        "R12",
        "megatron/training/checkpointing.py",
        '            optimizer.grad_scaler.load_state_dict(opened.common.get("loss_scale"))\n',
        "",
        "loss scale",
        "rank 0, growth_tracker",
        "--fp16 --initial-loss-scale 65536 --loss-scale-window 3",
    ),
    Omission(
        "step count: bias corrections of Adam begin anew",
        "R12",
        "megatron/training/checkpointing.py",
        '            optimizer.step_count = opened.common["optimizer"]["step_count"]\n',
        "            optimizer.step_count = 0\n",
        "counters",
        "optimizer_steps",
    ),
)
