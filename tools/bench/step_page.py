"""docs/benchmarks/step_cpu.md out of the tables of one run: every figure on it is from that run."""

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tools.bench.timing import machine

Table = Sequence[Mapping[str, Any]]


def write_page(path: Path, tables: Mapping[str, Table]) -> None:
    """Write the page to ``path``; a part that was not measured is not on it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = [_head(), *_steps(tables["step"]), *_roofline(tables["step_roofline"])]
    blocks += [*_products(tables["step_products"]), *_memory(tables["step_memory"])]
    path.write_text("\n\n".join(blocks) + "\n")


def _head() -> str:
    facts = machine()
    versions = ", ".join(
        f"{name} {found}" for name in ("transformers", "torchtitan") if (found := _version(name))
    )
    return (
        "# A training step of bench-S\n\n"
        "Written by `python tools/bench/step.py --markdown FILE`; all figures are of one run of "
        "it. "
        f"{facts['device']} ({facts['cpu_capability']}), {facts['threads']} thread(s), torch "
        f"{facts['torch']}{', ' + versions if versions else ''}.\n\n"
        "bench-S: 4 layers, hidden 512, 8 heads, ffn 1024 SwiGLU, 8 experts top-2, vocabulary "
        "8192, 4 samples of 512 tokens, AdamW, clip 1.0."
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _steps(rows: Table) -> list[str]:
    if not rows:
        return []
    text = (
        "## Against what others would use\n\n"
        "All start from the same weights (ours through the converter to Mixtral's names), train "
        "on "
        "the same new tokens, and take turns step by step. *ms*: processor time, median, with "
        "least and most in brackets. *ours*: how much faster ours is. *peak*, *own shape*, "
        "*known*: share of the limits below. Ours is what `pretrain_gpt.py` runs, its metrics "
        "included; in bf16 it keeps fp32 sums of gradients, main weights and moments, where the "
        "others have bf16 alone "
        '("pure bf16"). The others: their own model, torch\'s fused AdamW, its clipping.'
    )
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "dtype": lambda r: r["dtype"],
        "contender": lambda r: r["what"],
        "ms": lambda r: f"{r['step_ms']:.0f} ({r['low_ms']:.0f} to {r['high_ms']:.0f})",
        "tokens/s": lambda r: f"{r['tokens_per_s']:.0f}",
        "ours": lambda r: f"{r['ours_faster']:.2f}x",
        "GFLOP/s": lambda r: f"{r['gflops']:.0f}",
        "peak": lambda r: _share(r.get("share_of_peak")),
        "own shape": lambda r: _share(r.get("share_of_own_shape")),
        "known": lambda r: _share(r.get("share_of_known")),
        "loss before": lambda r: f"{r['loss']:.5f}",
    }
    counts = {row["parameters"] for row in rows}
    note = f"Parameters of each: {', '.join(f'{count:,}' for count in sorted(counts))}."
    return [text, _table(columns, rows), note]


def _roofline(rows: Table) -> list[str]:
    if not rows:
        return []
    text = (
        "## The least that a step costs here\n\n"
        "*peak*: matrix products at the best rate that any of them reaches over operands in the "
        "cache; attention as its products at that rate and its weights written and read once; "
        "other parts as their bytes at the rate of a copy, or as the fastest code where that is "
        "faster. "
        "*own shape*: each product at its own shape, over operands as far from the cache as in the "
        "step, and those of experts by ours where that is faster; attention by the fastest of ours "
        "and SDPA. *known*: other parts by the fastest code we know, alone. Milliseconds."
    )
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "dtype": lambda r: r["dtype"],
        "part": lambda r: r["part"],
        "work": lambda r: r["work"],
        "peak": lambda r: f"{r['peak_ms']:.1f}",
        "own shape": lambda r: f"{r['own_shape_ms']:.1f}",
        "known": lambda r: f"{r['known_ms']:.1f}",
        "by": lambda r: r["known_as"],
    }
    return [text, _table(columns, rows)]


def _products(rows: Table) -> list[str]:
    if not rows:
        return []
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "dtype": lambda r: r["dtype"],
        "product": lambda r: r["product"],
        "ms": lambda r: f"{r['ms']:.1f}",
        "GFLOP/s": lambda r: f"{r['gflops']:.0f}",
    }
    return ["## Products at their own shapes", _table(columns, rows)]


def _memory(rows: Table) -> list[str]:
    if not rows:
        return []
    text = (
        "## Memory of a step\n\n"
        "Each in a process of its own, MiB. *resident*: the most the process held during steps, "
        "above what it held before it built anything. *tensors*: the most that tensors held, by "
        "torch's profiler. *formula*: what `--dry-run` foretells: weights + gradients + "
        "optimizer + activations."
    )
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "dtype": lambda r: r["dtype"],
        "contender": lambda r: r["what"],
        "resident": lambda r: _mib(r.get("resident_mib")),
        "tensors": lambda r: _mib(r.get("tensors_mib")),
        "formula": _formula,
    }
    return [text, _table(columns, rows)]


def _formula(row: Mapping[str, Any]) -> str:
    if row.get("formula_mib") is None:
        return "-"
    parts = ("weights", "gradients", "optimizer", "activations")
    return f"{row['formula_mib']:.0f} = " + " + ".join(f"{row[f'{p}_mib']:.0f}" for p in parts)


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _table(columns: Mapping[str, Callable[[Mapping[str, Any]], str]], rows: Table) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in rows]
    return "\n".join(lines)
