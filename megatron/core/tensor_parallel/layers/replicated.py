"""ReplicatedLinear: a small matrix that every tensor-parallel rank holds whole."""

from dataclasses import replace
from typing import Any

from megatron.core.param_role import role_of, set_role
from megatron.core.tensor_parallel.layers.linear import Linear


class ReplicatedLinear(Linear):
    """Linear layer between what the ranks of ``tp`` all have: the way into a latent.

    Without sequence parallelism each rank multiplies every token, and has the whole gradient if
    what reads the output sums its own (see ``RegionEntry``). With it each rank multiplies its own
    tokens, and gradients are summed.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        sequence_parallel: bool = False,
        **options: Any,
    ) -> None:
        """Make the parameters.

        Args:
            input_size: See ``Linear``.
            output_size: See ``Linear``.
            sequence_parallel: Input and output are this rank's share of the sequence.
            options: See ``Linear``.
        """
        super().__init__(input_size, output_size, **options)
        if sequence_parallel:
            for param in self.parameters():
                set_role(param, replace(role_of(param), sums_over_tp=True))
