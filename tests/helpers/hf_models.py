"""What transformers computes for the tiny checkpoints of hf_cases.py, the other side of the proof.

Attention is eager and experts are a loop, so that sums are those of the model's own code. Their
code rounds to fp32 in norms, routers, softmax and rotary tables whatever the dtype of the model;
`in_fp64` lifts that, so that what is compared to 1e-10 is their mathematics. transformers is
imported when a function is called: other tests do not pay its seconds.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tests.helpers.hf_cases import SAMPLES, SEQ, VOCAB, Case
from tests.reference.grok import grok_logits, grok_shapes

_NORM, _BIAS, _MATRIX = 0.3, 0.3, 0.15


class Reference(NamedTuple):
    """What their model computes in one dtype."""

    logits: Tensor
    """[samples, sequence, vocabulary]."""
    loss: float
    """Mean over the tokens that count."""
    gradients: dict[str, Tensor]
    """Key of the checkpoint -> gradient of the loss, in its shape."""


class Batch(NamedTuple):
    """Token ids, labels and the weights of the labels, [samples, sequence] each."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor


def batch() -> Batch:
    """Make the samples that both sides read."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(VOCAB, (SAMPLES, SEQ + 1), generator=generator)
    mask = (torch.rand(SAMPLES, SEQ, generator=generator) < 0.7).float()
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), mask)


def make_checkpoint(case: Case, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json and safetensors of a model whose every parameter and buffer is random."""
    if case.family == "grok":
        tensors = {
            name: torch.empty(shape, dtype=dtype)
            for name, shape in grok_shapes(case.config).items()
        }
        randomize(tensors)
        _write(case.config, tensors, folder)
        return
    model = build(case, torch.float32)
    randomize(model.state_dict(keep_vars=True))
    model.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()  # as published: fp32 beside bf16
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def build(case: Case, dtype: torch.dtype) -> Any:
    """Build their model, as it is before it learned anything."""
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # its threads would live on in this process
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.for_model(**case.config)
    config._experts_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation="eager"
    ).eval()


def load(case: Case, folder: Path, dtype: torch.dtype) -> Any:
    """Load a checkpoint into their model (not Grok-1, which they do not have).

    Raises:
        AssertionError: A key is missing, unexpected or of another shape.
    """
    build_nothing = build(case, dtype)  # for its side effects: quiet, no threads
    model, info = type(build_nothing).from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    wrong = {name: keys for name, keys in info.items() if keys}
    assert not wrong, f"transformers does not take {folder}: {wrong}"
    return model.eval()


def randomize(stored: Mapping[str, Tensor]) -> None:
    """Draw every parameter and stored buffer by its name: norms about 1, all else about 0."""
    seen: set[int] = set()
    with torch.no_grad():
        for name, tensor in stored.items():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() > 1 and not name.endswith("bias"):
                drawn = _MATRIX * noise
            elif name.endswith(("weight", "scale")):
                drawn = 1.0 + _NORM * noise
            else:
                drawn = _BIAS * noise
            tensor.copy_(drawn)


def references(case: Case, folder: Path, scratch: Path) -> dict[torch.dtype, Reference]:
    """Run the checkpoint in ``folder`` in fp32, and in fp64 throughout."""
    samples = batch()
    if case.family == "grok":
        return _grok_references(case, folder, samples)
    model = load(case, folder, torch.float32)
    done = _forward_backward(model, samples)
    found = {torch.float32: _reference(model, scratch / "fp32", done)}
    with in_fp64():
        wide = build(case, torch.float64)
        wide.load_state_dict(model.state_dict(), strict=True)
        done = _forward_backward(wide, samples)
    found[torch.float64] = _reference(wide, scratch / "fp64", done)
    return found


@torch.no_grad()
def their_logits(case: Case, folder: Path) -> Tensor:
    """Return the logits of the checkpoint in ``folder``, as it is, in fp32."""
    if case.family == "grok":
        return grok_logits(stored_tensors(folder), config_of(folder), batch().tokens)
    model = load(case, folder, torch.float32)
    return model(input_ids=batch().tokens, use_cache=False).logits


def _grok_references(case: Case, folder: Path, samples: Batch) -> dict[torch.dtype, Reference]:
    found = {}
    for dtype in (torch.float32, torch.float64):
        weights = {
            name: tensor.to(dtype).requires_grad_()
            for name, tensor in stored_tensors(folder).items()
        }
        logits = grok_logits(weights, case.config, samples.tokens)
        loss = _loss(logits, samples)
        loss.backward()
        gradients = {name: weight.grad for name, weight in weights.items()}
        found[dtype] = Reference(logits.detach(), float(loss.detach()), gradients)
    return found


def _reference(model: Any, folder: Path, done: tuple[Tensor, float]) -> Reference:
    gradients = {name: param.grad for name, param in model.named_parameters()}
    assert None not in gradients.values(), "a parameter got no gradient"
    # their own way back from the model's names and shapes to those of its files
    model.save_pretrained(folder, state_dict=gradients)
    return Reference(*done, stored_tensors(folder))


def _forward_backward(model: Any, samples: Batch) -> tuple[Tensor, float]:
    logits = model(input_ids=samples.tokens, use_cache=False).logits
    loss = _loss(logits, samples)
    loss.backward()
    return logits.detach(), float(loss.detach())


def _loss(logits: Tensor, samples: Batch) -> Tensor:
    _, labels, mask = samples
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * mask.flatten().to(losses.dtype)).sum() / mask.sum()


def _write(config: Mapping[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of the safetensors files of a checkpoint."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def config_of(folder: Path) -> dict[str, Any]:
    """Return config.json of a checkpoint."""
    return json.loads((folder / "config.json").read_text())


@contextlib.contextmanager
def in_fp64() -> Iterator[None]:
    """Let code that asks for fp32 get fp64: `torch.float32`, `torch.float` and `.float()`."""
    with contextlib.ExitStack() as undo:
        for owner, name, value in (
            (torch, "float32", torch.float64),
            (torch, "float", torch.float64),
            (torch.Tensor, "float", torch.Tensor.double),
        ):
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        undo.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        yield
