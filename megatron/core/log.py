"""What a run says: rank 0 shows information, every rank shows its warnings with its rank.

One handler on the logger ``megatron``; modules use ``logging.getLogger(__name__)`` and know nothing
of it. Information is written as it stands, because users parse Megatron's lines.
"""

import logging
import sys
from collections.abc import Callable, Iterable

_ROOT = "megatron"
_seen: set[tuple[str, str]] = set()


def _write_stdout(line: str) -> None:
    sys.stdout.write(line + "\n")  # one write a line, so that lines of several ranks do not mix
    sys.stdout.flush()


class RankHandler(logging.Handler):
    """Writes lines through ``write_line``, which a progress bar may replace."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(logging.INFO if rank == 0 else logging.WARNING)
        self.origin = f" [rank {rank}]" if world_size > 1 else ""
        self.write_line: Callable[[str], None] = _write_stdout

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler.emit."""
        text = self.format(record)
        if record.levelno > logging.INFO:
            text = f"{record.levelname.lower()}{self.origin}: {text}"
        self.write_line(text)


def setup_logging(rank: int = 0, world_size: int = 1) -> RankHandler:
    """Show the log of this rank on standard output; replaces an earlier setup."""
    logger = logging.getLogger(_ROOT)
    for handler in [h for h in logger.handlers if isinstance(h, RankHandler)]:
        logger.removeHandler(handler)
    handler = RankHandler(rank, world_size)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return handler


def log_once(log: logging.Logger, message: str, level: int = logging.WARNING) -> None:
    """Log ``message`` the first time that ``log`` is given it; for what a loop would repeat."""
    if (log.name, message) not in _seen:
        _seen.add((log.name, message))
        log.log(level, message)


def banner(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """Return Megatron's dotted table: a dashed title, then sorted ``name ........ value`` rows."""
    lines = [f"------------------------ {title} ------------------------"]
    for name, value in sorted(rows, key=lambda row: row[0].lower()):
        lines.append(f"  {name} {'.' * max(3, 48 - len(name))} {value}")
    lines.append(f"-------------------- end of {title} ---------------------")
    return "\n".join(lines)


def print_rank_0(message: object) -> None:
    """Show ``message`` once, from rank 0. For users' scripts."""
    logging.getLogger(_ROOT).info("%s", message)
