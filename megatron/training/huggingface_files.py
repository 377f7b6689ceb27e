"""What lies beside the weights at Hugging Face: tokenizer, generation settings, harmless fields.

An import keeps them in the checkpoint (``huggingface/NAME``, and the tokenizer as training keeps
it), so that an export gives them back; after training they come from a reference folder.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron.core.dist_checkpointing.offline import StoredCheckpoint
from megatron.core.errors import BackendError, ConfigError, DataError
from megatron.core.models.huggingface.config_file import read_config
from megatron.core.models.huggingface.config_rows import IGNORED
from megatron.core.models.huggingface.tables import Family
from megatron.core.models.huggingface.writer import GENERATION
from megatron.core.tokenizers.base import Tokenizer
from megatron.core.tokenizers.build_tokenizer import TokenizerSettings, build_tokenizer
from megatron.core.tokenizers.huggingface_tokenizer import CONFIG_FILE
from megatron.training.huggingface_start import tokenizer_of_folder
from megatron.training.tokenizer_facts import (
    tokenizer_copies,
    tokenizer_facts,
)

log = logging.getLogger(__name__)

ORIGIN = "huggingface"
"""Entry of common.json and folder in a checkpoint: what an import keeps."""
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_LARGEST_BYTES = 64 << 20
_CLASSES = {
    "HuggingFaceTokenizer": "PreTrainedTokenizerFast",
    "Llama2Tokenizer": "LlamaTokenizer",
    "SentencePieceTokenizer": "LlamaTokenizer",
    "GPTSentencePieceTokenizer": "LlamaTokenizer",
    "GPT2BPETokenizer": "GPT2Tokenizer",
}
_OWN_FIELDS = frozenset(
    {"architectures", "model_type", "dtype", "torch_dtype", "transformers_version"}
    | {"quantization_config", "auto_map"}
)


class SideFiles(NamedTuple):
    """What is written beside weights and config.json."""

    copies: dict[str, Path]
    """Name -> file."""
    documents: dict[str, Any]
    """Name -> JSON."""
    fields: dict[str, Any]
    """Of config.json, that change nothing that is computed."""


def kept_of_folder(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Path]]:
    """Return the facts of the tokenizer and the files that an import keeps.

    Returns:
        See ``tokenizer_facts``, None where there is no tokenizer that works here; and name in the
        checkpoint -> file.
    """
    files = {
        f"{ORIGIN}/{name}": folder / name
        for name in (*_TOKENIZER, GENERATION)
        if (folder / name).is_file() and (folder / name).stat().st_size <= _LARGEST_BYTES
    }
    tokenizer = tokenizer_beside(folder)
    if tokenizer is None:
        return None, files
    copies = tokenizer_copies(tokenizer)
    kept = {path for _, path in copies.values()}
    files = {name: path for name, path in files.items() if path not in kept}
    files |= {name: path for name, (_, path) in copies.items()}
    return tokenizer_facts(tokenizer), files


def tokenizer_beside(folder: Path) -> Tokenizer | None:
    """Build the tokenizer in a folder of Hugging Face's; None, told, where that cannot be done."""
    found = tokenizer_of_folder(folder)
    if found is None:
        return None
    try:
        return build_tokenizer(TokenizerSettings(tokenizer_type=found["type"], **found["files"]))
    except (BackendError, ConfigError, DataError) as error:
        log.warning("the tokenizer of %s is left out: %s", folder, error)
        return None


def side_files(source: StoredCheckpoint, family: Family, reference: Path | None) -> SideFiles:
    """Return what an export writes beside the weights.

    Args:
        source: The checkpoint.
        family: Of the export.
        reference: A folder of Hugging Face's to take all of it from; what the checkpoint keeps
            when None.
    """
    if reference is not None:
        copies = {
            name: reference / name
            for name in (*_TOKENIZER, GENERATION)
            if (reference / name).is_file()
        }
        return SideFiles(copies, {}, _harmless(family, read_config(reference)))
    kept = {} if not isinstance(source.path, Path) else source.documents
    copies = {Path(name).name: path for name, path in kept.items()}
    origin = source.common.get(ORIGIN) or {}
    fields = _harmless(family, origin.get("config") or {})
    documents: dict[str, Any] = {}
    facts = source.common["tokenizer"]
    if facts is not None and copies and CONFIG_FILE not in copies:
        documents[CONFIG_FILE] = _tokenizer_config(facts, kept)
    if GENERATION not in copies:
        ids = {name: fields[name] for name in sorted(fields) if name.endswith("token_id")}
        documents[GENERATION] = {"_from_model_config": True, **ids}
    return SideFiles(copies, documents, fields)


def _harmless(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    names = (IGNORED | family.ignored_fields) - _OWN_FIELDS
    return {name: value for name, value in config.items() if name in names}


def _tokenizer_config(facts: Mapping[str, Any], kept: Mapping[str, Path]) -> dict[str, Any]:
    """Make the file that tells transformers which class reads the others, and the end of text."""
    made: dict[str, Any] = {"tokenizer_class": _CLASSES.get(facts["type"])}
    if facts["type"] == "HuggingFaceTokenizer":
        (path,) = (kept[name] for name in facts["copies"].values())
        tokenizer = build_tokenizer(
            TokenizerSettings(tokenizer_type=facts["type"], tokenizer_model=str(path))
        )
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {entry["id"]: entry["content"] for entry in content.get("added_tokens", [])}
        vocabulary = content["model"].get("vocab", {})
        if isinstance(vocabulary, dict):
            names = {number: token for token, number in vocabulary.items()} | names
        made["eos_token"] = names.get(tokenizer.eod)
    return {name: value for name, value in made.items() if value is not None}
