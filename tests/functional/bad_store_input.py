"""URLs that cannot be a place for checkpoints; see ``bad_input``."""

GOOD = "--num-layers 4 --hidden-size 64 --mock-data"

STORE_CASES: dict[str, tuple[int, str, list[str]]] = {
    "a store of no kind to save to": (
        1,
        f"{GOOD} --save nosuch://bucket/run",
        ["--save nosuch://bucket/run is of no kind that fsspec knows (nosuch://)"],
    ),
    "a store of no kind to load from": (
        1,
        f"{GOOD} --load nosuch://bucket/run",
        ["--load nosuch://bucket/run is of no kind that fsspec knows (nosuch://)"],
    ),
    "a store without a bucket": (1, f"{GOOD} --save s3://", ["--save s3:// names no bucket"]),
    "a chain of stores": (
        1,
        f"{GOOD} --save simplecache::s3://bucket/run",
        ["--save simplecache::s3://bucket/run is a chain of stores, which is not offered"],
    ),
    "metrics in a store": (
        1,
        f"{GOOD} --log-dir s3://bucket/run",
        ["--log-dir s3://bucket/run is a URL; a folder is needed"],
    ),
}
