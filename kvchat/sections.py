"""The sections of the settings: what can be set, its default, and what values it may have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError, field_validator


class Section(BaseModel):
    """One table of config.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    """Which model, and how it runs."""

    name: str = ""
    """Hugging Face id, folder, GGUF file or `smollm2-135m`; empty = the built-in model."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str = "auto"
    attention: Literal["auto", "reference", "sdpa", "varlen"] = "auto"
    residence: Literal["auto", "encoded", "decoded"] = "auto"
    """How sealed KV lies in memory: as its codec wrote it and attention reads it, or as plain numbers; auto = encoded
    where a kernel reads it (CUDA with Triton)."""
    prefill_chunk_size: int = Field(default=1024, ge=16)
    """Tokens of one forward pass while prefilling; progress and stop are seen between passes."""
    memory_budget: ByteSize = Field(default=ByteSize(0), ge=0)
    """Most bytes of KV in memory of all open sessions together; 0 or empty = no limit."""

    @field_validator("memory_budget", mode="before")
    @classmethod
    def _empty_is_none(cls, size: Any) -> Any:
        return size or 0


class StoreConfig(Section):
    """Where conversations lie."""

    path: str = ""
    """The SQLite file; empty = `sessions/kvchat.db` of a checkout, else the platform's data folder."""
    disk_budget: ByteSize = Field(default=ByteSize(0), ge=0)
    """Most bytes of the database in use, as in "20GiB"; 0 or empty = no limit."""
    min_free: ByteSize = Field(default=ByteSize(1 << 30), ge=0)
    """Bytes of the disk that stay free, as in "1GiB"; 0 or empty = none. A turn of 8000 tokens with a model of 8
    billion weights takes half a gibibyte in 8 bits, and as much again in the log until that is folded in."""
    host_cache: ByteSize = Field(default=ByteSize(256 << 20), ge=0)
    """Most bytes of frames that stay in host memory, as the store has them, to come back sooner; 0 or empty = none."""

    @field_validator("disk_budget", "min_free", "host_cache", mode="before")
    @classmethod
    def _empty_is_none(cls, size: Any) -> Any:
        return size or 0


_BYTES = TypeAdapter(ByteSize)
LEAST_ROWS = 256
"""The smallest `kv_budget` in rows: less has no room for a turn, its scoring and what comes before."""

OBSERVING = ("kvzip", "kvzip+", "snapkv", "rkv")
"""Scorers whose score is joined from the attention of several rows."""
SCORER_NAMES = (*OBSERVING, *("expected_attention", "gate", "kvp", "keydiff", "knorm", "lagkv", "streaming", "random"))
"""Names of `kvchat.compress.scorers.SCORERS`."""


class CompressConfig(Section):
    """What is kept of a sealed segment."""

    scorer: str = "kvzip"
    """One of SCORER_NAMES, or "module:name" of another package's."""
    aggregate: Literal["own", "mean", "max", "lifted", "defensive"] = "own"
    """How a scorer that observes attention joins what it sees: its own way or `kvchat.compress.aggregate`'s."""
    allocate: Literal["global", "layer", "uniform", "pyramid", "coverage", "evolved", "sensitivity"] = "global"
    """How pairs of different layers and heads compare: see `kvchat.compress.order`."""
    coverage: float = Field(default=0.95, gt=0, le=1)
    """With `allocate` "coverage": the part of a segment's score mass that is held, in place of `keep_ratio`."""
    learned: str = ""
    """Folder of what `kvchat fit` and `kvchat tune` found; empty = `learned` beside the sessions."""
    keep_ratio: float = Field(default=0.5, gt=0, le=1)
    """Fraction of the KV pairs of older segments held in memory; the store keeps all while it has room."""
    budget: Literal["session", "segment"] = "session"
    """Whether `keep_ratio` is meant of all older segments together, the best chunks first, or of each."""
    answer_rows: int = Field(default=0, ge=0)
    """Most rows a head that the current turn takes in memory while it is answered, 256 or more; 0 = all."""
    kv_budget: str = ""
    """What all KV of a conversation may take in memory, tail included: bytes as in "2GiB", or "4096 rows" a head on
    average; empty = no limit."""
    recent_tokens: int = Field(default=1024, ge=0)
    """Segments with one of the newest so many tokens hold all their pairs."""
    segment_min: int = Field(default=512, ge=1)
    """Turns are joined until a segment has this many tokens."""
    num_sink_tokens: int = Field(default=4, ge=0)
    protect: Literal["prefix", "template"] = "prefix"
    """What is never evicted: system prompt and sinks, or every token of the chat template too."""
    score_chunk: int = Field(default=2000, ge=16)
    """Tokens that one reconstruction pass of KVzip repeats."""
    rank_chunks: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
    """Cumulative fractions at which a segment's ranking is cut; `keep_ratio` is added to them."""

    @property
    def scored_by(self) -> str:
        """What decides the scores: NAME or NAME.AGGREGATE."""
        return self.scorer if self.aggregate == "own" else f"{self.scorer}.{self.aggregate}"

    def method(self, version: str = "") -> str:
        """How new segments are ranked, which is part of their names; `version` is of what was learned for that."""
        how = f"{self.scored_by}@{version}" if version else self.scored_by
        return how if self.allocate == "global" else f"{how}-{self.allocate}"

    @field_validator("scorer")
    @classmethod
    def _named(cls, name: str) -> str:
        if name not in SCORER_NAMES and not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*:\w+", name, re.ASCII):
            raise ValueError(f"must be one of {', '.join(SCORER_NAMES)}, or module:name")
        return name

    @property
    def budget_rows(self) -> int:
        """Of `kv_budget`, if it is given in rows."""
        number, _, unit = self.kv_budget.partition(" ")
        return int(number) if unit == "rows" else 0

    @property
    def budget_bytes(self) -> int:
        """Of `kv_budget`, if it is given in bytes."""
        return 0 if self.budget_rows or not self.kv_budget else int(_BYTES.validate_python(self.kv_budget))

    @field_validator("kv_budget", mode="before")
    @classmethod
    def _is_size(cls, size: Any) -> str:
        text = " ".join(str(size or "").split())
        if found := re.fullmatch(r"(\d+) rows?", text):
            if int(found[1]) < LEAST_ROWS:
                raise ValueError(f"must be at least {LEAST_ROWS} rows")
            return f"{int(found[1])} rows"
        if text:
            try:
                _BYTES.validate_python(text)
            except ValidationError:
                raise ValueError('must be bytes, as in "2GiB", or rows a head, as in "4096 rows"') from None
        return text

    @field_validator("answer_rows")
    @classmethod
    def _has_room(cls, rows: int) -> int:
        if 0 < rows < 256:
            raise ValueError("must be 0, for no limit, or at least 256")
        return rows

    @field_validator("rank_chunks")
    @classmethod
    def _ascending(cls, cuts: tuple[float, ...]) -> tuple[float, ...]:
        if list(cuts) != sorted(set(cuts)) or not cuts or cuts[0] <= 0 or cuts[-1] != 1.0:
            raise ValueError("must rise strictly from above 0 to 1.0")
        if len(cuts) > 32:
            raise ValueError("has more than 32 cuts")
        return cuts


CODEC_NAMES = (
    "raw",
    *(f"k{keys}v{values}" for keys in (8, 4, 3, 2) for values in (8, 4, 3, 2) if keys >= values),
    *("eb2", "eb5", "eb10", "eb20"),
)
"""Names of `kvchat.codecs.CODECS`: k and v with the bits of keys and values, of which keys never have fewer, because
their errors cost more; or eb with the step of quantisation, in percent of the range of what is quantised together."""


def without_repeats(names: Sequence[str]) -> tuple[str, ...]:
    """Codecs by rank without repeating the last, which serves all further chunks."""
    kept = list(names)
    while kept[-2:] == [kept[-1]] * 2:
        kept.pop()
    return tuple(kept)


class CodecConfig(Section):
    """How sealed KV is written down."""

    name: str | tuple[str, ...] = "k8v8"
    """One of CODEC_NAMES, or one for each entry of `compress.rank_chunks`; the last serves all further entries."""

    @field_validator("name", mode="before")
    @classmethod
    def _known(cls, name: Any) -> Any:
        names = [name] if isinstance(name, str) else name
        if not isinstance(names, list | tuple) or not names or not all(one in CODEC_NAMES for one in names):
            raise ValueError(f"must be one of {', '.join(CODEC_NAMES)}, or a list of them")
        return name

    @property
    def names(self) -> tuple[str, ...]:
        """The name, or each of them."""
        return (self.name,) if isinstance(self.name, str) else self.name


SELECTOR_NAMES = ("recency", "text", "embedding", "attention")
"""Names of `kvchat.episodes.selectors.SELECTORS`."""


class RecallConfig(Section):
    """Which old turns come back for a question."""

    by: str = "text"
    """off, one of SELECTOR_NAMES, or several joined with +."""
    turns: int = Field(default=2, ge=1, le=64)
    """The most turns that come back for a question."""

    @field_validator("by")
    @classmethod
    def _known(cls, name: str) -> str:
        names = [part.strip() for part in name.split("+")]
        if names != ["off"] and not all(part in SELECTOR_NAMES for part in names):
            raise ValueError(f"must be off, or one or more of {', '.join(SELECTOR_NAMES)}, joined with +")
        return "+".join(names)


class EpisodesConfig(Section):
    """How turns are told apart by what they are about."""

    embedder: Literal["own", "minilm"] = "own"
    """What makes vectors of turns: the loaded model's own states, or all-MiniLM-L6-v2, downloaded at the first use."""
    clusters: int = Field(default=0, ge=0, le=256)
    """Episodes of a conversation; 0 = by its length."""


class GenerateConfig(Section):
    """Sampling of an answer; `temperature` 0 is greedy."""

    max_new_tokens: int = Field(default=512, ge=1)
    temperature: float = Field(default=0.7, ge=0, le=100)
    top_p: float = Field(default=0.95, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 = off."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.1, le=10)
    seed: int | None = Field(default=None, ge=0, lt=2**63)


_KEY = r"((ctrl|alt|shift|super|hyper|meta)\+)*[A-Za-z0-9_]+"


class TuiConfig(Section):
    """How the chat looks, and its keys."""

    theme: str = "kvchat-dark"
    """Name of a theme; one that is not there counts as the default."""
    keys: dict[str, str] = {}
    """Ids of actions to their keys, several joined with commas, as in {"map": "f3,ctrl+g"}; others keep theirs."""
    titles: bool = True
    """Whether the model gives sessions titles, in idle time."""

    @field_validator("theme")
    @classmethod
    def _is_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", name, re.ASCII):
            raise ValueError("must be the name of a theme, as in kvchat-dark")
        return name

    @field_validator("keys")
    @classmethod
    def _are_keys(cls, keys: dict[str, str]) -> dict[str, str]:
        keys = {action: pressed.replace(" ", "") for action, pressed in keys.items()}
        for action, pressed in keys.items():
            if not re.fullmatch(r"[a-z][a-z0-9_.]*", action):
                raise ValueError(f"has no action {action!r}; actions are words, as in stop or prompt.newline")
            if not all(re.fullmatch(_KEY, key) for key in pressed.split(",")):
                raise ValueError(f"has no key {pressed!r} for {action}; keys are as in f5, ctrl+g or f3,ctrl+g")
        return keys
