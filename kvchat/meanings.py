"""What each setting means to who sets it, in one line; config.toml says more."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kvchat.sections import CODEC_NAMES, SCORER_NAMES, SELECTOR_NAMES

MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "model.name": "Model of new sessions: Hugging Face id, folder or GGUF file; empty: the built-in one",
        "model.dtype": "Numbers that the model computes with; auto: what suits the device",
        "model.device": "Where the model runs: auto, cpu, cuda, cuda:0 and so on",
        "model.attention": "How KV is read; reference is slow and defines what is correct",
        "model.residence": "How saved KV lies in memory: encoded takes a third to a half, decoded is plain numbers",
        "model.prefill_chunk_size": "Tokens read in one pass; progress is shown and Stop is heard between passes",
        "model.memory_budget": "Most bytes of KV in memory of all open sessions, as in 2GiB; 0: no limit",
        "store.path": "The file with all sessions; empty: the usual place",
        "store.disk_budget": "Most bytes of that file in use, as in 20GiB; 0: no limit. Text always stays",
        "store.min_free": "Bytes of the disk that stay free, as in 1GiB; 0: none",
        "store.host_cache": "Most bytes of saved KV that wait in host memory to come back sooner; 0: none",
        "compress.scorer": "How the importance of KV pairs is found; kvzip is best measured, keydiff quickest",
        "compress.aggregate": "How kvzip, kvzip+, snapkv and rkv join what many tokens attend to",
        "compress.allocate": "How layers and heads share what is kept; global is best measured for kvzip",
        "compress.coverage": "With allocate = coverage: the part of a turn's score that is held",
        "compress.learned": "Folder of what `kvchat fit` and `kvchat tune` found; empty: beside the sessions",
        "compress.keep_ratio": "Fraction of older turns' KV pairs held in memory, above 0 to 1; the store keeps all",
        "compress.budget": "Whether keep_ratio is meant of all older turns together or of each segment",
        "compress.answer_rows": "Most rows a head that a turn takes while it is answered, 256 or more; 0: no limit",
        "compress.kv_budget": "What all KV of a conversation may take, as in 2GiB or 4096 rows; empty: no limit",
        "compress.recent_tokens": "This many of the newest tokens hold all their pairs",
        "compress.segment_min": "Short turns are joined until a segment has this many tokens",
        "compress.num_sink_tokens": "This many of the first tokens always stay: attention collects there",
        "compress.protect": "What never goes: the system prompt and first tokens, or all of the chat template too",
        "compress.score_chunk": "Tokens that one scoring pass repeats; more is faster and takes more memory",
        "compress.rank_chunks": "Where a segment's ranking is cut, as rising fractions to 1.0",
        "codec.name": "How saved KV is written: raw, k8v8 to k2v2, eb2 to eb20, or a list along rank_chunks",
        "recall.by": "How old turns are found that a question concerns: off, or one or more joined with +",
        "recall.turns": "The most old turns that come back for a question",
        "episodes.embedder": "What makes vectors of turns: the model itself, or MiniLM (84 MB, downloaded once)",
        "episodes.clusters": "Episodes that a conversation is sorted into; 0: by its length",
        "generate.max_new_tokens": "Longest answer, in tokens",
        "generate.temperature": "Randomness of the answer; 0 always takes the likeliest token",
        "generate.top_p": "Choose among the likeliest tokens that together have this probability",
        "generate.top_k": "Choose among this many likeliest tokens; 0: no such limit",
        "generate.min_p": "Leave out tokens less likely than this fraction of the likeliest; 0: no such limit",
        "generate.repetition_penalty": "Above 1 makes repeating a token less likely",
        "generate.seed": "The same seed gives the same answer; empty: each is drawn anew",
        "tui.theme": "Colours of the chat",
        "tui.keys": "Other keys for actions, as in map=f3,ctrl+g inspector=f6",
        "tui.titles": "Whether the model gives each session a title in idle time; yours stays",
    }
)

NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "model.name": ("smollm2-135m",),
        "model.device": ("auto", "cpu", "cuda"),
        "compress.scorer": SCORER_NAMES,
        "codec.name": CODEC_NAMES,
        "recall.by": ("off", *SELECTOR_NAMES),
    }
)
"""Values that a setting of free text is known to take, to choose from while writing."""
