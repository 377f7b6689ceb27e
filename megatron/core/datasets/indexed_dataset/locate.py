"""Find the dataset a user means: ``--data-path my_data`` may be ``my_data_text_document.bin``."""

import glob
from pathlib import Path

from megatron.core.datasets.indexed_dataset.format import bin_path, idx_path
from megatron.core.errors import DataError

DEFAULT_SUFFIX = "_text_document"


def find_prefix(path: str | Path) -> str:
    """Return the prefix of the dataset at ``path``.

    Args:
        path: The prefix itself, its ``.bin`` or ``.idx`` file, or the ``--output-prefix`` that
            preprocessing was given.

    Raises:
        DataError: There is none; names every file looked for, and what is there instead.
    """
    given = str(path)
    for suffix in (".bin", ".idx"):
        given = given.removesuffix(suffix)
    candidates = [given, given + DEFAULT_SUFFIX]
    for prefix in candidates:
        if bin_path(prefix).is_file() and idx_path(prefix).is_file():
            return prefix
    looked_for = [f"{prefix}{suffix}" for prefix in candidates for suffix in (".bin", ".idx")]
    missing = [name for name in looked_for if not Path(name).is_file()]
    present = [name for name in looked_for if Path(name).is_file()]
    half = f"; found only {', '.join(present)}" if present else ""
    raise DataError(f"no dataset at {path}: {', '.join(missing)} do not exist{half}{_hint(given)}")


def _hint(given: str) -> str:
    """Name datasets of other keys, or say what makes one."""
    folder = Path(given).parent
    pattern = f"{glob.escape(Path(given).name)}_*_document.bin"
    others = sorted(str(found)[: -len(".bin")] for found in folder.glob(pattern))
    if others:
        return f"; did you mean {' or '.join(others)}?"
    if any(Path(given + suffix).is_file() for suffix in ("", ".jsonl", ".json", ".txt")):
        return "; text must go through tools/preprocess_data.py first"
    return "; tools/preprocess_data.py makes one"
