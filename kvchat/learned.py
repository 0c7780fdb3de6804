"""What was learned for a model: weights of learned scorers (`kvchat fit`) and layer budgets (`kvchat tune`).

Files lie in one folder, named by the model's weights and architecture: what serves a model serves it in any dtype. What
comes with the package is used where the folder has nothing.

    KEY-gate.safetensors, KEY-kvp.safetensors    tensors by name
    KEY-budgets.json                             {NAME or NAME.AGGREGATE: {keep: [the share of each layer, mean 1]}}
    KEY-sensitivity.json                         the same of any scorer and keep, under "any" and 1
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Literal, get_args

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from kvchat.config import default_folder
from kvchat.errors import InputError
from kvchat.files import written
from kvchat.fingerprint import digest
from kvchat.model import Model
from kvchat.sections import CompressConfig

Kind = Literal["gate", "kvp"]
"""A learned scorer."""
SHIPPED = Path(__file__).parent / "shipped"
SHARES = {"evolved": "budgets", "sensitivity": "sensitivity"}
"""Values of `compress.allocate` that read layers' shares, to the files that hold them."""


def learned_kind(config: CompressConfig) -> Kind | None:
    """The scorer, if it is a learned one."""
    return next((kind for kind in get_args(Kind) if kind == config.scorer), None)


def folder(config: CompressConfig) -> Path:
    """Where files are written."""
    return Path(config.learned).expanduser() if config.learned else default_folder("data") / "learned"


def key(model: Model) -> str:
    """What files of a model are named by."""
    return digest([model.fingerprint["weights"], model.fingerprint["config"]])


def weights_path(model: Model, kind: Kind, config: CompressConfig) -> Path:
    """Where the weights of a scorer are written."""
    return folder(config) / f"{key(model)}-{kind}.safetensors"


def _found(model: Model, kind: Kind, config: CompressConfig) -> Path:
    """The user's own file, or else the one that comes with the package."""
    own = weights_path(model, kind, config)
    return own if own.exists() else SHIPPED / own.name


def version(model: Model, config: CompressConfig) -> str:
    """What stands for all that was learned and decides a ranking: segments of another one do not compare."""
    kind = learned_kind(config)
    files = [_found(model, kind, config)] if kind else []
    files += [shares_path(model, config, config.allocate)] if config.allocate in SHARES else []
    parts = [blake2b(file.read_bytes(), digest_size=4).hexdigest() for file in files if file.exists()]
    return "".join(parts)


def load_weights(model: Model, kind: Kind, config: CompressConfig) -> dict[str, Tensor]:
    """Weights of a learned scorer, on the model's device.

    Raises:
        InputError: there are none, or they cannot be read.
    """
    path = _found(model, kind, config)
    if not path.exists():
        raise InputError(f"no {kind} was fitted for {model.name}: run `kvchat fit`, or choose another compress.scorer")
    try:
        return load_file(path, device=str(model.device))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); run `kvchat fit` again") from None


def save_weights(model: Model, kind: Kind, config: CompressConfig, weights: Mapping[str, Tensor]) -> Path:
    """Write the weights of a learned scorer, whole or not at all. Raises OSError."""
    path = weights_path(model, kind, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path, force=True) as file:
        file.write(save({name: part.contiguous().cpu() for name, part in weights.items()}))
    return path


def shares_path(model: Model, config: CompressConfig, allocate: str) -> Path:
    """Where the layers' shares for a value of `compress.allocate` are written."""
    return folder(config) / f"{key(model)}-{SHARES[allocate]}.json"


def load_shares(model: Model, config: CompressConfig) -> list[float]:
    """The layers' shares for `allocate`: found for the scorer, at the nearest `keep_ratio`, or measured for any.

    Raises:
        InputError: none were found, or the file cannot be read.
    """
    measured = config.allocate == "sensitivity"
    found = _budgets(shares_path(model, config, config.allocate)).get("any" if measured else config.scored_by)
    if not found:
        what = "sensitivity was measured" if measured else f"layer budgets were searched for {config.scored_by}"
        how = "kvchat tune --sensitivity" if measured else "kvchat tune"
        raise InputError(f"no {what} on {model.name}: run `{how}`, or choose another compress.allocate")
    nearest = min(found, key=lambda keep: abs(float(keep) - config.keep_ratio))
    if len(found[nearest]) != model.num_hidden_layers:
        raise InputError(f"the layer budgets for {model.name} are of {len(found[nearest])} layers; run `kvchat tune`")
    return found[nearest]


def save_shares(model: Model, config: CompressConfig, shares: Sequence[float], allocate: str = "evolved") -> Path:
    """Write the shares found for the scorer and `keep_ratio`, beside those for others, or those measured for any.

    Raises:
        InputError, OSError
    """
    path = shares_path(model, config, allocate)
    budgets = _budgets(path)
    of, keep = ("any", 1.0) if allocate == "sensitivity" else (config.scored_by, config.keep_ratio)
    budgets.setdefault(of, {})[f"{keep:g}"] = [round(share, 6) for share in shares]
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path, force=True) as file:
        file.write(json.dumps(budgets, indent=1).encode())
    return path


def _budgets(path: Path) -> dict[str, dict[str, list[float]]]:
    try:
        tree = json.loads(path.read_bytes()) if path.exists() else {}
        return {
            scorer: {f"{float(keep):g}": [float(share) for share in shares] for keep, shares in by_keep.items()}
            for scorer, by_keep in tree.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it and run `kvchat tune` again") from None
