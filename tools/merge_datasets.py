"""Several ``.bin``/``.idx`` pairs to one, in the order given, with their sidecars."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.datasets.indexed_dataset import sidecar as sidecars
from megatron.core.datasets.indexed_dataset.builder import IndexedDatasetBuilder
from megatron.core.datasets.indexed_dataset.format import bin_path, idx_path, read_header
from megatron.core.datasets.indexed_dataset.locate import find_prefix
from megatron.core.datasets.indexed_dataset.sidecar import Sidecar
from megatron.core.errors import ConfigError, DataError
from tools.preprocessing import command_line

REFUSED = {"--multimodal": "datasets of tokens only"}
# Fields of a sidecar that add up, and those that must agree. Where the tokenizer is may differ,
# as long as its content (the fingerprint) does not.
COUNTS = ("documents", "sequences", "tokens")
SAME = ("vocab_size", "eod_id", "fingerprint", "append_eod", "dtype")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    args = _parse(argv)
    prefixes = _prefixes(args.input)
    output = args.output_prefix
    if Path(output).resolve() in [Path(prefix).resolve() for prefix in prefixes]:
        raise ConfigError(f"--output-prefix {output} is one of the --input datasets")
    merged = merged_sidecar(prefixes)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with IndexedDatasetBuilder(bin_path(output), _common_dtype(prefixes)) as builder:
        for prefix in prefixes:
            builder.add_index(prefix)
        sidecars.sidecar_path(output).unlink(missing_ok=True)
        builder.finalize(idx_path(output))
    if merged is not None:
        sidecars.write_sidecar(output, _moved(merged, prefixes[0], output))
    counts = f"{builder.num_documents} documents, {builder.num_tokens} tokens"
    print(f"Wrote {output}.bin, .idx{', .json' * (merged is not None)}: {counts}")


def merged_sidecar(prefixes: Sequence[str]) -> Sidecar | None:
    """Return the first dataset's sidecar with the counts of all; None if one has no sidecar.

    Raises:
        DataError: Two were made by different tokenizers or options; names the values.
    """
    found = {prefix: sidecars.read_sidecar(prefix) for prefix in prefixes}
    lacking = [prefix for prefix, one in found.items() if one is None]
    if lacking:
        notice = f"{lacking[0]} has no sidecar, so the merged dataset gets none"
        print(notice, file=sys.stderr)
    present = [(prefix, one) for prefix, one in found.items() if one is not None]
    for prefix, one in present[1:]:
        _check_same(present[0], (prefix, one))
    if lacking:
        return None
    sums = {name: sum(getattr(one, name) for _, one in present) for name in COUNTS}
    keys = {one.json_key for _, one in present}
    return dataclasses.replace(
        present[0][1], **sums, json_key=keys.pop() if len(keys) == 1 else None
    )


def _check_same(first: tuple[str, Sidecar], other: tuple[str, Sidecar]) -> None:
    for name in SAME:
        mine, theirs = getattr(first[1], name), getattr(other[1], name)
        if mine != theirs:
            raise DataError(
                f"{first[0]} and {other[0]} do not belong together: {name} is "
                f"{mine} in the first and {theirs} in the second"
            )


def _moved(sidecar: Sidecar, source: str, target: str) -> Sidecar:
    """Return the sidecar with the tokenizer's relative paths as seen from ``target``."""
    files = {
        role: sidecars.moved_file(file, source, target)
        for role, file in sidecar.tokenizer_files.items()
    }
    return dataclasses.replace(sidecar, tokenizer_files=files)


def _common_dtype(prefixes: Sequence[str]) -> str:
    names = {prefix: read_header(idx_path(prefix)).dtype.name for prefix in prefixes}
    first = prefixes[0]
    for prefix, name in names.items():
        if name != names[first]:
            raise DataError(f"{first} holds {names[first]}, {prefix} holds {name}: cannot merge")
    return names[first]


def _prefixes(inputs: Sequence[str]) -> list[str]:
    """Return the datasets that folders and prefixes name; those of a folder sorted."""
    prefixes: list[str] = []
    for name in inputs:
        if Path(name).is_dir():
            inside = sorted(str(path)[: -len(".idx")] for path in Path(name).glob("*.idx"))
            if not inside:
                raise DataError(f"--input {name} is a folder without any .idx file")
            prefixes += inside
        else:
            prefixes.append(find_prefix(name))
    twice = [prefix for prefix in prefixes if prefixes.count(prefix) > 1]
    if twice:
        raise ConfigError(f"--input names {twice[0]} twice")
    return prefixes


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ToolParser("Join datasets of tokens.")
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH",
        help="Folders of datasets, or prefixes; in this order.")  # fmt: skip
    add("--output-prefix", required=True, metavar="PATH", help="Writes PATH.bin, .idx and .json.")
    parser.refuse(REFUSED)
    return parser.parse_tool_args(argv)


if __name__ == "__main__":
    command_line.run_tool(main)
