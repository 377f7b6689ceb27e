"""How kernels are told where the heads of a tensor lie, and how they are rotated."""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

WIDEST = 256
"""Most channels of a head."""
_LANES = 16
"""Channels of a head are a multiple of it."""


class RotaryTables(NamedTuple):
    """Rotation of each position and channel: x * cos + swapped(x) * sin.

    ``swapped`` exchanges the two channels of each pair.
    """

    cos: Tensor
    """[s, d]; 1 in channels that are not rotated."""
    sin: Tensor
    """[s, d]; with a minus sign in the first channel of a pair, 0 in channels that are not
    rotated."""
    half: int
    """Pairs of channels."""
    interleaved: bool = False
    """A pair is channels 2 i and 2 i + 1; else i and i + half."""


class View(ctypes.Structure):
    """Element (position, sample, group, head of the group) of a tensor; steps in elements."""

    _fields_ = (
        ("at", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("s", "b", "g", "r")),
    )


class Rotation(ctypes.Structure):
    """Rotation of each position and channel, see ``RotaryTables``; null tables rotate nothing."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        *((name, ctypes.c_int64) for name in ("half", "interleaved")),
    )


def fits(*channels: int) -> bool:
    """Whether kernels compute with heads of so many channels."""
    return all(0 < size <= WIDEST and size % _LANES == 0 for size in channels)


def view_of(x: Tensor, dtype: torch.dtype) -> View:
    """Describe ``x`` [b, groups, heads, s, channels], channels side by side."""
    assert x.dtype == dtype, f"{x.dtype=} {dtype=}"
    assert x.dim() == 5, f"{x.shape=}"
    assert fits(x.shape[4]), f"{x.shape=}: channels no multiple of {_LANES} up to {WIDEST}"
    assert x.stride(4) == 1, f"channels do not lie side by side: {x.stride()=}"
    b, g, r, s, _ = x.stride()
    return View(x.data_ptr(), s, b, g, r)


def rotation_by(tables: RotaryTables | None, like: Tensor) -> Rotation:
    """Describe the rotation of ``like`` [..., s, channels]."""
    if tables is None:
        return Rotation()
    for table in (tables.cos, tables.sin):
        assert table.shape == like.shape[-2:], f"{table.shape=} {like.shape=}"
        assert table.is_contiguous(), f"{table.stride()=}"
        assert table.dtype == like.dtype, f"{table.dtype=} {like.dtype=}"
    assert 0 <= 2 * tables.half <= like.shape[-1], f"{tables.half=} {like.shape=}"
    return Rotation(
        tables.cos.data_ptr(), tables.sin.data_ptr(), tables.half, int(tables.interleaved)
    )
