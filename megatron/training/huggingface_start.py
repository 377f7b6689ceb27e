"""What a folder of Hugging Face's says of a run that begins with it. Imports no torch."""

from pathlib import Path
from typing import Any

from megatron.core.errors import CheckpointError, ConfigError
from megatron.core.models.huggingface.config_file import read_config
from megatron.core.models.huggingface.options import model_options

_FORMATS = {"bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}


def facts_of_folder(folder: Path) -> dict[str, Any]:
    """Return options of model and tokenizer in the shape of a checkpoint's common.json.

    Raises:
        CheckpointError: config.json is missing, damaged, or of a model that cannot be built.
    """
    hf_config = read_config(folder)
    try:
        options = model_options(hf_config)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    rows = options.pop("padded_vocab_size")
    name = str(hf_config.get("torch_dtype") or hf_config.get("dtype"))
    formats = {flag: kind == name for kind, flag in _FORMATS.items()}
    return {
        "config": {
            "model": options | formats,
            "tokenizer": {"padded_vocab_size": rows, "unpadded_vocab_size": rows},
        },
        "tokenizer": tokenizer_of_folder(folder),
    }


def tokenizer_of_folder(folder: Path) -> dict[str, Any] | None:
    """Return kind and files of the tokenizer in a folder; None where there is none we know."""
    for kind, files in _TOKENIZERS:
        if all((folder / file).is_file() for file in files.values()):
            return {
                "type": kind,
                "settings": {},
                "files": {role: str((folder / file).absolute()) for role, file in files.items()},
                "copies": {},
            }
    return None


_TOKENIZERS = (
    ("HuggingFaceTokenizer", {"tokenizer_model": "tokenizer.json"}),
    ("Llama2Tokenizer", {"tokenizer_model": "tokenizer.model"}),
    ("GPT2BPETokenizer", {"vocab_file": "vocab.json", "merge_file": "merges.txt"}),
)
"""Kind -> its files, the first that are there."""
