"""All rules of a run, applied together: every problem is found in one go."""

from collections.abc import Iterable

from megatron.training.config.checkpoint_rules import (
    CHECKPOINT_RULES,
    CHECKPOINT_RULES_OF_FOLDERS,
)
from megatron.training.config.checks import Check
from megatron.training.config.data_rules import DATA_RULES
from megatron.training.config.fusion_rules import FUSION_RULES
from megatron.training.config.mla_rules import MLA_RULES
from megatron.training.config.model_rules import MODEL_RULES
from megatron.training.config.mtp_rules import MTP_RULES
from megatron.training.config.overlap_rules import OVERLAP_RULES
from megatron.training.config.pipeline_rules import PIPELINE_RULES
from megatron.training.config.run_rules import RULES_OF_FOLDERS, RUN_RULES
from megatron.training.config.scaling_rules import SCALING_RULES
from megatron.training.config.upcycling_rules import (
    UPCYCLING_RULES,
    UPCYCLING_RULES_OF_FOLDERS,
)

RULES = (
    *MODEL_RULES,
    *MLA_RULES,
    *SCALING_RULES,
    *MTP_RULES,
    *FUSION_RULES,
    *PIPELINE_RULES,
    *OVERLAP_RULES,
    *DATA_RULES,
    *RUN_RULES,
    *CHECKPOINT_RULES,
    *UPCYCLING_RULES,
)
OF_FOLDERS = (*RULES_OF_FOLDERS, *CHECKPOINT_RULES_OF_FOLDERS, *UPCYCLING_RULES_OF_FOLDERS)


def find_problems(check: Check, *, looks_at_folders: bool = True) -> list[str]:
    """Return a sentence for each broken rule, in the order of ``RULES``.

    Args:
        check: The run.
        looks_at_folders: Apply the rules that read disks; they know no layout.
    """
    rules = [rule for rule in RULES if looks_at_folders or rule not in OF_FOLDERS]
    return [sentence for rule in rules for sentence in rule(check)]


def without_doubtful(problems: Iterable[str], doubtful: Iterable[str]) -> list[str]:
    """Leave out problems that speak of a flag whose value is not known.

    A misspelt ``--num-expertz 8`` would otherwise also say that ``--num-experts`` is missing.
    """
    words = set(doubtful)
    return [
        problem
        for problem in dict.fromkeys(problems)
        if not words & {word.strip(",;:()=.") for word in problem.split()}
    ]
