"""Coverage-guided fuzzing of what reads frames, headers, bases and portable files; needs `pip install atheris`.

    OMP_NUM_THREADS=1 python -m tests.fuzz_frames CORPUS -max_total_time=600 -rss_limit_mb=2048 -timeout=10

The first byte of an input chooses the seed, of which the rest is a changed copy; checksums are made right before it is
read. CORPUS is a folder that keeps inputs which reach new code; other arguments are libFuzzer's. It stops at anything
but a KVChatError, at more memory than the limit, and at an input that takes longer than the timeout.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvchat"]):
    from tests import fuzz_parts

SEEDS = fuzz_parts.seeds()


def read_one(data: bytes) -> None:
    """What libFuzzer calls."""
    if data:
        seed = SEEDS[data[0] % len(SEEDS)]
        fuzz_parts.read(seed, fuzz_parts.resealed(seed, data[1:]))


def change(data: bytes, max_size: int, seed: int) -> bytes:
    """libFuzzer's own changes, or those that know what a frame is."""
    draw = random.Random(seed)
    if len(data) < 2 or draw.random() < 0.4:
        return bytes(atheris.Mutate(data, max_size))
    one = SEEDS[data[0] % len(SEEDS)]
    blob = fuzz_parts.change_portable(data[1:], draw) if one.kind == "portable" else fuzz_parts.change(data[1:], draw)
    return (data[:1] + blob)[:max_size]


def main(corpus: str) -> None:
    """Put the seeds into the corpus and begin."""
    folder = Path(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS):
        (folder / f"seed-{number}-{seed.kind}").write_bytes(bytes([number]) + seed.blob)
    atheris.Setup([*sys.argv, "-max_len=20000"], read_one, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1])
