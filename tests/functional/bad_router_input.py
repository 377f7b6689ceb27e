"""Mistakes about the choice of experts: command lines and what the message must say."""

_MOE = "--num-layers 4 --hidden-size 64 --mock-data --num-experts 8"
_TYPE = "--moe-router-load-balancing-type"

# as in bad_input.py
ROUTER_CASES: dict[str, tuple[int, str, list[str]]] = {
    "softmax without division": (
        1,
        f"{_MOE} --no-moe-router-norm-topk-prob",
        ["needs --moe-router-score-function sigmoid or sqrtsoftplus; with softmax give --moe-rout"],
    ),
    "expert choice without division": (
        1,
        f"{_MOE} --moe-router-type expert_choice --moe-router-score-function sigmoid "
        "--moe-aux-loss-coeff 0 --no-moe-router-norm-topk-prob",
        ["--no-moe-router-norm-topk-prob has no effect with --moe-router-type expert_choice"],
    ),
    "judges without groups": (
        1,
        f"{_MOE} --moe-router-group-score-topk 2",
        ["--moe-router-group-score-topk 2 needs groups of experts: add --moe-router-num-groups"],
    ),
    "more judges than experts of a group": (
        1,
        f"{_MOE} --moe-router-num-groups 4 --moe-router-group-topk 2 "
        "--moe-router-group-score-topk 3",
        ["--moe-router-group-score-topk 3 must not be larger than a group of 2 experts"],
    ),
    "0 judges": (
        1,
        f"{_MOE} --moe-router-num-groups 4 --moe-router-group-topk 2 "
        "--moe-router-group-score-topk 0",
        ["--moe-router-group-score-topk 0 must be at least 1"],
    ),
    "too many experts for the groups": (
        1,
        f"{_MOE} --moe-router-num-groups 4 --moe-router-group-topk 1 --moe-router-topk 3 "
        "--moe-router-group-score-topk 1",
        ["--moe-router-topk 3 does not fit in --moe-router-group-topk 1 groups of 2 experts"],
    ),
    "router bias of a dense model": (
        1,
        "--num-layers 4 --hidden-size 64 --mock-data --moe-router-bias "
        "--no-moe-router-norm-topk-prob",
        ["--moe-router-bias, --no-moe-router-norm-topk-prob need a MoE layer: add --num-experts"],
    ),
    "sinkhorn and a loss": (1, f"{_MOE} {_TYPE} aux_loss sinkhorn", ["sinkhorn excludes the oth"]),
    "quantiles and a loss": (
        1,
        f"{_MOE} {_TYPE} seq_aux_loss quantile_balancing",
        ["quantile_balancing excludes the others"],
    ),
    "coefficient of sinkhorn": (
        1,
        f"{_MOE} {_TYPE} sinkhorn --moe-aux-loss-coeff 0.01",
        ["sinkhorn has no loss: leave out --moe-aux-loss-coeff 0.01, or give 0"],
    ),
    "sinkhorn with weights of others": (
        1,
        f"{_MOE} {_TYPE} sinkhorn --moe-router-pre-softmax --moe-router-topk-scaling-factor 2",
        ["be combined with --moe-router-pre-softmax, --moe-router-topk-scaling-factor: it spreads"],
    ),
    "sinkhorn of sigmoids": (
        1,
        f"{_MOE} {_TYPE} sinkhorn --moe-router-score-function sigmoid",
        ["sinkhorn cannot be combined with --moe-router-score-function"],
    ),
    "sinkhorn with a capacity": (
        1,
        f"{_MOE} {_TYPE} sinkhorn --moe-expert-capacity-factor 1.5",
        ["sinkhorn cannot be combined with --moe-expert-capacity-factor: it spreads tokens"],
    ),
    "quantiles with a bias and groups": (
        1,
        f"{_MOE} {_TYPE} quantile_balancing --moe-router-score-function sigmoid "
        "--moe-router-enable-expert-bias --moe-router-num-groups 4 --moe-router-group-topk 2",
        ["be combined with --moe-router-enable-expert-bias, --moe-router-num-groups"],
    ),
    "quantiles of all experts": (
        1,
        f"{_MOE} {_TYPE} quantile_balancing --moe-router-topk 8",
        ["needs --moe-router-topk 8 to be less than --num-experts 8"],
    ),
    "average of no quantiles": (
        1,
        f"{_MOE} --moe-router-quantile-balancing-ema 0.5",
        ["no effect without --moe-router-load-balancing-type quantile_balancing"],
    ),
    "average that never moves": (
        1,
        f"{_MOE} {_TYPE} quantile_balancing --moe-router-quantile-balancing-ema 1",
        ["must be at least 0 and below 1"],
    ),
    "skew of 0": (1, f"{_MOE} --moe-router-force-biased 0", ["skews nothing"]),
    "skew of a million": (1, f"{_MOE} --moe-router-force-biased 1e6", ["at most 1000"]),
    "even and skewed": (
        1,
        f"{_MOE} --moe-router-force-biased 1 --moe-router-force-load-balancing",
        ["exclude each other"],
    ),
    "replay of a dense model": (
        1,
        "--num-layers 4 --hidden-size 64 --mock-data --moe-enable-routing-replay",
        ["--moe-enable-routing-replay needs a MoE layer"],
    ),
}
