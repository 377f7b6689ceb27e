"""Compile a file of C++ for this processor and load it; what was compiled once is kept on disk.

Kernels are plain functions of pointers and sizes, so no header of torch is read: compiling takes
below a second. They may call matrix products that torch exports (``with_torch``).
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from megatron.core.errors import BackendError

OPTIONS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
HEADERS = Path(__file__).parent
"""Folder of headers that a file of any folder may include, beside those of its own."""
FOLDER_VARIABLE = "MEGATRON_KERNEL_CACHE"
"""Environment variable with the folder of compiled kernels; empty to keep none."""
_COMPILERS = ("c++", "g++", "clang++")
_SECONDS_TO_COMPILE = 120.0


def compiler() -> list[str] | None:
    """Return the command that compiles C++: the variable CXX, else c++, g++, clang++; or None."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else None
    return next(([name] for name in _COMPILERS if shutil.which(name)), None)


def openmp() -> tuple[str, ...]:
    """Return the option for ``parallel.h``; none but on Linux, where torch brings GNU's library."""
    return ("-fopenmp",) if sys.platform == "linux" else ()


def load(source: Path, *, options: Sequence[str] = (), with_torch: bool = False) -> ctypes.CDLL:
    """Return the functions of ``source``, compiled now or taken from the folder that keeps them.

    Args:
        source: A file of C++17 with ``extern "C"`` functions.
        options: More options of the compiler, such as ``-DBF16``.
        with_torch: Link torch's CPU library, whose exported functions the file then declares.

    Raises:
        BackendError: There is no compiler, it failed, or what it made cannot be loaded.
    """
    command = compiler()
    if command is None:
        raise BackendError(f"there is no C++ compiler (CXX, {', '.join(_COMPILERS)})")
    how = [*OPTIONS, *openmp(), *options]
    arguments = [*how, f"-I{HEADERS}"]
    if with_torch:
        # found by name: this process has the library already
        arguments += [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
    name = f"{source.stem}-{_digest(source, command, how)}.so"
    with tempfile.TemporaryDirectory(prefix="megatron_kernels_") as scratch:
        kept = kernel_folder()
        path = (kept or Path(scratch)) / name
        if path.exists():
            try:
                return ctypes.CDLL(str(path))  # which stays when its file goes
            except OSError:
                path.unlink(missing_ok=True)  # damaged: compile it anew
        _compile(command, arguments, source, path, Path(scratch))
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise BackendError(
                f"{source.name} was compiled and cannot be loaded: {error}"
            ) from error


@cache
def kernel_folder() -> Path | None:
    """Return the folder that keeps compiled kernels, made if need be; None where none can be.

    It is ``MEGATRON_KERNEL_CACHE``, else ``megatron-moe/kernels`` in the user's cache folder. Code
    is loaded from it, so it has to be the user's own and not writable by others.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    if named == "":
        return None
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(named or Path(base) / "megatron-moe" / "kernels").expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # no home, or none that can be written
        return None
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    is_ours = found.st_uid == os.getuid() and not others and os.access(folder, os.W_OK)
    return folder if is_ours else None


def _compile(
    command: Sequence[str], arguments: Sequence[str], source: Path, path: Path, scratch: Path
) -> None:
    """Compile ``source`` to ``path``, which appears whole: ranks start at the same moment."""
    line = [*command, str(source), *arguments]
    try:
        # beside the target where possible: a rename cannot cross file systems
        handle, made = tempfile.mkstemp(suffix=".so", dir=path.parent)
    except OSError:
        handle, made = tempfile.mkstemp(suffix=".so", dir=scratch)
    os.close(handle)
    try:
        done = subprocess.run(
            [*line, "-o", made], capture_output=True, text=True, timeout=_SECONDS_TO_COMPILE
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["nothing"]
            said = next((line for line in lines if "error: " in line), lines[-1])
            raise BackendError(f"{shlex.join(command)} failed and said: {said}")
        Path(made).replace(path)
    except (OSError, subprocess.SubprocessError) as error:
        raise BackendError(f"{shlex.join(command)} failed: {error}") from error
    finally:
        Path(made).unlink(missing_ok=True)


def _digest(source: Path, command: Sequence[str], how: Sequence[str]) -> str:
    """Return a name for what is compiled, by what, how, for which processor."""
    program = shutil.which(command[0])
    made = Path(program).resolve().stat() if program else None
    facts = (
        *command,
        *how,
        f"{made.st_size} {made.st_mtime_ns}" if made else "",
        torch.__version__,
        platform.machine(),
        _processor(),
    )
    told = hashlib.sha256(source.read_bytes())
    for header in sorted({*source.parent.glob("*.h"), *HEADERS.glob("*.h")}):
        told.update(header.read_bytes())
    told.update("\0".join(facts).encode())
    return told.hexdigest()[:20]


def _processor() -> str:
    """Return what -march=native depends on, where Linux tells it."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(x for x in first if x.startswith(("model", "flags", "Features", "CPU part")))
