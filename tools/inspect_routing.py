"""What a routing trace says: tokens of each expert, how layers agree, load over time."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.errors import BackendError, DataError
from megatron.core.tokenizers.build_tokenizer import build_tokenizer
from megatron.core.transformer.moe.router_trace_files import RoutingTrace, StepTrace, no_expert
from tools.preprocessing import command_line


class ExpertTokens(NamedTuple):
    """How often each id went where, in one layer."""

    counts: NDArray[np.int64]
    """[num_experts, ids]: tokens of an id that chose an expert."""
    seen: NDArray[np.int64]
    """[ids]: tokens of an id."""

    def top(self, expert: int, most: int) -> list[tuple[int, int, float]]:
        """Return (id, tokens at ``expert``, share of all tokens of that id), most tokens first."""
        order = np.argsort(-self.counts[expert], kind="stable")[:most]
        return [
            (int(i), int(self.counts[expert, i]), float(self.counts[expert, i] / self.seen[i]))
            for i in order
            if self.counts[expert, i]
        ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    args = _parse(argv)
    trace = RoutingTrace(args.folder)
    steps = [s for s in trace.steps if args.first_step <= s <= (args.last_step or s)]
    if not steps:
        raise DataError(f"{args.folder} has no step in that range; it has {_shown(trace.steps)}")
    layers = trace.moe_layers if args.layer is None else args.layer
    if unknown := sorted(set(layers) - set(trace.moe_layers)):
        raise DataError(f"layer {unknown[0]} has no experts; MoE layers are {trace.moe_layers}")
    show = _text_of(args)
    print(f"trace   {args.folder}")
    print(f"steps   {_shown(steps)}")
    print(f"layers  {', '.join(map(str, trace.moe_layers))}")
    for layer in layers:
        _show_layer(trace, steps, layer, args, show)
    _show_agreement(trace, steps)
    _show_load(trace, steps)
    if args.plot:
        plot_load(trace, steps, Path(args.plot))


def valid_choices(part: StepTrace, layer: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return (token ids [n], experts [n, topk]) of all tokens that are no padding."""
    valid = ~part.padding
    return part.tokens[valid], part.experts[layer][valid]


def expert_tokens(trace: RoutingTrace, steps: Sequence[int], layer: int) -> ExpertTokens:
    """Count ids by expert."""
    num_experts = trace.num_experts(layer)
    counts = np.zeros((num_experts, 0), dtype=np.int64)
    seen = np.zeros(0, dtype=np.int64)
    for step in steps:
        tokens, experts = valid_choices(trace.read(step), layer)
        width = max(int(tokens.max(initial=0)) + 1, len(seen))
        seen = np.pad(seen, (0, width - len(seen))) + np.bincount(tokens, minlength=width)
        counts = np.pad(counts, ((0, 0), (0, width - counts.shape[1])))
        for column in experts.T:
            there = column != no_expert(column.dtype)
            flat = column[there].astype(np.int64) * width + tokens[there]
            counts += np.bincount(flat, minlength=num_experts * width).reshape(counts.shape)
    return ExpertTokens(counts, seen)


def agreement(trace: RoutingTrace, steps: Sequence[int], first: int, second: int) -> float:
    """Return what the first expert of a token in one layer tells of that in another, in nats.

    Mutual information over all tokens: 0 when layers choose independently, at most the logarithm
    of the smaller number of experts.
    """
    joint = np.zeros((trace.num_experts(first), trace.num_experts(second)), dtype=np.int64)
    for step in steps:
        part = trace.read(step)
        mine = valid_choices(part, first)[1][:, 0]
        other = valid_choices(part, second)[1][:, 0]
        both = (mine != no_expert(mine.dtype)) & (other != no_expert(other.dtype))
        np.add.at(joint, (mine[both], other[both]), 1)
    share = joint / max(joint.sum(), 1)
    expected = share.sum(1, keepdims=True) * share.sum(0, keepdims=True)
    there = share > 0
    return float((share[there] * np.log(share[there] / expected[there])).sum())


def load(trace: RoutingTrace, step: int, layer: int) -> NDArray[np.int64]:
    """Return the tokens of each expert in one step, [num_experts], without padding."""
    chosen = valid_choices(trace.read(step), layer)[1].ravel()
    chosen = chosen[chosen != no_expert(chosen.dtype)]
    return np.bincount(chosen, minlength=trace.num_experts(layer))


def places(
    trace: RoutingTrace, steps: Sequence[int], layer: int, expert: int
) -> Iterator[tuple[int, int, int, int, float]]:
    """Yield (step, sample, position, id, weight) of each token that chose ``expert``."""
    for step in steps:
        part = trace.read(step)
        chose = (part.experts[layer] == expert) & ~part.padding[:, :, None]
        for row, position, column in np.argwhere(chose).tolist():
            yield (
                step,
                int(part.sample_ids[row]),
                position,
                int(part.tokens[row, position]),
                float(part.weights[layer][row, position, column]),
            )


def plot_load(trace: RoutingTrace, steps: Sequence[int], path: Path) -> None:
    """Draw for each MoE layer the share of each expert over the steps.

    Raises:
        BackendError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendError("--plot needs matplotlib: pip install matplotlib") from error
    layers = trace.moe_layers
    figure = Figure(figsize=(9, 1.2 + 1.8 * len(layers)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for place, layer in enumerate(layers):
        counts = np.stack([load(trace, step, layer) for step in steps], axis=1)
        share = counts / np.maximum(counts.sum(0), 1) * len(counts)
        axes = figure.add_subplot(len(layers), 1, place + 1)
        image = axes.imshow(
            share, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest",
            extent=(steps[0] - 0.5, steps[-1] + 0.5, len(counts) - 0.5, -0.5),
        )  # fmt: skip
        axes.set_ylabel(f"layer {layer}\nexpert", fontsize=8)
    axes.set_xlabel("step", fontsize=8)
    figure.colorbar(image, ax=figure.axes, label="tokens, in multiples of the mean", fraction=0.03)
    figure.savefig(path)
    print(f"plot    {path}")


def _show_layer(
    trace: RoutingTrace,
    steps: Sequence[int],
    layer: int,
    args: argparse.Namespace,
    show: Callable[[int], str],
) -> None:
    found = expert_tokens(trace, steps, layer)
    total = max(int(found.counts.sum()), 1)
    experts = range(trace.num_experts(layer)) if args.expert is None else args.expert
    print(f"\nlayer {layer}: ids of each expert, with the share of an id's tokens that chose it")
    for expert in experts:
        if not 0 <= expert < trace.num_experts(layer):
            raise DataError(
                f"--expert {expert}: layer {layer} has experts 0 to {trace.num_experts(layer) - 1}"
            )
        top = found.top(expert, args.top)
        text = "  ".join(f"{show(i)} x{count} ({share:.0%})" for i, count, share in top)
        print(f"  expert {expert:>3} {found.counts[expert].sum() / total:6.1%}  {text}")
        if args.examples:
            shown = list(_first(places(trace, steps, layer, expert), args.examples))
            for step, sample, position, token, weight in shown:
                print(
                    f"      step {step} sample {sample} position {position}: {show(token)} "
                    f"weight {weight:.3f}"
                )


def _show_agreement(trace: RoutingTrace, steps: Sequence[int]) -> None:
    if len(trace.moe_layers) < 2:
        return
    print("\nwhat the first expert in a layer tells of that in the next MoE layer")
    for first, second in zip(trace.moe_layers, trace.moe_layers[1:], strict=False):
        most = np.log(min(trace.num_experts(first), trace.num_experts(second)))
        nats = agreement(trace, steps, first, second)
        print(f"  layers {first} and {second}: {nats:.3f} of {most:.3f} nats")


def _show_load(trace: RoutingTrace, steps: Sequence[int]) -> None:
    shown = [steps[n] for n in np.unique(np.linspace(0, len(steps) - 1, 8).round().astype(int))]
    print("\nbusiest expert over the mean, minus 1")
    print("  step    " + "".join(f"{step:>9}" for step in shown))
    for layer in trace.moe_layers:
        loads = [load(trace, step, layer) for step in shown]
        text = "".join(f"{x.max() * len(x) / max(x.sum(), 1) - 1:>+9.1%}" for x in loads)
        print(f"  layer {layer:<3}" + text)


def _first(items: Iterator[Any], most: int) -> Iterator[Any]:
    return (item for _, item in zip(range(most), items, strict=False))


def _shown(steps: Sequence[int]) -> str:
    return f"{len(steps)}: {steps[0]} to {steps[-1]}" if steps else "none"


def _text_of(args: argparse.Namespace) -> Callable[[int], str]:
    """Return what shows an id: its text with a tokenizer, else the number."""
    if not args.tokenizer_type:
        return str
    tokenizer = build_tokenizer(command_line.tokenizer_settings_of(args))
    return lambda number: repr(tokenizer.detokenize([number]))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ToolParser("Show which tokens went to which experts.")
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="As of --moe-routing-trace-path.")
    add("--layer", type=int, nargs="+", metavar="L", help="MoE layers to show; all when not set.")
    add("--expert", type=int, nargs="+", metavar="E", help="Experts to show; all when not set.")
    add("--first-step", type=int, default=1, metavar="N", help="First step to read.")
    add("--last-step", type=int, metavar="N", help="Last step to read; the last when not set.")
    add("--top", type=command_line.positive, default=8, metavar="N",
        help="Ids shown of each expert.")  # fmt: skip
    add("--examples", type=int, default=0, metavar="N",
        help="Places (step, sample, position) shown of each expert.")  # fmt: skip
    add("--plot", metavar="FILE", help="Draw the load of experts over time; needs matplotlib.")
    command_line.add_tokenizer_flags(parser, required=False)
    return parser.parse_tool_args(argv)


if __name__ == "__main__":
    command_line.run_tool(main)
