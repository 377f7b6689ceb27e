"""How tensors on disk and ours lie in each other: one function for each kind of layout. Pure.

Each returns a ``Placement`` for one row of a table of weights, with the sizes of the model. What is
named ``hf`` is on disk, what is named ``key`` is ours.
"""

from collections.abc import Callable, Mapping

from megatron.core.models.huggingface.model_facts import ModelFacts
from megatron.core.models.huggingface.tables import Place, Placement, Weight
from megatron.core.models.huggingface.views import View

Transform = Callable[[Weight, ModelFacts, Place], Placement]
Shape = Callable[[ModelFacts], tuple[int, ...]]


def plain(shape: Shape) -> Transform:
    """Keep the tensor as it is."""

    def build(weight: Weight, facts: ModelFacts, place: Place) -> Placement:
        dims = shape(facts)
        return Placement(dims, ((View(dims), weight.key, View(dims), dims),))

    return build


def transposed(shape: Shape) -> Transform:
    """Exchange rows and columns, as Conv1D of GPT-2 has them; ``shape`` is ours."""

    def build(weight: Weight, facts: ModelFacts, place: Place) -> Placement:
        rows, columns = dims = shape(facts)
        on_disk = View((columns, rows), order=(1, 0))
        return Placement((columns, rows), ((on_disk, weight.key, View(dims), dims),))

    return build


def vocabulary(weight: Weight, facts: ModelFacts, place: Place) -> Placement:
    """Put the rows first; those that pad our table are zero, and are not written back."""
    rows, width = facts["vocab_size"], facts.config.hidden_size
    padded = facts["padded_vocab_size"]
    ours = View((padded, width), ((0, rows),))
    return Placement((rows, width), ((View((rows, width)), weight.key, ours, (padded, width)),))


def _qkv_view(facts: ModelFacts, part: str, tail: tuple[int, ...]) -> View:
    """Return the queries, keys or values in our rows by query group."""
    config = facts.config
    ratio, size = facts.heads // facts.groups, config.head_dim
    which: dict[str, tuple[int, int]] = {
        "q": (0, ratio), "k": (ratio, ratio + 1), "v": (ratio + 1, ratio + 2),
    }  # fmt: skip
    return View((facts.groups, ratio + 2, size, *tail), (None, which[part]))


def qkv(part: str, *, is_bias: bool = False) -> Transform:
    """Put the heads of one of the three projections into their places by query group."""

    def build(weight: Weight, facts: ModelFacts, place: Place) -> Placement:
        tail = () if is_bias else (facts.config.hidden_size,)
        ours = _qkv_view(facts, part, tail)
        groups, total, size = ours.shape[:3]
        count = facts.heads if part == "q" else facts.groups
        on_disk = View((groups, count // groups, size, *tail))
        shape = (groups * total * size, *tail)
        return Placement((count * size, *tail), ((on_disk, weight.key, ours, shape),))

    return build


def thirds(*, is_bias: bool = False) -> Transform:
    """Cut the columns of GPT-2's one product into queries, keys and values, and turn them."""

    def build(weight: Weight, facts: ModelFacts, place: Place) -> Placement:
        width, count, size = facts.config.hidden_size, facts.heads, facts.config.head_dim
        tail = () if is_bias else (width,)
        shape = (3 * width, *tail)
        pieces = []
        for number in range(3):
            ours = View((count, 3, size, *tail), (None, number))
            if is_bias:
                on_disk = View((3, count, size), (number,))
            else:
                on_disk = View((width, 3, count, size), (None, number), (1, 2, 0))
            pieces.append((on_disk, weight.key, ours, shape))
        return Placement(tuple(reversed(shape)), tuple(pieces))

    return build


def _expert_key(weight: Weight, expert: int, part: str = "") -> str:
    return weight.key.replace("{expert}", str(expert)).replace("{part}", part)


def stacked_halves(shape: Shape) -> Transform:
    """Cut [experts, 2 ffn, hidden], gate above up, into experts; ``shape`` is that of one half."""

    def build(weight: Weight, facts: ModelFacts, place: Place) -> Placement:
        half, experts = shape(facts), facts.num_experts_of(place.layer)
        pieces = tuple(
            (
                View((experts, 2, *half), (expert, number)),
                _expert_key(weight, expert, part),
                View(half),
                half,
            )
            for expert in range(experts)
            for number, part in enumerate(("gate", "up"))
        )
        return Placement((experts, 2 * half[0], *half[1:]), pieces)

    return build


def stacked_columns(shape: Shape) -> Transform:
    """Cut [experts, hidden, 2 ffn], gate and up column by column, and turn it; also of biases."""

    def build(weight: Weight, facts: ModelFacts, place: Place) -> Placement:
        half, experts = shape(facts), facts.num_experts_of(place.layer)
        front = half[1:]
        order = (1, 0) if front else ()
        pieces = tuple(
            (
                View((experts, *front, half[0], 2), (expert, *[None] * len(half), number), order),
                _expert_key(weight, expert, part),
                View(half),
                half,
            )
            for expert in range(experts)
            for number, part in enumerate(("gate", "up"))
        )
        return Placement((experts, *front, 2 * half[0]), pieces)

    return build


def stacked(shape: Shape, *, is_transposed: bool = False) -> Transform:
    """Cut [experts, ...] into experts; ``shape`` is ours, which may be turned on disk."""

    def build(weight: Weight, facts: ModelFacts, place: Place) -> Placement:
        dims, experts = shape(facts), facts.num_experts_of(place.layer)
        on_disk = tuple(reversed(dims)) if is_transposed else dims
        order = (1, 0) if is_transposed else ()
        pieces = tuple(
            (
                View((experts, *on_disk), (expert,), order),
                _expert_key(weight, expert),
                View(dims),
                dims,
            )
            for expert in range(experts)
        )
        return Placement((experts, *on_disk), pieces)

    return build


SHAPES: Mapping[str, Shape] = {
    "hidden": lambda facts: (facts.config.hidden_size,),
    "positions": lambda facts: (
        facts.config.max_position_embeddings, facts.config.hidden_size,
    ),
    "proj": lambda facts: (
        facts.config.hidden_size, facts.heads * facts.config.head_dim,
    ),
    "fc1": lambda facts: (facts.config.ffn_size, facts.config.hidden_size),
    "fc1_bias": lambda facts: (facts.config.ffn_size,),
    "fc2": lambda facts: (facts.config.hidden_size, facts.config.ffn_size),
    "expert_fc1": lambda facts: (facts.config.moe_ffn_size, facts.config.hidden_size),
    "expert_fc1_bias": lambda facts: (facts.config.moe_ffn_size,),
    "expert_fc2": lambda facts: (facts.config.hidden_size, facts.config.moe_ffn_size),
    "shared_fc1": lambda facts: (_shared(facts), facts.config.hidden_size),
    "shared_fc2": lambda facts: (facts.config.hidden_size, _shared(facts)),
    "shared_gate": lambda facts: (1, facts.config.hidden_size),
    "experts": lambda facts: (facts.config.num_moe_experts or 0,),
    "router": lambda facts: (facts.config.num_moe_experts or 0, facts.config.hidden_size),
    "head": lambda facts: (facts.config.head_dim,),
    "all_heads": lambda facts: (facts.heads * facts.config.head_dim,),
    "all_groups": lambda facts: (facts.groups * facts.config.head_dim,),
    "heads": lambda facts: (facts.heads,),
    # multi-head latent attention
    "q_rank": lambda facts: (facts["q_lora_rank"],),
    "kv_rank": lambda facts: (facts["kv_lora_rank"],),
    "q_whole": lambda facts: (facts.heads * _qk(facts), facts.config.hidden_size),
    "q_down": lambda facts: (facts["q_lora_rank"], facts.config.hidden_size),
    "q_up": lambda facts: (facts.heads * _qk(facts), facts["q_lora_rank"]),
    "kv_down": lambda facts: (
        facts["kv_lora_rank"] + facts["qk_pos_emb_head_dim"], facts.config.hidden_size,
    ),
    "kv_down_bias": lambda facts: (facts["kv_lora_rank"] + facts["qk_pos_emb_head_dim"],),
    "kv_up": lambda facts: (
        facts.heads * (facts["qk_head_dim"] + facts["v_head_dim"]), facts["kv_lora_rank"],
    ),
    "latent_proj": lambda facts: (
        facts.config.hidden_size, facts.heads * facts["v_head_dim"],
    ),
    # multi-token prediction
    "mtp_proj": lambda facts: (facts.config.hidden_size, 2 * facts.config.hidden_size),
}  # fmt: skip
"""Name -> shape of one of our tensors."""


def _shared(facts: ModelFacts) -> int:
    return facts.config.moe_shared_expert_intermediate_size or 0


def _qk(facts: ModelFacts) -> int:
    return int(facts["qk_head_dim"] + facts["qk_pos_emb_head_dim"])
