"""The models and layouts of the resharding proof, as options of pretrain_gpt.py. Pure.

All layouts of a model train the same mathematics: the global batch, the padded vocabulary and the
scope of balance losses (a sequence) do not depend on them. The microbatch size does, on purpose.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megatron.core.errors import ConfigError
from megatron.training.config.flags import read_command_line
from megatron.training.config.options import options_of
from megatron.training.config.resolve import resolve
from megatron.training.config.run_config import RunConfig

_SHARED = """
    --num-layers 4 --hidden-size 16 --num-attention-heads 4 --ffn-hidden-size 24 --swiglu
    --num-experts 8 --moe-layer-freq [0,1,0,1] --moe-router-topk 2
    --moe-router-score-function sigmoid --moe-z-loss-coeff 0.001
    --moe-shared-expert-intermediate-size 16
    --moe-shared-expert-gate --init-method-std 0.2 --hidden-dropout 0.1 --attention-dropout 0.1
    --seq-length 12 --mock-data --tokenizer-type NullTokenizer --vocab-size 63
    --padded-vocab-size 64 --global-batch-size 12 --train-iters 8
    --lr 0.01 --min-lr 0.001 --lr-decay-style cosine --lr-warmup-iters 3
    --adam-eps 0.001 --clip-grad 0.1 --start-weight-decay 0.05 --end-weight-decay 0.2
    --weight-decay-incr-style linear
"""
# eps is well above rounding: Adam divides tiny gradients by their size
SAVED_AT, MORE_STEPS = 2, 3
"""Steps before the checkpoint, and steps from it."""


class Layout(NamedTuple):
    """One way to spread a model over ranks."""

    name: str
    ranks: int
    words: tuple[str, ...]
    """Options, as typed."""


@dataclass(frozen=True)
class Model:
    """A model and its layouts; a checkpoint of one of them fits every other."""

    name: str
    words: tuple[str, ...]
    """Options of the model, as typed."""
    layouts: tuple[Layout, ...]
    """The first is one process, which all others are held against."""
    is_exact: bool
    """Steps of different layouts are compared: fp64, where rounding hides nothing."""

    def config(self, layout: Layout) -> RunConfig:
        """Resolve the options of a run by the rules of the configuration.

        Raises:
            ConfigError: The rules refuse the layout.
        """
        options = options_of(RunConfig)
        given = read_command_line([*self.words, *layout.words], options)
        return resolve({"cli": given}, options, layout.ranks)

    def layout(self, name: str) -> Layout:
        """Return the layout of a name.

        Raises:
            ConfigError: There is none.
        """
        for layout in self.layouts:
            if layout.name == name:
                return layout
        known = "; ".join(layout.name for layout in self.layouts)
        raise ConfigError(f"{self.name} has no layout {name!r}; it has: {known}")


_TP, _PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
_EP, _ETP = "--expert-model-parallel-size", "--expert-tensor-parallel-size"
_SHORT = {
    "tp2": f"{_TP} 2",
    "tp4": f"{_TP} 4",
    "sp": "--sequence-parallel",
    "cp2": "--context-parallel-size 2",
    "pp2": f"{_PP} 2",
    "pp3": f"{_PP} 3 --pipeline-model-parallel-layout Et|tt|tL",
    "pp4": f"{_PP} 4",
    "vpp2": "--num-virtual-stages-per-pipeline-rank 2",
    "uneven": "--decoder-first-pipeline-num-layers 1",
    "dualpipev": "--pipeline-schedule dualpipev",
    "dp2": "",
    "dp3": "",
    "dp4": "",
    "ep2": f"{_EP} 2",
    "ep4": f"{_EP} 4",
    "ep8": f"{_EP} 8",
    "etp1": f"{_ETP} 1",
    "etp2": f"{_ETP} 2",
    "zero1": "--use-distributed-optimizer",
    "overlap": "--overlap-param-gather --overlap-grad-reduce --ddp-bucket-size 700",
    "zero3": "--use-torch-fsdp2",
    "sequential": "--moe-experts-type sequential",
}
"""Word of a layout's name -> options. Data ranks are what is left of the ranks."""

# name, ranks, samples of a microbatch
_LAYOUTS = """
one                               | 1 | 6
dp3 zero1                         | 3 | 2
dp3 zero3                         | 3 | 4
dp2 ep2 zero3                     | 2 | 3
cp2 dp2 ep4 zero3 sequential      | 4 | 3
tp2 sp sequential                 | 2 | 6
tp4 sp ep2 etp2 zero1             | 4 | 6
tp4 ep4 etp1                      | 4 | 4
dp4 ep2 etp2                      | 4 | 3
cp2 dp2 ep4 zero1 overlap         | 4 | 6
pp2 uneven cp2 ep2                | 4 | 3
pp3                               | 3 | 4
pp4 sequential                    | 4 | 6
pp2 vpp2 dp2 ep2 zero1            | 4 | 3
pp2 dualpipev dp2 ep2             | 4 | 1
tp2 sp pp2 dp2 ep4 etp1 zero1     | 8 | 6
tp2 sp cp2 pp2 vpp2 ep2 etp2      | 8 | 6
tp2 sp dp4 ep8 etp1 zero1         | 8 | 3
"""
# prices of quantile balancing are means over microbatches: all must have as many samples
_OF_UNTIED = """
one                               | 1 | 3
dp4 ep2 etp2 zero1 overlap        | 4 | 3
dp2 ep2 zero3                     | 2 | 3
tp4 sp ep2 etp2 zero1             | 4 | 3
pp2 vpp2 dp2 ep2 zero1            | 4 | 3
pp2 uneven cp2 ep2                | 4 | 3
pp4 sequential                    | 4 | 3
tp2 sp cp2 ep4 etp1 sequential    | 4 | 3
"""
_OF_BF16 = """
one                               | 1 | 6
dp3 zero1 overlap                 | 3 | 2
dp3 zero3                         | 3 | 4
dp2 ep2 zero3                     | 2 | 3
tp2 sp sequential                 | 2 | 6
tp4 sp ep2 etp2 zero1             | 4 | 6
pp4 sequential                    | 4 | 6
pp2 vpp2 dp2 ep2 zero1            | 4 | 3
tp2 sp pp2 dp2 ep4 etp1 zero1     | 8 | 6
"""
_OF_FP16 = """
one                               | 1 | 6
dp3 zero1 overlap                 | 3 | 2
dp2 ep2 zero3                     | 2 | 3
tp4 sp ep2 etp2 zero1             | 4 | 6
pp2 vpp2 dp2 ep2 zero1            | 4 | 3
"""
_SCALED = "--fp16 --initial-loss-scale 65536 --loss-scale-window 4 --hysteresis 2"
_BIASED = """
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.02
    --moe-router-enable-expert-bias --moe-router-bias-update-rate 0.01
"""
_OTHERWISE = """
    --moe-router-load-balancing-type quantile_balancing --untie-embeddings-and-output-weights
    --group-query-attention --num-query-groups 2 --position-embedding-type rope
    --normalization RMSNorm --disable-bias-linear --add-qkv-bias
    --moe-latent-size 8 --moe-num-experts-per-layer [0,8,0,4]
"""


def _layouts(table: str) -> tuple[Layout, ...]:
    return tuple(_layout(*line.split("|")) for line in table.strip().splitlines())


def _layout(name: str, ranks: str, samples: str) -> Layout:
    words = " ".join(_SHORT[word] for word in name.split() if word != "one")
    return Layout(name.strip(), int(ranks), (*words.split(), "--micro-batch-size", samples.strip()))


_WORDS = (*_SHARED.split(), *_BIASED.split())
TIED = Model("tied", (*_WORDS, "--fp64"), _layouts(_LAYOUTS), is_exact=True)
UNTIED = Model(
    "untied", (*_SHARED.split(), "--fp64", *_OTHERWISE.split()), _layouts(_OF_UNTIED), is_exact=True
)
BF16 = Model("bf16", (*_WORDS, "--bf16"), _layouts(_OF_BF16), is_exact=False)
FP16 = Model("fp16", (*_WORDS, *_SCALED.split()), _layouts(_OF_FP16), is_exact=False)
MODELS = {model.name: model for model in (TIED, UNTIED, BF16, FP16)}


def _both_ways(text: str) -> tuple[tuple[str, str], ...]:
    found = [tuple(name.strip() for name in line.split("<->")) for line in text.splitlines()]
    both = [pair for one in found if len(one) == 2 for pair in (one, one[::-1])]
    return tuple((a, b) for a, b in both)


QUICK = {
    "tied": _both_ways("""
        dp2 ep2 zero3      <-> pp2 vpp2 dp2 ep2 zero1
        dp2 ep2 zero3      <-> tp2 sp sequential
        pp2 uneven cp2 ep2 <-> tp2 sp sequential
    """),
    "untied": _both_ways("tp4 sp ep2 etp2 zero1 <-> dp2 ep2 zero3"),
    "bf16": _both_ways("dp3 zero1 overlap <-> dp2 ep2 zero3"),
    "fp16": _both_ways("tp4 sp ep2 etp2 zero1 <-> dp2 ep2 zero3"),
}
"""Pairs for every day: every one of ``AXES`` changes in both directions."""


def refusals() -> dict[str, str]:
    """Return what the rules say to layouts that none of the models can have: name -> reasons."""
    tried = {
        "zero3 tp2": "zero3 tp2 | 4 | 3",
        "zero3 pp2": "zero3 pp2 | 4 | 3",
        "zero3 etp2": "zero3 etp2 | 4 | 3",
    }
    return {name: _reasons(_layout(*line.split("|"))) for name, line in tried.items()}


def _reasons(layout: Layout) -> str:
    try:
        TIED.config(layout)
    except ConfigError as error:
        return "; ".join(error.problems)
    return ""


AXES = ("ranks", "tp", "sp", "pp", "vpp", "split", "ep", "etp", "cp", "dp", "zero", "bank", "batch")


def sizes_of(config: RunConfig, ranks: int) -> dict[str, object]:
    """Return what a resolved layout is on each of ``AXES``."""
    model, ddp = config.model, config.ddp
    grid = model.layout(ranks)
    stages = (model.decoder_first_pipeline_num_layers, model.pipeline_model_parallel_layout)
    return {
        "ranks": ranks,
        "tp": grid.tp,
        "sp": model.sequence_parallel,
        "pp": grid.pp,
        "vpp": (model.num_virtual_stages_per_pipeline_rank, model.pipeline_schedule),
        "split": stages,
        "ep": grid.ep,
        "etp": grid.expert_tp,
        "cp": grid.cp,
        "dp": grid.dense_grid()["dp"],
        "zero": 3 if ddp.use_torch_fsdp2 else int(ddp.use_distributed_optimizer),
        "bank": model.moe_experts_type,
        "batch": config.training.micro_batch_size,
    }


def unchanged_axes(
    sizes: Mapping[str, Mapping[str, object]], pairs: Iterable[tuple[str, str]]
) -> list[str]:
    """Return the axes that ``pairs`` do not change in both directions.

    Args:
        sizes: Layout -> ``sizes_of``.
        pairs: (saved at, loaded at).
    """
    changes = {
        (axis, repr(sizes[a][axis]), repr(sizes[b][axis])) for a, b in pairs for axis in AXES
    }
    both = {axis for axis, old, new in changes if old != new and (axis, new, old) in changes}
    return [axis for axis in AXES if axis not in both]
