"""Numbers of bytes as text."""


def size_text(number: int) -> str:
    """Return ``number`` bytes in the largest unit that gives 1 or more."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
