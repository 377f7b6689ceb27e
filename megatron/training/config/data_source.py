"""What lies on disk for a run: the datasets it names, their sidecars, and the tokenizer.

Reads headers and small files only, and never imports torch. Every problem is collected.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron.core.errors import MegatronError
from megatron.training.config.checkpoint_schedule import StoredSchedule
from megatron.training.config.data import DataConfig
from megatron.training.config.tokenizer import TokenizerConfig

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset.sidecar import Sidecar
    from megatron.core.tokenizers.base import Tokenizer
    from megatron.training.datasets.data_facts import DataFacts

DATA_FIELDS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
MOCK_VOCAB_SIZE = 8191
_FILE_FIELDS = ("tokenizer_model", "vocab_file", "merge_file")


@dataclass(kw_only=True)
class DataSource:
    """What was found."""

    facts: "DataFacts | None" = None
    """Sizes of the training split; None for data made on the fly or not found."""
    tokenizer: dict[str, Any] = field(default_factory=dict)
    """Tokenizer options that were not given, as the sidecar or --mock-data has them."""
    tokenizer_from: str = ""
    """Where those come from."""
    vocab_size: int | None = None
    """Ids, the end of document included; None if the tokenizer could not be built."""
    schedule: StoredSchedule | None = None
    """Learning-rate settings of the checkpoint, where the run takes those."""
    problems: list[str] = field(default_factory=list)


def look_at_data(data: DataConfig, tokenizer: TokenizerConfig) -> DataSource:
    """Find the datasets and the tokenizer that the options name or imply."""
    found = DataSource()
    if data.mock_data:
        if tokenizer.tokenizer_type is None:
            found.tokenizer = {"tokenizer_type": "NullTokenizer"}
            if tokenizer.vocab_size is None:
                found.tokenizer["vocab_size"] = MOCK_VOCAB_SIZE
            found.tokenizer_from = "--mock-data"
        _build_tokenizer(found, tokenizer, {})
        return found
    sidecars = _find_datasets(found, data)
    if sidecars and not found.problems:
        _count_tokens(found, data)
        _choose_tokenizer(found, tokenizer, sidecars)
    _build_tokenizer(found, tokenizer, sidecars)
    return found


def _find_datasets(found: DataSource, data: DataConfig) -> dict[str, "Sidecar | None"]:
    """Map the prefix of each dataset to its sidecar."""
    from megatron.core.datasets.blend import parse_blend
    from megatron.core.datasets.indexed_dataset.locate import find_prefix
    from megatron.core.datasets.indexed_dataset.sidecar import read_sidecar

    sidecars: dict[str, Sidecar | None] = {}
    for name in DATA_FIELDS:
        words = getattr(data, name)
        if words is None:
            continue
        flag = "--" + name.replace("_", "-")
        try:
            prefixes = parse_blend(words, flag).prefixes
        except MegatronError as error:
            found.problems.append(_sentence(error))
            continue
        for word in prefixes:
            try:
                prefix = find_prefix(word)
                sidecars[prefix] = read_sidecar(prefix)
            except MegatronError as error:
                found.problems.append(f"{flag}: {_sentence(error)}")
    return sidecars


def _count_tokens(found: DataSource, data: DataConfig) -> None:
    from megatron.training.datasets.data_facts import data_facts

    try:
        found.facts = data_facts(data)
    except MegatronError as error:
        found.problems.append(_sentence(error))


def _choose_tokenizer(
    found: DataSource, given: TokenizerConfig, sidecars: dict[str, "Sidecar | None"]
) -> None:
    """Take from the first sidecar what the user does not say."""
    from megatron.core.datasets.indexed_dataset.sidecar import sidecar_path, tokenizer_settings

    known = [(prefix, sidecar) for prefix, sidecar in sidecars.items() if sidecar is not None]
    if given.tokenizer_type is not None:
        return
    if not known:
        found.problems.append(
            f"the tokenizer is not known: there is no {sidecar_path(next(iter(sidecars)))} that "
            "tools/preprocess_data.py would have written; give --tokenizer-type and its files"
        )
        return
    prefix, sidecar = known[0]
    named = {name: getattr(given, name) for name in _FILE_FIELDS if getattr(given, name)}
    if named:
        settings = {"tokenizer_type": sidecar.tokenizer_type, **sidecar.tokenizer_settings}
    else:
        try:
            settings = vars(tokenizer_settings(prefix, sidecar))
        except MegatronError as error:
            found.problems.append(_sentence(error))
            return
    defaults = vars(TokenizerConfig())
    found.tokenizer = {
        name: value
        for name, value in settings.items()
        if value != defaults[name] and getattr(given, name) == defaults[name]
    }
    found.tokenizer_from = str(sidecar_path(prefix))


def _build_tokenizer(
    found: DataSource, given: TokenizerConfig, sidecars: dict[str, "Sidecar | None"]
) -> None:
    """Build it once, to know its vocabulary and that it is the one that made the data."""
    from megatron.core.tokenizers.build_tokenizer import build_tokenizer

    options = TokenizerConfig(**(vars(given) | found.tokenizer))
    if options.tokenizer_type is None:
        return
    try:
        tokenizer = build_tokenizer(options)
    except MegatronError as error:
        found.problems += _sentences(error)
        return
    found.vocab_size = tokenizer.vocab_size
    found.problems += _mismatches(tokenizer, sidecars)


def _mismatches(tokenizer: "Tokenizer", sidecars: dict[str, "Sidecar | None"]) -> Iterator[str]:
    from megatron.core.datasets.indexed_dataset.sidecar import check_tokenizer

    for prefix, sidecar in sidecars.items():
        if sidecar is not None:
            try:
                check_tokenizer(prefix, sidecar, tokenizer)
            except MegatronError as error:
                yield _sentence(error)


def _sentence(error: MegatronError) -> str:
    return "; ".join(_sentences(error))


def _sentences(error: MegatronError) -> list[str]:
    """Return the problems of an error without its heading and bullets."""
    lines = str(error).splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):
        lines = lines[1:]
    return [line.strip().removeprefix("- ") for line in lines]
