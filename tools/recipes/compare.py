"""Counted parameters against published ones, as exactly as those are given. Pure."""

from decimal import Decimal

BILLION = 10**9
ALLOWED = 0.01
"""Relative difference that counts as equal."""


def difference(published: str, counted: int) -> float:
    """Return (counted - published) / published.

    Args:
        published: In billions, such as ``46.7``.
        counted: Parameters.
    """
    return counted / (float(published) * BILLION) - 1


def is_equal(published: str, counted: int) -> bool:
    """Return whether ``counted`` lies within 1 % of ``published``, or has its digits.

    A figure such as 1.3 says no more than 1.25 to 1.35 where it was rounded, or 1.3 to 1.4 where
    digits were left out, as in DeepSeek-V2-Lite's 2.4 of 2.4514.
    """
    if abs(difference(published, counted)) <= ALLOWED:
        return True
    exact = Decimal(published)
    digit = Decimal(1).scaleb(int(exact.as_tuple().exponent))
    return -digit / 2 <= Decimal(counted) / BILLION - exact < digit
