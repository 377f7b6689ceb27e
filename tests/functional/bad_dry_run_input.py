"""Mistakes in options of a dry run; see ``bad_input``."""

GOOD = "--num-layers 4 --hidden-size 64 --mock-data"

DRY_RUN_CASES: dict[str, tuple[int, str, list[str]]] = {
    "figures without a dry run": (
        1,
        f"{GOOD} --dry-run-world-size 8 --dry-run-memory-gib 80",
        ["--dry-run-world-size 8, --dry-run-memory-gib 80", "no effect without --dry-run"],
    ),
    "a dry run of shards": (
        1,
        f"{GOOD} --dry-run --use-torch-fsdp2",
        ["--dry-run with --use-torch-fsdp2 is not offered"],
    ),
    "a dry run of no ranks": (
        1,
        f"{GOOD} --dry-run --dry-run-world-size 0",
        ["--dry-run-world-size 0 must be at least 1"],
    ),
    "a device without memory": (
        1,
        f"{GOOD} --dry-run --dry-run-memory-gib 0",
        ["--dry-run-memory-gib 0 must be above 0"],
    ),
    "figures in no folder": (
        1,
        f"{GOOD} --dry-run --dry-run-json no/such/folder/x.json",
        ["--dry-run-json no/such/folder/x.json", "is no folder"],
    ),
}
