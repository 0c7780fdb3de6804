"""What a fit learns from: conversations fed with nothing evicted, cut into segments at the ends of turns.

Of each segment a file holds what its kind of fit needs, and KVzip's scores, which policies need only to be compared
with; when the conversation is over, another holds the attention that each pair got from later segments. The latter
marks that the conversation is complete.

    NNNN.safetensors      kvzip (L, H, T), protected and ids (T,), start ();
                          keys, values (L, H, T, D) for policies, states (L, T, n) for a gate
    later.safetensors     NNNN (L, H, T), and tokens.NNNN (), how many later tokens paid it

Letters: L layers, H KV heads, G query heads per KV head, T tokens of a segment, P tokens of all segments before, q new
tokens, D head_dim, n width of the states.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from kvchat.attention import log_normaliser
from kvchat.cache.layer import Piece
from kvchat.cache.ragged import SegmentedCache
from kvchat.cache.segment import LayerKV
from kvchat.config import Config
from kvchat.engine import Engine
from kvchat.errors import InputError
from kvchat.evals.cases import Case
from kvchat.events import Progress, followed
from kvchat.files import written
from kvchat.fingerprint import digest
from kvchat.learned import Kind
from kvchat.model import Model
from kvchat.residence.sealing import Ranker, describe, score
from kvchat.store.store import Message

VERSION = 1
"""Raise it when the same conversation would be collected otherwise."""
LATER = "later.safetensors"
ROOM = 512
"""Tokens of the window that the passes of KVzip need behind the conversation."""


class Segment:
    """One collected segment; nothing of it is in memory."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def tensor(self, name: str, layer: int | None = None) -> Tensor:
        """A tensor of the segment's own file, of all layers or one."""
        with safe_open(self.file, "pt") as parts:
            part: Tensor = parts.get_tensor(name) if layer is None else parts.get_slice(name)[layer]
        return part

    @cached_property
    def start(self) -> int:
        """Position of the first token."""
        return int(self.tensor("start"))

    @cached_property
    def candidates(self) -> Tensor:
        """Flags (T,) of the tokens that can be evicted."""
        return ~self.tensor("protected")

    @cached_property
    def num_later(self) -> int:
        """Later tokens that paid attention."""
        with safe_open(self.file.parent / LATER, "pt") as parts:
            return int(parts.get_tensor(f"tokens.{self.file.stem}"))

    def later(self) -> Tensor:
        """Attention (L, H, T) float32 that all later tokens together paid, the largest of each group."""
        with safe_open(self.file.parent / LATER, "pt") as parts:
            later: Tensor = parts.get_tensor(self.file.stem)
        return later


def path_of(model: Model, case: Case) -> list[Message]:
    """The case's messages as a session would hold them."""
    template, path, asked = model.template, list[Message](), False
    opening = template.system(case.system)
    if opening.ids:
        path.append(Message.new(None, "system", case.system or "", opening.ids, opening.content_span))
    for said in (said for turn in case.turns for said in turn):
        role, parent = "user" if said["role"] == "user" else "assistant", path[-1].id if path else None
        piece = template.message(role, said["content"], first=not asked)
        path.append(Message.new(parent, role, said["content"], piece.ids, piece.content_span))  # type: ignore[arg-type]
        asked = asked or role == "user"
    return path


def ends(path: Sequence[Message], least: int) -> list[int]:
    """After which messages segments of at least so many tokens end, at the ends of turns."""
    found, tokens = list[int](), 0
    for index, message in enumerate(path, 1):
        tokens += len(message.token_ids)
        if tokens >= least and (index == len(path) or path[index].role == "user"):
            found.append(index)
            tokens = 0
    return found


def collected(
    engine: Engine, case: Case, config: Config, kind: Kind, work: Path, scored: bool = True
) -> Generator[Progress, None, list[Segment]]:
    """The case's segments, collected now or earlier into a folder in `work`; `scored` with KVzip's scores.

    Raises:
        InputError: the conversation is too long for the window, or too short to have two segments.
    """
    path, model = path_of(engine.model, case), engine.model
    tokens = sum(len(message.token_ids) for message in path)
    if tokens > model.context_window - ROOM:
        most = (model.context_window - ROOM) // 500 * 500
        raise InputError(f"{case.name} has {tokens} tokens, too many for {model.name}; shorten it with --tokens {most}")
    cuts = ends(path, config.compress.segment_min)
    if len(cuts) < 2:
        raise InputError(f"{case.name} is too short: a fit needs two segments of compress.segment_min tokens")
    folder = work / _name(model, path, config, kind)
    if not scored and not (folder / LATER).exists():
        folder = folder.with_name(f"{folder.name}-unscored")
    if not (folder / LATER).exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield from Feeding(engine, config, kind, folder, scored).run(path, cuts)
    return [Segment(file) for file in sorted(folder.glob("[0-9]*.safetensors"))]


def _name(model: Model, path: Sequence[Message], config: Config, kind: Kind) -> str:
    """What stands for everything that decides what is collected."""
    settings = config.compress
    how = [VERSION, kind, settings.segment_min, settings.score_chunk, settings.num_sink_tokens, settings.protect]
    return digest([model.fingerprint, config.model.prefill_chunk_size, how, [message.id for message in path]])


class Feeding:
    """Feeds one conversation; a tap that adds up what later segments pay to earlier ones."""

    def __init__(self, engine: Engine, config: Config, kind: Kind, folder: Path, scored: bool) -> None:
        self._engine, self._kind, self._folder, self._scored = engine, kind, folder, scored
        model = engine.model
        own = {"scorer": "kvzip", "aggregate": "own", "allocate": "global"}  # whatever segments are ranked by
        self._ranker = Ranker(model, config.compress.model_copy(update=own))
        shape = (model.num_key_value_heads, 0, model.head_dim)
        layers = range(model.num_hidden_layers)
        self._past = [torch.empty(shape, dtype=model.dtype, device=model.device) for _ in layers]
        """Keys (H, P, D) a layer of the segments before."""
        self._later = [torch.zeros(shape[:2], device=model.device) for _ in layers]
        """What they were paid, (H, P) a layer."""
        self._states: list[list[Tensor]] = [[] for _ in layers]

    def run(self, path: Sequence[Message], cuts: Sequence[int]) -> Iterator[Progress]:
        """Feed the path and write the files of its segments, which end after messages `cuts`."""
        cache, first = self._engine.new_cache(), 0
        bounds = [0, *accumulate(len(message.token_ids) for message in path)]
        ids = [token for message in path for token in message.token_ids]
        for number, last in enumerate(cuts):
            yield from self._read(cache, ids[bounds[first] : bounds[last]], len(ids))
            self._seal(number, cache, path, (first, last))
            first = last
        yield from self._read(cache, ids[bounds[first] :], len(ids))
        lengths = [high - low for low, high in pairwise([0, *(bounds[cut] for cut in cuts)])]
        parts = torch.split_with_sizes(torch.stack(self._later), lengths, dim=2) if self._kind == "kvp" else ()
        later = {f"{number:04}": part.contiguous() for number, part in enumerate(parts)}
        tokens = {f"tokens.{number:04}": torch.tensor(len(ids) - bounds[cut]) for number, cut in enumerate(cuts)}
        _save(self._folder / LATER, {**later, **tokens})

    def _read(self, cache: SegmentedCache, ids: Sequence[int], total: int) -> Iterator[Progress]:
        """Compute the next tokens."""
        cache.tap = self if self._kind == "kvp" else None
        with self._engine.anatomy.watched(self.enter) if self._kind == "gate" else nullcontext():
            for _ in self._engine.prefill(cache, ids, lambda: False):
                yield Progress("prefill", cache.num_seen, total)
        cache.tap = None

    def _seal(self, number: int, cache: SegmentedCache, path: Sequence[Message], span: tuple[int, int]) -> None:
        """Write what was seen of the segment that is the tail, messages `span`, and keep all of it, exactly."""
        start, end, engine = cache.tail_start, cache.num_seen, self._engine
        subject = describe(engine.model.template, cache, path, *span, self._ranker.config)
        keys, values = cache.tail(start, end)
        if self._kind == "gate":
            seen = {"states": torch.stack([torch.cat(parts) for parts in self._states])}
        else:
            seen = {"keys": torch.stack(keys), "values": torch.stack(values)}
        if self._scored:
            seen["kvzip"] = followed(score(engine, cache, subject, self._ranker), lambda _: None)
        flags = torch.tensor(subject.protected)
        about = {"protected": flags, "ids": torch.tensor(subject.token_ids), "start": torch.tensor(start)}
        _save(self._folder / f"{number:04}.safetensors", {**seen, **about})
        self._states = [[] for _ in self._states]
        self._past = [torch.cat(pair, dim=1) for pair in zip(self._past, keys, strict=True)]
        self._later = [torch.nn.functional.pad(later, (0, end - start)) for later in self._later]
        rows = [LayerKV.dense(*pair, start) for pair in zip(keys, values, strict=True)]
        cache.attach({Piece(start, 0): rows}, end, tail=end - start)

    def enter(self, layer: int, states: Tensor) -> None:
        """Keep what enters attention."""
        self._states[layer].append(states.cpu())

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """Add what this pass's queries pay to the segments before."""
        if self._past[layer].shape[1]:
            self._later[layer] += attention_paid(query, self._past[layer], keys, scale)


def attention_paid(query: Tensor, past: Tensor, tail: Tensor, scale: float) -> Tensor:
    """Attention (H, P) float32 that past keys (H, P, D) get: of each group the largest, over the queries the sum.

    Args:
        query: (H * G, q, D), of the last q tokens of the tail, which follows the past.
        tail: keys (H, T, D).
        scale: factor on the logits.
    """
    heads, q = len(past), query.shape[1]
    before, own = torch.cat([past, tail[:, : tail.shape[1] - q]], dim=1), tail[:, tail.shape[1] - q :]
    lse = log_normaliser(query, before, own, scale).reshape(heads, -1, 1)
    grouped = query.reshape(heads, -1, query.shape[-1]).float()
    paid = []
    for head in range(heads):
        logs = torch.addmm(-lse[head].float(), grouped[head], past[head].float().T, alpha=scale)
        # The largest before exponentiation, which is the costly part.
        paid.append(logs.view(-1, q, past.shape[1]).amax(0).exp().sum(0))
    return torch.stack(paid)


def _save(file: Path, tensors: dict[str, Tensor]) -> None:
    with written(file, force=True) as stream:
        stream.write(safetensors.torch.save({name: part.cpu().contiguous() for name, part in tensors.items()}))
