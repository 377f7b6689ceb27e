"""Building the sample index of 1 million documents and about 1 billion tokens, without a cache."""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from megatron.core.datasets.sample_index import build_sample_indices, plan_epochs
from tools.bench.timing import report

MEAN_TOKENS = 1000


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=None, help="Folder for sample_index.json.")
    parser.add_argument("--documents", type=int, default=1_000_000, help="Documents there are.")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 2 * MEAN_TOKENS, args.documents, dtype=np.int32)
    documents = (0, args.documents)
    tokens = int(lengths.sum(dtype=np.int64))
    rows = []
    for seq_length in (128, 1024, 4096):
        start, cpu = time.perf_counter(), time.process_time()
        plan = plan_epochs(tokens, seq_length, None)
        indices = build_sample_indices(
            lengths, documents, seq_length=seq_length, plan=plan, seed=1234
        )
        rows.append(
            {
                "documents": args.documents,
                "tokens": tokens,
                "seq_length": seq_length,
                "samples": len(indices.sample_index) - 1,
                "wall_s": time.perf_counter() - start,
                "cpu_s": time.process_time() - cpu,
            }
        )
    report("sample_index", rows, args.output)


if __name__ == "__main__":
    main()
