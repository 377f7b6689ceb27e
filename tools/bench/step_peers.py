"""What others train bench-S with, from the same weights: transformers, torchtitan, a textbook.

Each is their own model with torch's fused AdamW, its clipping and its default gradients. In bf16
their weights, gradients and moments are bf16 ("pure bf16"); ours keeps fp32 sums, main weights and
moments beside bf16 weights, so it does more.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tools.bench.step_ours import LEARNING_RATE, Data, Size, Step
from tools.bench.step_textbook import TextbookGPT
from tools.bench.step_titan import titan_model, why_no_titan
from tools.bench.step_weights import MixtralWeights

LossOf = Callable[[Tensor, Tensor], Tensor]
"""Tokens and labels, [b, s] each -> mean loss, []."""
CONTENDERS = (
    "ours",
    "textbook",
    "transformers-grouped_mm",
    "transformers-eager",
    "torchtitan",
)


class PeerStep:
    """A model of plain torch modules; calling it trains one step on the tokens of ``data``."""

    def __init__(self, name: str, model: nn.Module, loss_of: LossOf, data: Data) -> None:
        """Make the optimizer, with the settings of ours: no decay for what is no matrix."""
        self.name, self.model, self.loss_of, self.data = name, model.train(), loss_of, data
        self.params = list(model.parameters())
        self.device = str(self.params[0].device)
        decayed = [param for param in self.params if param.dim() > 1]
        others = [param for param in self.params if param.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": 0.01},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=LEARNING_RATE,
            fused=True,
        )
        self.loss = float("nan")

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(param.numel() for param in self.params)

    def __call__(self) -> None:
        """Forward, backward, clipping, optimizer step; ``loss`` is that of before it."""
        loss = self.loss_of(*self.data.pair(self.device))
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss = loss.item()

    @torch.no_grad()
    def forward_loss(self) -> float:
        """Return the mean loss of the tokens, without training on them."""
        return float(self.loss_of(*self.data.pair(self.device)))


def missing() -> dict[str, str]:
    """Return contender -> why it cannot take part here."""
    found = {}
    if importlib.util.find_spec("transformers") is None:
        for name in CONTENDERS:
            if name.startswith("transformers"):
                found[name] = "transformers is not installed (pip install transformers)"
    if (why := why_no_titan()) is not None:
        found["torchtitan"] = why
    return found


def make_peers(names: Sequence[str], ours: Step, data: Data) -> Iterator[PeerStep]:
    """Build the peers among ``names`` that are installed, with the weights that ``ours`` has."""
    weights = MixtralWeights.of(ours)
    device = str(ours.run.world.device)
    absent = missing()
    mixtral: Any = None
    for name in names:
        if name == "ours" or name in absent:
            continue
        if name == "textbook":
            textbook = TextbookGPT(weights).to(device)
            yield PeerStep(name, textbook, textbook.loss, data)
        elif name == "torchtitan":
            titan = titan_model(weights, ours.size).to(device)
            yield PeerStep(name, titan, lambda t, y, m=titan: mean_loss(m(t), y), data)
        else:  # both ways over one model: memory for one
            mixtral = mixtral or transformers_model(weights, ours.size).to(device)
            yield PeerStep(name, mixtral, _mixtral_loss(mixtral, name.partition("-")[2]), data)


def transformers_model(weights: MixtralWeights, size: Size) -> Any:
    """Return their Mixtral with our weights."""
    import transformers

    config = transformers.AutoConfig.for_model(**weights.config)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=weights.dtype, attn_implementation="sdpa"
    )
    state = dict(weights.tensors)
    for layer in range(weights.num_layers):
        experts = f"model.layers.{layer}.mlp.experts."
        gate_up, down = weights.experts(layer)
        state[f"{experts}gate_up_proj"], state[f"{experts}down_proj"] = gate_up, down
        state[f"model.layers.{layer}.mlp.gate.weight"] = state[weights.gate_name(layer)]
    wanted = model.state_dict()
    model.load_state_dict({name: state[name] for name in wanted})
    assert size.sequence <= config.max_position_embeddings, f"{config.max_position_embeddings=}"
    return model


def _mixtral_loss(model: Any, implementation: str) -> LossOf:
    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        model.set_experts_implementation(implementation)
        output = model(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False)
        return output.loss

    return loss_of


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy, in fp32, of logits [b, s, v]."""
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
