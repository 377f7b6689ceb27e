"""What is in a ``.bin``/``.idx`` pair: counts, lengths, checksums, a decoded sample."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.datasets.indexed_dataset import sidecar as sidecars
from megatron.core.datasets.indexed_dataset.format import bin_path, idx_path
from megatron.core.datasets.indexed_dataset.locate import find_prefix
from megatron.core.datasets.indexed_dataset.reader import IndexedDataset
from megatron.core.datasets.indexed_dataset.sidecar import Sidecar
from megatron.core.errors import DataError, MegatronError
from megatron.core.tokenizers.base import Tokenizer, sha256_of
from megatron.core.tokenizers.build_tokenizer import build_tokenizer
from tools.preprocessing import command_line

BAR_WIDTH = 40
DOCUMENTS_AT_ONCE = 4096


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    args = _parse(argv)
    prefix = find_prefix(args.input)
    dataset = IndexedDataset(prefix)
    dataset.verify()
    sidecar = sidecars.read_sidecar(prefix)
    tokenizer = _tokenizer(args, prefix, sidecar)
    _show_counts(dataset, sidecar)
    _show_lengths(document_lengths(dataset))
    _show_ids(dataset, tokenizer.vocab_size if tokenizer else None)
    if args.checksum:
        for path in (bin_path(prefix), idx_path(prefix)):
            print(f"sha256 {sha256_of(path)}  {path}")
    for document in args.document:
        _show_document(dataset, document, tokenizer, args.max_tokens)


def document_lengths(dataset: IndexedDataset) -> np.ndarray:
    """Return the tokens of each document, int64 [documents]."""
    ends = np.cumsum(dataset.sequence_lengths, dtype=np.int64)
    ends = np.concatenate([np.zeros(1, np.int64), ends])
    return np.diff(ends[dataset.document_indices])


def histogram_lines(lengths: np.ndarray) -> list[str]:
    """Draw how many lengths lie between powers of two."""
    if not len(lengths):
        return []
    top = int(lengths.max()).bit_length()
    edges = [0, *(2**power for power in range(top + 1))]
    counts, _ = np.histogram(lengths, bins=edges)
    shown = [n for n, count in enumerate(counts) if count]
    widest = int(counts.max())
    return [
        f"  {edges[n]:>10} to {edges[n + 1] - 1:<10} {counts[n]:>12} "
        + "#" * -(-BAR_WIDTH * int(counts[n]) // widest)
        for n in range(shown[0], shown[-1] + 1)
    ]


def _show_counts(dataset: IndexedDataset, sidecar: Sidecar | None) -> None:
    print(f"dataset    {dataset.prefix}")
    print(f"documents  {dataset.num_documents}")
    print(f"sequences  {len(dataset)}")
    print(f"tokens     {dataset.num_tokens}")
    print(f"dtype      {dataset.dtype.name}")
    if sidecar is None:
        print("sidecar    none: name the tokenizer to train on it")
        return
    files = ", ".join(file.absolute for file in sidecar.tokenizer_files.values())
    print(f"tokenizer  {sidecar.tokenizer_type} {files}".rstrip())
    print(f"vocabulary {sidecar.vocab_size} ids, end of document {sidecar.eod_id}")
    appended = "ends each document" if sidecar.append_eod else "was not appended"
    print(f"           the end of document {appended}")
    if (sidecar.documents, sidecar.tokens) != (dataset.num_documents, dataset.num_tokens):
        raise DataError(
            f"{sidecars.sidecar_path(dataset.prefix)} tells of {sidecar.documents} documents and "
            f"{sidecar.tokens} tokens: it belongs to another dataset"
        )


def _show_lengths(lengths: np.ndarray) -> None:
    if not len(lengths):
        return
    low, middle, high = np.percentile(lengths, [10, 50, 90])
    print(
        f"lengths    min {lengths.min()}, 10% {low:.0f}, median {middle:.0f}, mean "
        f"{lengths.mean():.1f}, 90% {high:.0f}, max {lengths.max()} tokens a document"
    )
    print("\n".join(histogram_lines(lengths)))


def _show_ids(dataset: IndexedDataset, vocab_size: int | None) -> None:
    """Print the range of ids; with a vocabulary, refuse ids beyond it."""
    low, high = np.iinfo(np.int64).max, -1
    for first in range(0, len(dataset), DOCUMENTS_AT_ONCE):
        for sequence, ids in enumerate(dataset[first : first + DOCUMENTS_AT_ONCE], start=first):
            if vocab_size is not None:
                document = np.searchsorted(dataset.document_indices, sequence, side="right") - 1
                sidecars.check_ids(dataset.prefix, int(document), ids, vocab_size)
            if len(ids):
                low, high = min(low, int(ids.min())), max(high, int(ids.max()))
    if high >= 0:
        print(f"ids        {low} to {high}")


def _show_document(
    dataset: IndexedDataset, document: int, tokenizer: Tokenizer | None, max_tokens: int
) -> None:
    if not 0 <= document < dataset.num_documents:
        raise DataError(f"--document {document} must lie in 0 to {dataset.num_documents - 1}")
    first, last = dataset.document_indices[document : document + 2]
    ids = np.concatenate([*dataset[int(first) : int(last)], np.empty(0, dataset.dtype)])
    shown = ids[:max_tokens].tolist()
    print(f"document {document}: {len(ids)} tokens, the first {len(shown)}:")
    print(f"  ids  {shown[:16]}{' ...' * (len(shown) > 16)}")
    if tokenizer is not None:
        print(tokenizer.detokenize(shown))


def _tokenizer(args: argparse.Namespace, prefix: str, sidecar: Sidecar | None) -> Tokenizer | None:
    """Build the tokenizer that the flags or the sidecar name; None if there is none to be had."""
    if args.tokenizer_type:
        tokenizer = build_tokenizer(command_line.tokenizer_settings_of(args))
        if sidecar is not None:
            sidecars.check_tokenizer(prefix, sidecar, tokenizer)
        return tokenizer
    if sidecar is None:
        return None
    try:
        return build_tokenizer(sidecars.tokenizer_settings(prefix, sidecar))
    except MegatronError as error:
        print(f"cannot decode: {error}", file=sys.stderr)
        return None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.ToolParser("Show what is in a dataset of tokens, and check it.")
    add = parser.add_argument
    add("input", metavar="PREFIX", help="As of --data-path.")
    add("--document", type=int, nargs="+", default=[0], metavar="N",
        help="Documents to show, counted from 0.")  # fmt: skip
    add("--max-tokens", type=command_line.positive, default=200, metavar="N",
        help="Tokens shown of each.")  # fmt: skip
    add("--checksum", action="store_true", help="Print the sha256 of both files.")
    command_line.add_tokenizer_flags(parser, required=False)
    return parser.parse_tool_args(argv)


if __name__ == "__main__":
    command_line.run_tool(main)
