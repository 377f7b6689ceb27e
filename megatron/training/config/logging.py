"""Options of what a run prints and writes."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class LoggingConfig:
    """Logging."""

    log_interval: int = 100
    """Iterations between log lines."""

    log_throughput: bool = False
    """Add model FLOP/s of each rank to the log line."""

    tensorboard_dir: str | None = None
    """Folder for TensorBoard scalars; needs the extra ``tensorboard``."""

    tensorboard_log_interval: int = 1
    """Iterations between TensorBoard scalars."""

    tensorboard_queue_size: int = 1000
    """Scalars that TensorBoard may hold back before it writes."""

    moe_per_layer_logging: bool = False
    """Also write each balance loss and z-loss of each MoE layer, as moe/<name>_layer_<index>, to
    metrics.jsonl and TensorBoard. Load, entropy and bias of each layer are always written."""

    moe_routing_trace_path: str | None = None
    """Folder for a trace of which experts each token chose, and with what weights, in numpy files;
    tools/inspect_routing.py reads it. About (3 x top-k x MoE layers + 2) bytes a token."""

    moe_routing_trace_max_training_iters: int | None = None
    """Training iterations that are traced, resumed ones included; all when not set."""

    moe_routing_trace_max_mb: float = 1000.0
    """Megabytes (10^6 bytes) of trace that one rank writes at most; the trace then ends."""

    log_dir: str | None = None
    """Folder for metrics.jsonl (one line an iteration) and the plot; --save when not set, or
    runs/BUCKET/RUN when that is a URL; nothing is written without either."""
