"""RunConfig: every option of one run, in one narrow dataclass for each subject."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.config.checkpoint import CheckpointConfig
from megatron.training.config.data import DataConfig
from megatron.training.config.distributed import DistributedConfig
from megatron.training.config.dry_run import DryRunConfig
from megatron.training.config.logging import LoggingConfig
from megatron.training.config.scheduler import SchedulerConfig
from megatron.training.config.tokenizer import TokenizerConfig
from megatron.training.config.training import TrainingConfig
from megatron.training.config.validation import ValidationConfig


@dataclass(kw_only=True)
class RunConfig:
    """All options of one run. Sections are dataclasses; no two share a field name."""

    model: TransformerConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    checkpoint: CheckpointConfig
    validation: ValidationConfig
    logging: LoggingConfig
    distributed: DistributedConfig
    ddp: DistributedDataParallelConfig
    dry_run: DryRunConfig = field(default_factory=DryRunConfig)
    sources: dict[str, str] = field(default_factory=dict)
    """Field name -> ``default``, ``derived``, ``checkpoint``, ``yaml`` or ``cli``."""
    notices: list[str] = field(default_factory=list)
    """Lines to show at the start: what was derived, what is in force, what has no effect."""

    @classmethod
    def from_flat(
        cls, values: Mapping[str, Any], sources: Mapping[str, str] | None = None
    ) -> "RunConfig":
        """Build the sections from values by field name; what is left out keeps its default."""
        built: dict[str, Any] = {}
        for name, section_cls in get_type_hints(cls).items():
            if isinstance(section_cls, type) and is_dataclass(section_cls):
                names = [entry.name for entry in fields(section_cls) if entry.name in values]
                built[name] = section_cls(**{key: values[key] for key in names})
        return cls(**built, sources=dict(sources or {}))

    def sections(self) -> Iterator[tuple[str, Any]]:
        """Yield (name, section) for each dataclass section."""
        for entry in fields(self):
            if is_dataclass(getattr(self, entry.name)):
                yield entry.name, getattr(self, entry.name)

    def given(self, name: str) -> bool:
        """Return whether the user set this field, by flag or YAML file."""
        return self.sources.get(name) in ("cli", "yaml")

    def flat(self) -> dict[str, Any]:
        """Return every option by field name, as ``get_args()`` shows them to users' scripts."""
        return {
            option.name: getattr(section, option.name)
            for _, section in self.sections()
            for option in fields(section)
        }
