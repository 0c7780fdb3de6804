"""Every benchmark on a tiny model: what it states, that ratios are those of its figures, and that it cleans up."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from kvchat import bench
from kvchat.bench import llama_cpp
from kvchat.bench.history import in_new_process, ratio, spread
from kvchat.bench.store import read_file, write_file
from kvchat.codecs import CODECS
from kvchat.config import Config
from kvchat.errors import CapacityError, InputError
from kvchat.events import Notice, Progress
from tests.tiny import tiny_network, tiny_tokenizer


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A tiny model on disk, for a process of its own must find it too."""
    folder = tmp_path_factory.mktemp("model")
    tiny_network(attn_implementation="eager").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    given = {"model.name": str(folder), "model.dtype": "float32", "model.device": "cpu"}
    compress = {"compress.segment_min": 128, "compress.keep_ratio": 0.7, "compress.recent_tokens": 0}
    return Config.load(overrides={**given, **compress})


@pytest.fixture(scope="module")
def told() -> list[Progress | Notice]:
    return []


@pytest.fixture(scope="module")
def figures(config: Config, told: list[Progress | Notice]) -> dict[str, Any]:
    found = bench.run("all", config, told.append, tokens=96, rounds=2)
    assert json.loads(json.dumps(found)) == found
    return found


def quotient(one: dict[str, float], other: dict[str, float]) -> Any:
    return pytest.approx(one["median"] / other["median"], abs=1e-3)


def test_all_runs_every_benchmark_on_one_history(figures: dict[str, Any], told: list[Progress | Notice]) -> None:
    assert set(figures) == {"bench", *bench.KINDS, "machine"}
    assert figures["bench"] == "all"
    others = [figures[kind]["history_tokens"] for kind in bench.KINDS if kind != "seal"]
    assert len(set(others)) == 1 and others[0] > 256
    assert [event.text for event in told if isinstance(event, Notice)] == [f"measuring {kind}" for kind in bench.KINDS]


def test_ratios_are_those_of_the_figures_beside_them(figures: dict[str, Any]) -> None:
    resume, decode, seal = figures["resume"], figures["decode"], figures["seal"]
    assert resume["speedup_over_transformers"] == quotient(resume["transformers_ttft_s"], resume["ttft_s"])
    for keep in ("1.0", "0.3"):
        found = quotient(decode["transformers_token_s"], decode[f"keep_{keep}_token_s"])
        assert decode[f"speedup_at_{keep}_over_transformers"] == found
    assert seal["seal_over_prefill"] == quotient(seal["seal_s"], seal["prefill_s"])
    prefill, speed = figures["prefill"], "tokens_per_s"
    for ours, plain in (("from_nothing", "from_nothing"), ("behind_keep_1.0", "behind"), ("behind_keep_0.7", "behind")):
        found = quotient(prefill[f"{ours}_{speed}"], prefill[f"{plain}_transformers_{speed}"])
        assert prefill[f"{ours}_over_transformers"] == found


def test_turns_come_back_before_a_question_and_leave(figures: dict[str, Any]) -> None:
    recall = figures["recall"]
    assert recall["segments"] == 1 and recall["tokens_back"] > recall["question_tokens"] > 0
    assert recall["recall_over_question"] == quotient(recall["recall_s"], recall["question_s"])
    assert recall["recall_from_store_s"]["min"] > 0


def test_a_resumed_session_reads_the_question_only(figures: dict[str, Any]) -> None:
    resume = figures["resume"]
    assert resume["cached_tokens"] == resume["history_tokens"]
    assert 0 < resume["prefilled_tokens"] < 100
    assert resume["bytes_on_disk"] > 0


def test_decode_holds_what_it_says(figures: dict[str, Any]) -> None:
    assert figures["decode"]["kept_pairs_at_0.3"] < 0.5 * figures["decode"]["pairs"]


def test_memory_shrinks_with_the_ratio(figures: dict[str, Any]) -> None:
    memory = figures["memory"]
    held = [memory[f"keep_{keep}_bytes"] for keep in (1.0, 0.5, 0.3)]
    assert held == sorted(held, reverse=True) and len(set(held)) == 3
    assert held[0] == memory["dense_bytes"]
    assert memory["keep_0.3_over_dense"] == pytest.approx(held[2] / held[0], abs=1e-3)
    assert 0 < memory["resume_restored_bytes"] < memory["dense_bytes"]
    if sys.platform == "linux":
        assert memory["resume_process_bytes"] > memory["resume_peak_growth_bytes"] > 0


def test_every_codec_is_measured_against_bfloat16(figures: dict[str, Any]) -> None:
    store = figures["store"]
    assert list(store["codecs"]) == [*CODECS, "archive"]
    assert store["bf16_bytes_per_token"] == 2 * 2 * 3 * 2 * 16
    assert store["compression_factor"] == pytest.approx(
        store["bf16_bytes_per_token"] / store["disk_bytes_per_token"], abs=1e-2
    )
    raw, eight = store["codecs"]["raw"], store["codecs"]["k8v8"]
    assert raw["bits_per_element_packed"] == 32  # of float32, the model's dtype
    assert 8 < eight["bits_per_element_packed"] < 16 < raw["bits_per_element_on_disk"]
    kl = {name: codec["kl"] for name, codec in store["codecs"].items()}
    assert kl["raw"] == pytest.approx(0, abs=1e-9) and 0 < kl["k8v8"] < kl["k4v4"] < kl["k2v2"] < 10
    assert kl["eb2"] < kl["eb10"] < kl["eb20"] and 0 < kl["archive"] < 10
    for codec in store["codecs"].values():
        # The rest of a frame is its header.
        assert codec["compression_factor"] == pytest.approx(16 / codec["bits_per_element_on_disk"], abs=1e-2)
        assert codec["write_over_file_fsync"] > 0 and codec["read_over_file"] > 0


def test_the_machine_is_described(figures: dict[str, Any]) -> None:
    machine = figures["machine"]
    assert machine["dtype"] == "float32" and machine["attention"] == "sdpa" and machine["device"] == "cpu"
    assert machine["cpu"] and machine["cores"] >= 1 and machine["torch"] == torch.__version__


def test_without_llama_cpp_its_figures_are_empty_and_one_line_says_why(figures: dict[str, Any]) -> None:
    for kind, name in (("resume", "llama.cpp_ttft_s"), ("decode", "llama.cpp_token_s")):
        assert figures[kind][name] is None
        assert figures[kind]["llama.cpp_problem"].startswith("llama.cpp: ")


def test_the_table_has_a_line_for_every_figure(figures: dict[str, Any]) -> None:
    rows = {row["figure"]: row["value"] for row in bench.rows(figures)}
    ttft = figures["resume"]["ttft_s"]
    assert rows["resume.ttft_s"] == f"{ttft['median']:.4g} ({ttft['min']:.4g} to {ttft['max']:.4g})"
    assert rows["resume.llama.cpp_ttft_s"] == ""
    assert "store.codecs.raw.decode_mb_per_s" in rows


def test_one_kind_alone_gives_its_figures_and_leaves_no_files(config: Config, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said = [{"role": "user", "content": "The sea is wide."}, {"role": "assistant", "content": "And deep."}]
    found = bench.run("seal", config, tokens=96, rounds=1, messages=said)
    assert found["bench"] == "seal" and found["seal_s"]["median"] > 0
    # The first round adds a turn, the measured ones are taken back.
    assert 128 < found["segment_tokens"] < found["history_tokens"] < 3 * found["segment_tokens"]
    assert list(tmp_path.iterdir()) == []


def test_one_that_fails_does_not_cost_the_others(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(subject: object) -> dict[str, Any]:
        raise CapacityError("no room")

    monkeypatch.setattr(bench, "KINDS", {"seal": full, "last": lambda subject: {"rounds": subject.rounds}})
    found = bench.run("all", config, tokens=96, rounds=4)
    assert found["seal"] == {"problem": "no room"} and found["last"] == {"rounds": 4}


def test_an_unknown_benchmark_is_one_line(config: Config) -> None:
    with pytest.raises(InputError, match="no benchmark 'speed'; known: all, resume, decode"):
        bench.run("speed", config)


def test_a_failing_measuring_process_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nValueError: no session\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match=r"^the measuring process failed: ValueError: no session$"):
        in_new_process({"kind": "memory"})


def test_a_spread_needs_every_run() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert spread([1.0, None]) is None
    assert ratio(spread([3.0]), spread([2.0])) == 1.5
    assert ratio(None, spread([2.0])) is None


def test_llama_cpp_that_is_not_installed_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with llama_cpp.serving("x.gguf", torch.device("cpu"), 100, None) as server:
        assert server.problem == "llama.cpp: not installed (pip install xllamacpp)"
        assert server.token_s([1, 2], 3) is None and server.ttft_s([1, 2]) is None


def test_a_server_that_does_not_start_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF and nothing else")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: ModuleSpec(name, None))
    with llama_cpp.serving(str(file), torch.device("cpu"), 100, None) as server:
        assert server.problem is not None and server.problem.startswith("llama.cpp: did not start: ")
        assert server.prefill_s([1]) is None


def test_a_server_that_stops_answering_is_ended_and_the_first_reason_stands() -> None:
    ended = count()
    server = llama_cpp.LlamaCpp("http://127.0.0.1:9", None, lambda: next(ended) and None)
    assert server.save_s() is None
    assert server.problem is not None and server.problem.startswith("llama.cpp: /slots/0?action=save failed: ")
    server.fail("later")
    assert server.problem != "later" and next(ended) == 2


def test_bytes_of_a_plain_file_come_back(tmp_path: Path) -> None:
    for sync in (False, True):
        write_file(tmp_path / "plain", [b"abc", b"defg"], sync)
        assert (tmp_path / "plain").read_bytes() == b"abcdefg"
    read_file(tmp_path / "plain", [3, 4])
    with pytest.raises(AssertionError):
        read_file(tmp_path / "plain", [3, 5])
