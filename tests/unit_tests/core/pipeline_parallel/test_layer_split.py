"""R18: whatever the split, the stages together are exactly the model, in its order."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.errors import ConfigError
from megatron.core.pipeline_parallel.layer_balance import LayerCosts
from megatron.core.pipeline_parallel.layer_split import (
    SplitOptions,
    balanced_split,
    layout_of,
    split_layers,
)
from megatron.core.pipeline_parallel.layout_string import format_layout


def model(num_layers, mtp=0):
    """Name the parts of a model in order."""
    layers = [f"layer {n}" for n in range(num_layers)]
    mtp_layers = [f"mtp layer {n}" for n in range(mtp)]
    return ["embedding", *layers, "final norm", *mtp_layers, "output head", "loss"]


def is_the_model(stages, num_layers, mtp=0):
    return [part for stage in stages for part in stage.parts()] == model(num_layers, mtp)


def split(num_layers, pp, **options):
    return split_layers(
        SplitOptions(num_layers=num_layers, pipeline_model_parallel_size=pp, **options)
    )


def counts(stages):
    return [len(stage.layers) for stage in stages]


GRID = list(product(range(1, 14), range(1, 5), range(1, 5)))


def test_even_splits_are_the_model_or_refused_exactly_where_they_do_not_divide():
    for layers, pp, vpp in GRID:
        for embedding, loss in product((False, True), repeat=2):
            flags = {
                "num_virtual_stages_per_pipeline_rank": vpp,
                "account_for_embedding_in_pipeline_split": embedding,
                "account_for_loss_in_pipeline_split": loss,
            }
            total = layers + embedding + loss
            if total % (pp * vpp):
                with pytest.raises(ConfigError, match="must be a multiple"):
                    split(layers, pp, **flags)
                continue
            stages = split(layers, pp, **flags)
            assert is_the_model(stages, layers)
            per_stage = [total // (pp * vpp)] * (pp * vpp)
            per_stage[0] -= embedding
            per_stage[-1] -= loss
            assert counts(stages) == per_stage


def test_layers_per_virtual_stage_say_how_many_stages_there_are():
    for layers, pp, per_stage in GRID:
        flags = {"num_layers_per_virtual_pipeline_stage": per_stage}
        if layers % (pp * per_stage):
            with pytest.raises(ConfigError, match="must be a multiple"):
                split(layers, pp, **flags)
        else:
            stages = split(layers, pp, **flags)
            assert is_the_model(stages, layers)
            assert set(counts(stages)) == {per_stage}
            assert len(stages) % pp == 0


def test_first_and_last_ranks_may_have_their_own_numbers():
    legal = 0
    for layers, pp, vpp in GRID:
        for first, last in product((None, 1, 2, 3, 4), repeat=2):
            if (first, last) == (None, None) or pp == 1:
                continue
            flags = {
                "decoder_first_pipeline_num_layers": first,
                "decoder_last_pipeline_num_layers": last,
                "num_virtual_stages_per_pipeline_rank": vpp,
            }
            others = pp - (first is not None) - (last is not None)
            left = layers - (first or 0) - (last or 0)
            fits = left >= 0 and (left % others == 0 if others else left == 0)
            each = left // others if others and fits else 0
            fits = fits and not any(n % vpp for n in (first or 0, each, last or 0))
            if not fits:
                with pytest.raises(ConfigError, match="legal"):
                    split(layers, pp, **flags)
                continue
            legal += 1
            stages = split(layers, pp, **flags)
            assert is_the_model(stages, layers)
            of_ranks = [sum(counts(stages)[rank::pp]) for rank in range(pp)]
            assert of_ranks == [each if n is None else n for n in [first, *[None] * (pp - 2), last]]
            assert all(counts(stages)[rank] == of_ranks[rank] // vpp for rank in range(pp))
    assert legal > 100


@given(data=st.data())
def test_layouts_are_the_model_with_as_many_layers_a_stage_as_they_say(data):
    layers, pp, vpp = (data.draw(st.integers(1, n)) for n in (13, 4, 4))
    mtp = data.draw(st.integers(0, 2))
    num_stages = pp * vpp
    cuts = sorted(data.draw(st.integers(0, layers)) for _ in range(num_stages - 1))
    per_stage = [b - a for a, b in zip([0, *cuts], [*cuts, layers], strict=True)]
    texts = ["t" * count for count in per_stage]
    texts[0] = "E" + texts[0]
    texts[-1] += "m" * mtp + "L"
    text = format_layout(texts)
    stages = split(layers, pp, pipeline_model_parallel_layout=text, mtp_num_layers=mtp)
    assert is_the_model(stages, layers, mtp)
    assert counts(stages) == per_stage
    assert layout_of(stages) == text
    assert stages[0].embedding
    assert stages[-1].head


def test_the_documented_layout_of_61_layers_on_16_ranks():
    text = "Et*3|(tt|)*29,m|L"
    stages = split(61, 16, pipeline_model_parallel_layout=text, mtp_num_layers=1)
    assert len(stages) == 32
    assert is_the_model(stages, 61, mtp=1)
    # Rank 14 has two layers and the MTP layer, rank 15 two layers and the loss.
    assert [stages[stage].symbols() for stage in (14, 30, 15, 31)] == ["tt", "m", "tt", "L"]
    assert stages[29].final_norm, "MTP reads what the final norm made"
    assert layout_of(stages) == text


def test_mtp_layers_of_even_splits_are_with_the_head():
    stages = split(4, 2, mtp_num_layers=2)
    assert is_the_model(stages, 4, mtp=2)
    assert [len(stage.mtp_layers) for stage in stages] == [0, 2]


def test_balanced_splits_are_the_model_for_all_sizes():
    for layers, pp, vpp in GRID:
        costs = LayerCosts(layers=(1.0,) * layers, embedding=0.2, head=2.0)
        if pp * vpp > layers + 2:
            with pytest.raises(ConfigError, match=f"at most {layers + 2} stages"):
                balanced_split(costs, pp * vpp)
            continue
        stages = balanced_split(costs, pp * vpp)
        assert len(stages) == pp * vpp
        assert is_the_model(stages, layers)
        layout = layout_of(stages)
        assert split(layers, pp, pipeline_model_parallel_layout=layout) == stages


def test_a_costly_head_and_cheap_dense_layers_move_layers_to_the_front():
    costs = LayerCosts(layers=(1.0,) * 3 + (3.0,) * 9, embedding=0.1, head=6.0)
    assert counts(balanced_split(costs, 4)) == [5, 3, 3, 1]
    assert counts(balanced_split(LayerCosts(layers=(1.0,) * 12), 4)) == [3, 3, 3, 3]


def test_balanced_splits_have_multi_token_prediction_beside_the_head():
    costs = LayerCosts(layers=(1.0,) * 4, head=6.0, mtp_num_layers=2)
    stages = balanced_split(costs, 3)
    assert is_the_model(stages, 4, mtp=2)
    assert layout_of(stages) == "Ett|tt|mmL"
    again = split(4, 3, pipeline_model_parallel_layout=layout_of(stages), mtp_num_layers=2)
    assert again == stages


def error_of(num_layers, pp, **options):
    with pytest.raises(ConfigError) as error:
        split(num_layers, pp, **options)
    return str(error.value)


def test_uneven_numbers_are_answered_with_the_nearest_that_divide():
    text = error_of(13, 4, num_virtual_stages_per_pipeline_rank=2)
    assert "--num-layers 13 must be a multiple of --pipeline-model-parallel-size 4 x 2" in text
    assert "virtual stages = 8; legal" in text
    assert "--num-layers 8 or 16" in text
    text = error_of(12, 2, num_layers_per_virtual_pipeline_stage=4)
    assert ", --num-layers-per-virtual-pipeline-stage 3 or 6; or say with" in text
    text = error_of(12, 2, num_virtual_stages_per_pipeline_rank=5)
    assert ", --num-virtual-stages-per-pipeline-rank 3 or 6; or say with" in text
    text = error_of(14, 4)
    assert "--num-layers 12 or 16, --pipeline-model-parallel-size 2 or 7" in text
    text = error_of(9, 4, account_for_loss_in_pipeline_split=True)
    assert "--num-layers 9 + 1 for embedding or loss = 10" in text
    assert "--num-layers 7 or 11, --pipeline-model-parallel-size 2 or 5" in text


def test_every_neighbour_that_is_named_is_legal():
    for layers, pp in product(range(1, 14), range(2, 5)):
        for first in range(1, layers + 1):
            try:
                split(layers, pp, decoder_first_pipeline_num_layers=first)
            except ConfigError as error:
                named = str(error).split("legal: ")[1].split(", or ")
                for choice in named:
                    if choice == "none with these sizes":
                        continue
                    number = int(choice.removeprefix("--decoder-first-pipeline-num-layers "))
                    assert is_the_model(
                        split(layers, pp, decoder_first_pipeline_num_layers=number), layers
                    )


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"num_layers": 0}, ["--num-layers 0 must be at least 1"]),
        (
            {"num_layers_per_virtual_pipeline_stage": 2, "num_virtual_stages_per_pipeline_rank": 2},
            ["--num-virtual-stages-per-pipeline-rank exclude each other"],
        ),
        (
            {"num_layers_per_virtual_pipeline_stage": 2, "decoder_first_pipeline_num_layers": 2},
            ["give --num-virtual-stages-per-pipeline-rank"],
        ),
        (
            {
                "decoder_last_pipeline_num_layers": 2,
                "account_for_loss_in_pipeline_split": True,
            },
            ["--account-for-loss-in-pipeline-split exclude each other"],
        ),
        (
            {"decoder_last_pipeline_num_layers": 8, "pipeline_model_parallel_size": 1},
            ["needs --pipeline-model-parallel-size 2 or more"],
        ),
        (
            {"pipeline_model_parallel_layout": "Et*8L", "decoder_last_pipeline_num_layers": 2},
            ["--pipeline-model-parallel-layout and --decoder-last-pipeline-num-layers"],
        ),
        ({"pipeline_model_parallel_layout": "Et*8|||L"}, None),
        ({"pipeline_model_parallel_layout": "Et*8||L"}, ["3 stages", "size 4", "1, 3"]),
        ({"pipeline_model_parallel_layout": "Et*7|||L"}, ["has 7 t, but --num-layers is 8"]),
        ({"pipeline_model_parallel_layout": "Et*8|m||L"}, ["has 1 m, but --mtp-num-layers is 0"]),
        (
            {"pipeline_model_parallel_layout": "Et*7|m|t|L", "mtp_num_layers": 1},
            ["a t after an m"],
        ),
        ({"pipeline_model_parallel_layout": "|Et*8||L"}, ["begin with its only E"]),
        ({"pipeline_model_parallel_layout": "Et*8|E||L"}, ["only E; it has 2"]),
        ({"pipeline_model_parallel_layout": "Et*8|L||L"}, ["end with its only L; it has 2"]),
        ({"pipeline_model_parallel_layout": "Et*8|||"}, ["end with its only L; it has 0"]),
        (
            {
                "pipeline_model_parallel_layout": "Et*8|||L",
                "num_virtual_stages_per_pipeline_rank": 2,
            },
            ["has 4 stages, 1 for each", "2 asks for 8"],
        ),
    ],
)
def test_options_that_do_not_go_together_are_named_once(options, wanted):
    options = SplitOptions(**({"num_layers": 8, "pipeline_model_parallel_size": 4} | options))
    if wanted is None:
        assert is_the_model(split_layers(options), options.num_layers)
        return
    with pytest.raises(ConfigError) as error:
        split_layers(options)
    assert len(error.value.problems) == 1, str(error.value)
    assert all(text in str(error.value) for text in wanted), str(error.value)
