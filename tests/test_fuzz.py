"""Changed frames, headers, bases and portable files with right checksums: only named errors, no large allocation.

`tests/fuzz_frames.py` looks for more with a coverage-guided fuzzer, run by hand.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvchat.codecs.frame import DTYPES, pack, unpack
from kvchat.errors import CodecError, CorruptFrame
from tests.fuzz_parts import PREFIX, SPARE_BYTES, Seed, changed, joined, read, reseal, resealed, seeds

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1 << 16

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
sizes = st.integers(-2, 9) | st.sampled_from([2**16, 2**31, 2**32, 2**62, 2**63 - 1, 2**64 - 1])
planes = st.tuples(
    st.text(max_size=3), st.sampled_from([*DTYPES, "<f8", "O", ""]), st.lists(sizes, max_size=6), st.text(max_size=2)
) | st.tuples(st.just("x"), st.sampled_from(DTYPES), st.lists(sizes, max_size=4), st.sampled_from(["raw", "zstd"]))


@pytest.fixture(scope="module")
def found() -> list[Seed]:
    return seeds()


def test_what_nobody_changed_is_read(found: list[Seed]) -> None:
    assert all(read(seed, seed.blob) and read(seed, resealed(seed, seed.blob)) for seed in found)
    assert all(resealed(seed, seed.blob) == seed.blob for seed in found)
    assert {seed.kind for seed in found} == {"basis", "header", "rows", "portable"}


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.integers(0, 2**16))
def test_changed_bytes_raise_named_errors_alone(found: list[Seed], number: int, which: int) -> None:
    seed = found[which % len(found)]
    read(seed, changed(seed, random.Random(number)))


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**16), st.binary(max_size=200))
def test_any_bytes_raise_named_errors_alone(found: list[Seed], which: int, data: bytes) -> None:
    seed = found[which % len(found)]
    assert not read(seed, resealed(seed, data))


@settings(deadline=None, max_examples=300)
@given(values, st.lists(st.tuples(planes, sizes), max_size=3), st.binary(max_size=64))
@example({}, [(("x", "<f4", [2**31, 2**31], "zstd"), 4)], b"\x28\xb5\x2f\xfd")
@example({}, [(("x", "|u1", [2**63, 2], "raw"), 0)], b"")
@example({}, [(("x", "|u1", [0, 2**16, 2**62], "raw"), 0)], b"")
def test_a_header_of_any_structure_is_read_within_its_limit(
    head: object, described: list[tuple[tuple[str, str, list[int], str], int]], body: bytes
) -> None:
    blob = reseal(joined([head, [[*plane, stored] for plane, stored in described]], body))
    tracemalloc.start()
    try:
        unpack(blob, limit=LIMIT)
    except CodecError as error:
        assert "\n" not in str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 4 * LIMIT + 100 * len(blob)


@pytest.mark.parametrize("size", [LIMIT + 1, 1 << 28])
def test_a_small_frame_cannot_ask_for_more_than_the_limit(size: int) -> None:
    blob = pack({}, {"x": np.zeros(size, np.uint8)})
    assert len(blob) < size // 10
    tracemalloc.start()
    with pytest.raises(CorruptFrame, match=f"claims {size} bytes, at most {LIMIT}"):
        unpack(blob, limit=LIMIT)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < LIMIT


def test_a_header_that_nests_deeply_is_refused() -> None:
    packed = b"\x91" * 60_000 + b"\xc0"
    with pytest.raises(CorruptFrame):
        unpack(reseal(PREFIX.pack(b"KVCF", bytes(16), 1, len(packed)) + packed), limit=LIMIT)


def test_reading_keeps_to_its_memory_and_comes_to_an_end() -> None:
    """Address space for the largest header that is allowed, and not much more."""
    command = [sys.executable, "-m", "tests.fuzz_parts", "7", "400"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout.startswith("400 inputs"), done.stderr[-2000:]
    assert SPARE_BYTES < 1 << 30
