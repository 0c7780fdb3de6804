"""How far a fit is: tensors and, in the file's JSON header, the step and what is fitted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvchat.files import written


class Checkpoint:
    """A file of tensors after some step of one fit.

    Args:
        file: where it lies.
        name: what stands for the fit's data and settings; a file of another is as none.
    """

    def __init__(self, file: Path, name: str) -> None:
        self._file, self._name = file, name

    def load(self) -> tuple[int, dict[str, Tensor]]:
        """Steps done, and the tensors; 0 and none if there is no file of this fit that can be read."""
        try:
            with safe_open(self._file, "pt") as parts:
                about = parts.metadata() or {}
                if about.get("fit") != self._name:
                    return 0, {}
                return int(about["step"]), {name: parts.get_tensor(name) for name in parts.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return 0, {}

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Replace the file, whole or not at all."""
        parts = {name: part.detach().cpu().contiguous() for name, part in tensors.items()}
        with written(self._file, force=True) as stream:
            stream.write(safetensors.torch.save(parts, {"fit": self._name, "step": str(step)}))
