"""Options of the training data."""

from dataclasses import dataclass
from typing import Literal

from megatron.core.config_field import derived


@dataclass(kw_only=True)
class DataConfig:
    """Data and dataloader."""

    data_path: list[str] | None = None
    """Preprocessed data: one prefix, several prefixes, or weight prefix weight prefix ..."""

    split: str | None = None
    """Shares of the documents for training, validation and test, such as 969,30,1; that when not
    set."""

    train_data_path: list[str] | None = None
    """Like --data-path, for training only; with --valid-data-path and --test-data-path instead of
    --data-path and --split."""

    valid_data_path: list[str] | None = None
    """Like --data-path, for validation only."""

    test_data_path: list[str] | None = None
    """Like --data-path, for test only."""

    blend_order: Literal["even", "megatron"] = "even"
    """Order in which the samples of several sources are mixed: even keeps the count of each source
    within 1 of its share after every sample; megatron repeats the order of Megatron-LM, whose
    counts stay within about 2."""

    data_cache_path: str | None = None
    """Folder of the sample indices; a folder cache/GPTDataset_indices beside the data when not
    set."""

    mock_data: bool = False
    """Train on counting sequences made on the fly, without any file."""

    seq_length: int = derived()
    """Tokens of one sample; 1024 when not set, or less where the data or
    --max-position-embeddings hold less."""

    num_workers: int = 2
    """Processes that read samples ahead; 0 reads in the training process, as on CPU when not
    given."""

    reset_position_ids: bool = False
    """Start positions at 0 after each end of document."""

    reset_attention_mask: bool = False
    """Let tokens attend only within their own document."""

    eod_mask_loss: bool = False
    """Do not train on predicting what follows an end of document."""
