"""Rules of data, splits and vocabulary; each yields sentences."""

from collections.abc import Iterator

from megatron.core.errors import ConfigError
from megatron.training.config.checks import Check, Rule

_SEPARATE = "train_data_path valid_data_path test_data_path"


def data_choice(check: Check) -> Iterator[str]:
    """Exactly one way of naming the data."""
    data = check.config.data
    separate = check.given(*_SEPARATE.split())
    if data.mock_data:
        yield from check.useless(f"data_path split {_SEPARATE} data_cache_path", "with --mock-data")
        return
    if data.data_path is None and not separate:
        yield (
            "no data: give --data-path PREFIX (from tools/preprocess_data.py), or --mock-data to "
            "try without any file"
        )
    elif data.data_path is not None and separate:
        yield f"--data-path and {check.show(*separate)} exclude each other"
    elif separate:
        if data.train_data_path is None:
            yield f"{check.show(*separate)} needs --train-data-path"
        yield from check.useless("split", "without --data-path")


def split(check: Check) -> Iterator[str]:
    """Shares are numbers, and training gets one."""
    text = check.config.data.split
    if text is None:
        return
    from megatron.core.datasets.splits import parse_split

    try:
        train, valid, _ = parse_split(text)
    except ConfigError as error:
        yield str(error)
        return
    if train == 0 and not check.config.training.skip_train:
        yield f"{check.show('split')} leaves nothing to train on; the first share is training's"
    if valid == 0:
        yield from check.useless("eval_iters", f"with {check.show('split')}: no validation data")


def vocabulary(check: Check) -> Iterator[str]:
    """The embedding has a row for every id."""
    if check.given("padded_vocab_size"):
        yield from check.useless("make_vocab_size_divisible_by", "with --padded-vocab-size")


DATA_RULES: tuple[Rule, ...] = (data_choice, split, vocabulary)
