"""What a checkpoint says of the tokenizer, and which of its files go along."""

from pathlib import Path
from typing import Any

from megatron.training.checkpoint_state import SavedTokenizer

_LARGEST_COPY_BYTES = 64 << 20


def tokenizer_facts(tokenizer: SavedTokenizer | None) -> dict[str, Any] | None:
    """Return what is saved of a tokenizer: enough to compare it and to build it again."""
    if tokenizer is None:
        return None
    return {
        "type": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint(),
        "settings": dict(tokenizer.settings),
        "files": {role: str(path.absolute()) for role, path in tokenizer.files.items()},
        "copies": {role: name for name, (role, _) in tokenizer_copies(tokenizer).items()},
    }


def tokenizer_copies(tokenizer: SavedTokenizer) -> dict[str, tuple[str, Path]]:
    """Return name in the checkpoint -> (role, file) of the tokenizer's files that are small.

    A file that is read because it lies beside another one does so in the checkpoint too; its role
    is that of the other and its own name, which is no option.
    """
    found = {(role, role): path for role, path in tokenizer.files.items()}
    for role, others in getattr(tokenizer, "beside", {}).items():
        found |= {(role, f"{role}/{path.name}"): path for path in others}
    return {
        f"tokenizer/{folder}/{path.name}": (role, path)
        for (folder, role), path in found.items()
        if path.is_file() and path.stat().st_size <= _LARGEST_COPY_BYTES
    }
