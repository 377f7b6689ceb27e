"""The pages of a dry run as plain text, at most 120 columns wide."""

from collections.abc import Iterable, Iterator, Sequence

from megatron.core.pipeline_parallel.layer_homes import schedule_of
from megatron.training.config.run_config import RunConfig
from megatron.training.dry_run.census import Census, RankModel
from megatron.training.dry_run.matcher import describe
from megatron.training.dry_run.plan import Rehearsal
from megatron.training.dry_run.rank_groups import GroupTable
from megatron.training.dry_run.rank_text import group_text, ranges
from megatron.training.dry_run.traffic import Traffic, traffic_of

WIDTH = 120
GIB, MIB = 2**30, 2**20
_SMALL_WORLD = 16

PURPOSES = {
    "tp": "slices of matrices",
    "cp": "attention over shares of a sequence",
    "dp": "copies of the model",
    "pp": "stages",
    "tp_cp": "shares of a microbatch",
    "dp_cp": "dense gradients and weights, token counts",
    "tp_dp_cp": "gradients of what is copied over tp, router counts",
    "dp_cp_ends": "gradients of embeddings on both ends of the pipeline",
    "mp": "norm of dense gradients",
    "tp_ep_pp": "norm of expert gradients",
    "world": "loss, notes",
    "ep": "rows to experts and back",
    "expt_tp": "slices of experts",
    "expt_dp": "gradients and weights of experts",
    "tp_ep": "tokens for all experts, of --moe-token-dispatcher-type allgather",
    "ep_node": "rows within a node",
    "ep_across": "rows across nodes",
}


def columns(rows: Sequence[Sequence[object]], left: int = 1) -> list[str]:
    """Align rows of cells; the first ``left`` columns to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[n]) for row in cells) for n in range(len(cells[0]))]
    lines = []
    for row in cells:
        parts = [
            cell.ljust(width) if n < left else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(parts)).rstrip()[:WIDTH])
    return lines


def page(config: RunConfig, table: GroupTable, census: Census, rehearsal: Rehearsal) -> list[str]:
    """Return all sections of the report."""
    sections = (
        grid_section(table),
        model_section(census, table, config),
        memory_section(config, census, rehearsal, table),
        traffic_section(rehearsal, table),
        order_section(rehearsal),
    )
    return [line for section in sections for line in (*section, "")]


def grid_section(table: GroupTable) -> Iterator[str]:
    """Say which ranks share what."""
    layout = table.layout
    yield f"RANKS: {layout.world_size:,}"
    for title, grid in (("dense", layout.dense_grid()), ("expert", layout.expert_grid())):
        sizes = " x ".join(f"{axis} {size}" for axis, size in grid.items())
        yield f"  {title + ' grid':12} {sizes}   (fastest axis first)"
    rows: list[Sequence[object]] = [("group", "size", "groups", "that of rank 0", "is for")]
    for name, lists in table.lists.items():
        if len(lists[0]) == 1:
            continue
        same = table.canonical[name]
        purpose = PURPOSES[name] if same == name else f"same ranks as {same}"
        rows.append((name, len(lists[0]), len(lists), group_text(lists[0]), purpose))
    if len(rows) > 1:
        yield from _group_lines(rows)
    if 1 < layout.world_size <= _SMALL_WORLD:
        yield from _places(table)


def _group_lines(rows: Sequence[Sequence[object]]) -> Iterator[str]:
    widths = [max(len(str(row[n])) for row in rows) for n in range(4)]
    for name, size, count, ranks, purpose in rows:
        yield (
            f"  {name!s:{widths[0]}}  {size!s:>{widths[1]}}  {count!s:>{widths[2]}}  "
            f"{ranks!s:{widths[3]}}  {purpose}"
        )[:WIDTH]


def _places(table: GroupTable) -> list[str]:
    fields = ("tp", "cp", "dp", "pp", "expt_tp", "ep", "expt_dp")
    rows: list[Sequence[object]] = [("rank", *fields)]
    for rank in range(table.layout.world_size):
        groups = table.collection(rank)
        rows.append((rank, *(getattr(groups, name).rank() for name in fields)))
    return ["  places:", *columns(rows)]


def model_section(census: Census, table: GroupTable, config: RunConfig) -> Iterator[str]:
    """Say which layers, experts and parameters lie where."""
    whole = census.whole
    active = ""
    if whole.expert_params:
        experts, met = f"{whole.expert_params:,}", f"{whole.active_params:,}"
        active = f" ({experts} of them in experts), {met} for a token"
    dtype = config.model.params_dtype_name
    yield f"MODEL: {whole.params:,} parameters{active}; weights are {dtype}"
    for sentence in whole.missing:
        yield f"  MISSING: {sentence}"
    rows: list[Sequence[object]] = [
        ("stage", "ranks", "layers", "dense", "MoE", "experts a rank", "also", "parameters a rank")
    ]
    for models in stages(census, table):
        first = models[0]
        moe = [count for count in first.experts if count]
        rows.append(
            (
                table.collection(first.rank).pp.rank(),
                ranges(model.rank for model in models),
                ranges(first.layers) or "-",
                len(first.layers) - len(moe),
                len(moe),
                ", ".join(map(str, sorted(set(moe)))) or "-",
                ", ".join(first.parts) or "-",
                f"{first.params:,}",
            )
        )
    yield from columns(rows, left=3)


def stages(census: Census, table: GroupTable) -> list[list[RankModel]]:
    """Return the ranks that hold the same layers and as many parameters, stage by stage."""
    found: dict[object, list[RankModel]] = {}
    for model in census.ranks:
        stage = table.collection(model.rank).pp.rank()
        found.setdefault((stage, model.layers, model.parts, model.params), []).append(model)
    return list(found.values())


def memory_section(
    config: RunConfig, census: Census, rehearsal: Rehearsal, table: GroupTable
) -> Iterator[str]:
    """Say how much memory each stage needs, and which rank most."""
    kept = kept_microbatches(config, table)
    yield "MEMORY of a rank in GiB (tensors; no room for the allocator, kernels or buffers of NCCL)"
    names = ("weights", "gradients", "optimizer", "activations")
    rows: list[Sequence[object]] = [("stage", "ranks", *names, "total", "microbatches kept")]
    for ranks in same_memory(rehearsal, table):
        use, stage = rehearsal.of(ranks[0]).memory, table.collection(ranks[0]).pp.rank()
        figures = (f"{size / GIB:.3f}" for size in (*use, use.total))
        rows.append((stage, ranges(ranks), *figures, f"{kept[stage]:g}"))
    yield from columns(rows, left=2)
    yield f"  optimizer: {optimizer_text(config)}"
    yield f"  activations: {recompute_text(config)}; routing is taken as even"
    rank = largest_rank(rehearsal)
    yield from largest(census, rehearsal, kept[table.collection(rank).pp.rank()])


def kept_microbatches(config: RunConfig, table: GroupTable) -> list[float]:
    """Return for each stage how many microbatches' activations it keeps at most."""
    count = config.training.global_batch_size // config.training.micro_batch_size
    schedule = schedule_of(config.model, count // table.layout.dense_grid()["dp"])
    return [peak / schedule.chunks for peak in schedule.peak_activations()]


def optimizer_text(config: RunConfig) -> str:
    """Say what the optimizer keeps of an element, and where."""
    wide = config.model.params_dtype_name not in ("bfloat16", "float16")
    adam = config.optimizer.optimizer == "adam"
    moments = 2 if adam else int(config.optimizer.sgd_momentum > 0)
    parts = [] if wide else ["main weights in fp32"]
    parts += [f"{moments} moment{'s' if moments > 1 else ''}"] if moments else []
    where = "on every data rank"
    if config.ddp.use_distributed_optimizer:
        where = "shared out over data ranks (--use-distributed-optimizer)"
    return f"{config.optimizer.optimizer}, {' and '.join(parts) or 'nothing'} {where}"


def recompute_text(config: RunConfig) -> str:
    """Say what is computed again in backward."""
    model = config.model
    if model.recompute_granularity is None:
        return "nothing is recomputed"
    if model.recompute_granularity == "selective":
        return f"recomputed: {', '.join(sorted(model.recomputed_modules))}"
    return f"recomputed: whole layers ({model.recompute_method} {model.recompute_num_layers})"


def same_memory(rehearsal: Rehearsal, table: GroupTable) -> list[list[int]]:
    """Return the ranks of a stage that need the same."""
    found: dict[object, list[int]] = {}
    for rank in range(len(rehearsal.stands_for)):
        key = (table.collection(rank).pp.rank(), rehearsal.of(rank).memory)
        found.setdefault(key, []).append(rank)
    return list(found.values())


def largest(census: Census, rehearsal: Rehearsal, kept: float) -> Iterator[str]:
    """Name the rank that needs most, and what makes it so."""
    rank = largest_rank(rehearsal)
    use, model = rehearsal.of(rank).memory, census.ranks[rank]
    parts = {
        "activations": use.activations,
        "optimizer state": use.optimizer,
        "gradients": use.gradients,
        "weights": use.weights,
    }
    most = max(parts, key=lambda name: parts[name])
    share = 100 * parts[most] / max(use.total, 1)
    more = f" and {', '.join(model.parts)}" if model.parts else ""
    count = len(model.layers)
    held = f"{count} layer{'s' if count != 1 else ''}{more}"
    yield (f"  largest: rank {rank} with {use.total / GIB:.3f} GiB, of which {most}: {share:.0f} %")
    yield f"  it holds {held}, and keeps {kept:g} microbatch{'es' if kept != 1 else ''}"


def largest_rank(rehearsal: Rehearsal) -> int:
    """Return the first rank that needs the most memory."""
    totals = [rehearsal.of(rank).memory.total for rank in range(len(rehearsal.stands_for))]
    return totals.index(max(totals))


def fits(rehearsal: Rehearsal, limit_gib: float) -> tuple[bool, str]:
    """Say whether the largest rank fits into ``limit_gib``."""
    need = rehearsal.of(largest_rank(rehearsal)).memory.total / GIB
    ok = need <= limit_gib
    verdict = "fits into" if ok else "does NOT fit into"
    return ok, f"--dry-run-memory-gib {limit_gib:g}: {need:.3f} GiB {verdict} it"


def traffic_section(rehearsal: Rehearsal, table: GroupTable) -> Iterator[str]:
    """Say how much each kind of rank sends in a step."""
    yield "COMMUNICATION of a rank in one step (sent: by ring algorithms, in MiB)"
    rows: list[Sequence[object]] = [
        ("ranks", "group", "op", "dtype", "size", "calls", "MiB handed over", "MiB sent")
    ]
    for ranks, traffic in same_traffic(rehearsal):
        for row in traffic:
            rows.append(
                (
                    ranges(ranks, most=2),
                    row.group,
                    row.op,
                    row.dtype,
                    row.ranks,
                    row.calls,
                    f"{row.payload_bytes / MIB:,.3f}",
                    f"{row.sent_bytes / MIB:,.3f}",
                )
            )
    if len(rows) == 1:
        yield "  none: one rank talks to nobody"
        return
    yield from columns(rows, left=4)


def same_traffic(rehearsal: Rehearsal) -> Iterable[tuple[list[int], list[Traffic]]]:
    """Return the ranks that send the same, and what."""
    by_step = {
        rank: tuple(row for row in traffic_of(step.events) if row.ranks > 1)
        for rank, step in rehearsal.steps.items()
    }
    found: dict[tuple[Traffic, ...], list[int]] = {}
    for rank, recorded in enumerate(rehearsal.stands_for):
        found.setdefault(by_step[recorded], []).append(rank)
    return [(ranks, list(traffic)) for traffic, ranks in found.items()]


def order_section(rehearsal: Rehearsal) -> Iterator[str]:
    """Say whether the ranks' collectives go together."""
    total = sum(len(rehearsal.of(rank).events) for rank in range(len(rehearsal.stands_for)))
    yield (
        f"ORDER OF COLLECTIVES: {total:,} calls and waits of {len(rehearsal.stands_for):,} ranks"
    )
    yield f"  run: {rehearsal.closeness.sentence()}"
    if rehearsal.problem is None:
        yield "  no deadlock: every rank comes to the end of the step, and nothing is left over"
        return
    yield from (f"  {line}"[:WIDTH] for line in describe(rehearsal.problem))
