"""What a GPU can do at most, and what it says of itself: for benches on one card."""

import shutil
import subprocess

import torch

PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""TFLOP/s of dense bf16 products in NVIDIA's data sheets, without sparsity; special names first."""
_FACTS = (
    "name",
    "driver_version",
    "memory.total",
    "power.limit",
    "clocks.max.sm",
    "clocks.sm",
    "clocks.mem",
    "temperature.gpu",
    "power.draw",
    "clocks_event_reasons.active",
)


def peak_tflops(name: str) -> float | None:
    """Return the peak of the card called ``name``; None for one that is not in the table."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def card_name() -> str:
    """Return the name of the CUDA device in use, or ``cpu``."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def card_facts() -> dict[str, str]:
    """Return what ``nvidia-smi`` says now of name, driver, memory, power and clocks; none on a CPU.

    A fact that this driver does not know is left out. Nothing is set.
    """
    facts = {}
    tool = shutil.which("nvidia-smi")
    for fact in _FACTS if tool else ():
        words = [str(tool), "-i", "0", f"--query-gpu={fact}", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode == 0:
            facts[fact] = done.stdout.strip()
    return facts
