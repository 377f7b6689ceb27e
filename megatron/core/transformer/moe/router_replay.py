"""Router replay: keep which experts were chosen, and choose them again in another forward.

For reinforcement learning, where the model that is trained must route as the one that generated.
What is kept are indices; weights are always made of the logits of the forward at hand. Kept by
microbatch, so that several may be in flight; nothing is shared between routers.
"""

import weakref
from collections.abc import Callable, Sequence
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor, nn

from megatron.core.errors import ConfigError, DataError
from megatron.core.transformer.moe.routing import topk_indices
from megatron.core.transformer.transformer_config import TransformerConfig


class RouterReplayAction(Enum):
    """What the next forwards do with the experts of each token."""

    RECORD = "record"
    """Choose, and keep what was chosen."""
    REPLAY_FORWARD = "replay_forward"
    """Take the target indices."""
    REPLAY_BACKWARD = "replay_backward"
    """In a recomputed forward: take what the forward of the same microbatch took."""


class RouterReplay:
    """What one router records and replays.

    Each router owns one under ``--moe-enable-routing-replay``; or a caller makes them
    (``replay_for_layers``) and passes them in ``ForwardContext.router_replay``, which goes first.

    The static methods act on the routers of ``model``, in the order of its layers, or on all living
    instances that routers own, in the order they were built. They hold routers weakly: a model
    that is gone takes its instances along.
    """

    _living: ClassVar[list["weakref.ref[RouterReplay]"]] = []

    def __init__(self, num_experts: int, topk: int, *, register: bool = False) -> None:
        """Begin without an action.

        Args:
            num_experts: Of the router.
            topk: Experts per token.
            register: Let the static methods find it without ``model``.
        """
        self.num_experts = num_experts
        self.topk = topk
        self.action: RouterReplayAction | None = None
        self.recorded: dict[int, Tensor] = {}
        """Microbatch -> [num_tokens, topk] int64, ascending, of the forwards under RECORD."""
        self._targets: dict[int | None, Tensor] = {}  # None: of every other microbatch
        self._taken: dict[int, Tensor] = {}
        self._static_buffer: Tensor | None = None
        if register:
            RouterReplay._living.append(weakref.ref(self))

    # of all routers of a model

    @staticmethod
    def instances(model: nn.Module | None = None) -> list["RouterReplay"]:
        """Return the instances that the static methods act on.

        Raises:
            ConfigError: There are none.
        """
        if model is None:
            RouterReplay._living[:] = [ref for ref in RouterReplay._living if ref() is not None]
            alive = [ref() for ref in RouterReplay._living]
            found = [replay for replay in alive if replay is not None]
        else:
            owned = [getattr(module, "router_replay", None) for module in model.modules()]
            found = [replay for replay in owned if isinstance(replay, RouterReplay)]
        if not found:
            raise ConfigError(
                "no router records or replays: build the model with --moe-enable-routing-replay "
                "(moe_enable_routing_replay=True), or pass ForwardContext(router_replay=...)"
            )
        return found

    @staticmethod
    def set_replay_data(
        all_layers_topk_indices: Sequence[Tensor], model: nn.Module | None = None
    ) -> None:
        """Give each router the indices [num_tokens, topk] that it shall replay.

        Raises:
            ConfigError: There are no routers.
            DataError: Not one tensor for each router, or one that does not fit (see
                ``set_target_indices``).
        """
        found = RouterReplay.instances(model)
        if len(all_layers_topk_indices) != len(found):
            raise DataError(
                f"replay data is of {len(all_layers_topk_indices)} layers, and {len(found)} "
                "routers replay; give one tensor for each MoE layer, and model= where several "
                "models live"
            )
        for replay, indices in zip(found, all_layers_topk_indices, strict=True):
            replay.set_target_indices(indices)

    @staticmethod
    def get_recorded_data(model: nn.Module | None = None) -> list[Tensor | None]:
        """Return for each router the indices of its last recorded microbatch, None for none.

        Of several microbatches, see ``recorded`` of each of the ``instances``.
        """
        return [replay.get_recorded_indices() for replay in RouterReplay.instances(model)]

    @staticmethod
    def set_global_router_replay_action(
        action: RouterReplayAction, model: nn.Module | None = None
    ) -> None:
        """Let all routers do ``action`` from the next forward on."""
        for replay in RouterReplay.instances(model):
            replay.action = RouterReplayAction(action)

    @staticmethod
    def clear_global_router_replay_action(model: nn.Module | None = None) -> None:
        """Let all routers choose for themselves, and keep nothing."""
        for replay in RouterReplay.instances(model):
            replay.action = None

    @staticmethod
    def clear_global_indices(model: nn.Module | None = None) -> None:
        """Forget all indices, recorded and to be replayed."""
        for replay in RouterReplay.instances(model):
            replay.clear_indices()

    @staticmethod
    def clear_global_router_replay_instances() -> None:
        """Let the static methods find no router of the models of now, but through ``model``."""
        RouterReplay._living.clear()

    @staticmethod
    def set_global_static_buffers(static_buffer: Tensor, model: nn.Module | None = None) -> None:
        """Let recorded indices be written into ``static_buffer`` [max_tokens, layers, topk].

        Its address stays, so other programs may read it; of several microbatches it holds the last.

        Raises:
            ConfigError: There are no routers.
            DataError: It is shaped otherwise.
        """
        found = RouterReplay.instances(model)
        for layer, replay in enumerate(found):
            want = len(found), replay.topk
            if static_buffer.dim() != 3 or tuple(static_buffer.shape[1:]) != want:
                raise DataError(
                    f"the buffer is {list(static_buffer.shape)}; it must be [max_tokens, layers "
                    f"{want[0]}, topk {want[1]}]"
                )
            replay._static_buffer = static_buffer[:, layer]

    @staticmethod
    def clear_global_static_buffers(model: nn.Module | None = None) -> None:
        """Let recorded indices be tensors of their own again."""
        for replay in RouterReplay.instances(model):
            replay._static_buffer = None

    # of one router

    def set_router_replay_action(self, action: RouterReplayAction) -> None:
        """Do ``action`` from the next forward on."""
        self.action = RouterReplayAction(action)

    def clear_router_replay_action(self) -> None:
        """Choose without recording or replaying."""
        self.action = None

    def set_target_indices(self, topk_indices: Tensor, microbatch: int | None = None) -> None:
        """Replay these from now on.

        Args:
            topk_indices: [num_tokens, topk] of any integer type, the rows in the order of the
                router's tokens: sample by sample for each position.
            microbatch: Of this one only; None for all that have none of their own.

        Raises:
            DataError: Another shape or type, an expert that is not there, or one named twice for a
                token.
        """
        _check(topk_indices, self.num_experts, self.topk)
        self._targets[microbatch] = topk_indices.long()

    def get_recorded_indices(self) -> Tensor | None:
        """Return the indices of the last microbatch that was recorded, [num_tokens, topk]."""
        return next(reversed(self.recorded.values()), None)

    def clear_indices(self) -> None:
        """Forget what was recorded and what was to be replayed; the action stays."""
        self.recorded.clear()
        self._targets.clear()
        self._taken.clear()

    def replayed(self, num_tokens: int, microbatch: int, device: torch.device) -> Tensor | None:
        """Return the indices that this forward has to take, None when it chooses by itself.

        Args:
            num_tokens: Of the forward.
            microbatch: ``ForwardContext.microbatch``.
            device: Where the indices are wanted.

        Raises:
            DataError: There are none, or of another number of tokens.
        """
        if self.action is RouterReplayAction.REPLAY_FORWARD:
            found = self._targets.get(microbatch, self._targets.get(None))
            missing = "call set_target_indices or RouterReplay.set_replay_data first"
        elif self.action is RouterReplayAction.REPLAY_BACKWARD:
            found = self._taken.get(microbatch)
            missing = "no forward of this microbatch recorded or replayed any"
        else:
            return None
        if found is None:
            raise DataError(f"no indices to replay in microbatch {microbatch}: {missing}")
        if len(found) != num_tokens:
            raise DataError(
                f"{len(found)} rows of indices to replay in microbatch {microbatch}, and "
                f"{num_tokens} tokens; a row is needed for each token of this rank"
            )
        found = found.to(device, non_blocking=True)
        self._taken[microbatch] = found
        return found

    def record(self, indices: Tensor, microbatch: int) -> None:
        """Keep what a forward chose, [num_tokens, topk] int64, if that is the action."""
        if self.action is not RouterReplayAction.RECORD:
            return
        self._taken[microbatch] = indices
        buffer = self._static_buffer
        if buffer is not None:
            if len(buffer) < len(indices):
                raise DataError(
                    f"the static buffer has {len(buffer)} rows for {len(indices)} tokens"
                )
            indices = buffer[: len(indices)].copy_(indices)
        self.recorded.pop(microbatch, None)  # the last recorded comes last
        self.recorded[microbatch] = indices

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return scores and indices [num_tokens, topk] of the experts to take, by the action.

        For routers of one's own; the microbatch is 0.

        Args:
            scores: [num_tokens, num_experts].
            topk: Experts per token, for ``default_compute_topk``.
            num_groups: The same.
            group_topk: The same.
            default_compute_topk: Called ``(scores, topk, num_groups=, group_topk=)`` where nothing
                is replayed; returns scores and indices.
        """
        indices = self.replayed(len(scores), 0, scores.device)
        if indices is not None:
            return scores.gather(1, indices), indices
        assert default_compute_topk is not None, "nothing is replayed and nothing can choose"
        values, indices = default_compute_topk(
            scores, topk, num_groups=num_groups, group_topk=group_topk
        )
        self.record(indices, 0)
        return values, indices


def replay_for_layers(config: TransformerConfig) -> dict[int, RouterReplay]:
    """Return layer number -> a new instance for each MoE layer, for one ``ForwardContext``."""
    assert config.num_moe_experts is not None, "a dense model has no routers"
    sizes = zip(config.moe_experts_by_layer, config.moe_topk_by_layer, strict=True)
    return {
        layer: RouterReplay(*size) for layer, size in zip(config.moe_layers, sizes, strict=True)
    }


def indices_of_map(routing_map: Tensor, topk: int) -> Tensor:
    """Return the True places of each row of a bool map that has ``topk`` of them, ascending.

    [num_tokens, topk] int64; without waiting for the device.
    """
    return topk_indices(routing_map.float(), topk).sort(dim=1).values


def map_of_indices(indices: Tensor, num_experts: int) -> Tensor:
    """Return the bool map [num_tokens, num_experts] of ``indices`` [num_tokens, topk]."""
    routing_map = indices.new_zeros(len(indices), num_experts, dtype=torch.bool)
    return routing_map.scatter_(1, indices, True)


def _check(indices: Tensor, num_experts: int, topk: int) -> None:
    if indices.dtype.is_floating_point or indices.dtype == torch.bool:
        raise DataError(f"indices to replay are {indices.dtype}; they must be of an integer type")
    if indices.dim() != 2 or indices.shape[1] != topk:
        raise DataError(
            f"indices to replay are {list(indices.shape)}; they must be [num_tokens, topk {topk}]"
        )
    if indices.numel() == 0:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= num_experts:
        raise DataError(
            f"indices to replay name experts {low} to {high}; there are 0 to {num_experts - 1}"
        )
    ordered = indices.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
    if twice.any():
        raise DataError(
            f"indices to replay name an expert twice for one token, first in row "
            f"{int(twice.int().argmax())}"
        )
