"""What the figures were taken on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kvchat.attention import BackendName, backend_for
from kvchat.model import Model
from kvchat.pool import num_cores

PACKAGES = ("kvchat", "torch", "transformers", "xllamacpp")


def machine(model: Model, attention: BackendName) -> dict[str, Any]:
    """Processor, memory, GPU, system and versions, and how the model runs on them."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu_name(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "gpu": gpu,
        "os": platform.platform(),
        "python": platform.python_version(),
        **{package: installed(package) for package in PACKAGES},
        "model": model.name,
        "device": str(model.device),
        "dtype": model.fingerprint["dtype"],
        "attention": backend_for(attention, model.device, model.dtype),
    }


def cpu_name(file: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system has it."""
    lines = file.read_text("utf-8", "replace").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Bytes of main memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def installed(package: str) -> str | None:
    """A package's version; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
