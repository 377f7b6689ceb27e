"""Which experts a MoE layer gets, made of which it has: lists and weights. Pure, no tensors."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron.core.errors import ConfigError


class NewExpert(NamedTuple):
    """An expert after surgery."""

    parts: tuple[tuple[int, float], ...]
    """(Old expert, weight): its tensors are this weighted sum. Weights sum to 1."""
    share: float = 1.0
    """Its gradient is this share of the sum of its parts' gradients, which its moments follow."""

    @property
    def is_copy(self) -> bool:
        """Whether it is one old expert, unchanged."""
        return len(self.parts) == 1


LayerPlan = tuple[NewExpert, ...]
"""The experts of a layer, by their new ids."""


def same(expert: int) -> NewExpert:
    """Return an expert that stays as it is."""
    return NewExpert(((expert, 1.0),))


def kept(experts: Sequence[int]) -> LayerPlan:
    """Keep these experts, in this order."""
    return tuple(map(same, experts))


def cloned(num_experts: int, copies: int, share: float) -> LayerPlan:
    """Put ``copies`` of each expert side by side.

    Neighbours, so that groups of neighbours stay whole, and equal logits of different experts are
    still decided by the lower old id.
    """
    return tuple(NewExpert(((e, 1.0),), share) for e in range(num_experts) for _ in range(copies))


def merged(
    num_experts: int, groups: Sequence[Sequence[int]], weights: Mapping[int, float]
) -> LayerPlan:
    """Make one expert of each group, in the place of its first member; others stay.

    Args:
        num_experts: Of the layer.
        groups: Disjoint.
        weights: Expert -> its weight in its group, of any sum; 1 where absent.

    Raises:
        ConfigError: The weights of a group sum to 0.
    """
    group_of = {expert: group for group in groups for expert in group}
    plan = []
    for expert in range(num_experts):
        group = group_of.get(expert, [expert])
        if expert != min(group):
            continue
        total = sum(weights.get(e, 1.0) for e in group)
        if len(group) > 1 and total <= 0:
            raise ConfigError(f"the weights of experts {_listed(group)} sum to 0")
        if len(group) == 1:
            plan.append(same(expert))
        else:
            plan.append(NewExpert(tuple((e, weights.get(e, 1.0) / total) for e in sorted(group))))
    return tuple(plan)


def group_weights(text: str | None, groups: Sequence[Sequence[int]]) -> dict[int, float]:
    """Read the weights of groups, ``3,1;1,1``: expert -> weight. Empty for equal ones.

    Raises:
        ConfigError: They are no numbers of 0 or more, or not one for each expert.
    """
    if text is None:
        return {}
    try:
        found = [[float(word) for word in part.split(",")] for part in text.split(";")]
    except ValueError:
        raise ConfigError(f"--weights {text} are no numbers; write 3,1;1,1") from None
    if [len(part) for part in found] != [len(group) for group in groups]:
        raise ConfigError(f"--weights {text} must be one number for each expert of --groups")
    if not all(0 <= weight < float("inf") for part in found for weight in part):
        raise ConfigError(f"--weights {text} must be 0 or more")
    pairs = zip(groups, found, strict=True)
    return {e: w for group, part in pairs for e, w in zip(group, part, strict=True)}


def by_load(counts: Sequence[int], number: int) -> list[int]:
    """Return the ``number`` experts with the most tokens, by ascending id; the lower id on ties."""
    order = sorted(range(len(counts)), key=lambda expert: (-counts[expert], expert))
    return sorted(order[:number])


def numbers(text: str) -> list[int]:
    """Read ``0-3,6`` as 0, 1, 2, 3, 6.

    Raises:
        ConfigError: It is no such list.
    """
    found: list[int] = []
    for word in text.split(","):
        first, dash, last = word.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"{text!r} is no list of experts; write 0-3,6")
        span = range(int(first), int(last or first) + 1)
        if not span:
            raise ConfigError(f"{text!r}: {word} is an empty range")
        found += span
    if twice := sorted({e for e in found if found.count(e) > 1}):
        raise ConfigError(f"{text!r} names expert {twice[0]} twice")
    return found


def per_layer(words: Sequence[str], layers: Mapping[int, int], flag: str) -> dict[int, str]:
    """Read ``LIST`` for all MoE layers or ``LAYER:LIST`` for one; those of one layer hold.

    Args:
        words: As given.
        layers: MoE layer -> its number of experts.
        flag: For messages.

    Returns:
        Layer -> list, for the layers that have one.

    Raises:
        ConfigError: A layer that has no experts, or is named twice.
    """
    found: dict[int, str] = {}
    for word in words:
        before, colon, text = word.partition(":")
        if colon and not before.strip().isdecimal():
            raise ConfigError(f"{flag} {word}: write LAYER:LIST, such as 2:0-3,6")
        if colon and int(before) not in layers:
            raise ConfigError(
                f"{flag} {word}: layer {int(before)} has no experts; MoE layers are "
                f"{_listed(list(layers))}"
            )
        if colon:
            if int(before) in found:
                raise ConfigError(f"{flag} names layer {int(before)} twice")
            found[int(before)] = text
    general = [word for word in words if ":" not in word]
    if len(general) > 1:
        raise ConfigError(f"{flag} {' '.join(general)}: one list for all layers is enough")
    if general:
        found = {layer: found.get(layer, general[0]) for layer in layers}
    return found


def experts_in(text: str, layer: int, num_experts: int, flag: str) -> list[int]:
    """Read a list of experts of a layer.

    Raises:
        ConfigError: It is no list, or names an expert that the layer does not have.
    """
    found = numbers(text)
    if wrong := [e for e in found if e >= num_experts]:
        raise ConfigError(
            f"{flag} {text}: layer {layer} has experts 0 to {num_experts - 1}, not {wrong[0]}"
        )
    return found


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
