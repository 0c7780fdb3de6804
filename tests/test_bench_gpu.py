"""`kvchat bench gpu` on a tiny shape, as far as a CPU goes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from kvchat import bench
from kvchat.bench.gpu import attention, chat, conversation
from kvchat.bench.gpu.shape import read_bytes, shaped
from kvchat.config import Config
from kvchat.errors import InputError
from tests.tiny import tiny_network, tiny_tokenizer

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 30000,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("model")
    tiny_network(attn_implementation="eager").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Config.load(overrides={"model.name": str(folder), "model.dtype": "float32", "model.device": "cpu"})


def test_it_needs_a_gpu(config: Config) -> None:
    with pytest.raises(InputError, match="needs a CUDA device, and the model runs on cpu"):
        bench.run("gpu", config)


def test_the_shape_and_its_weights_are_the_same_in_every_process(config: Config) -> None:
    one, two = (shaped(config.model, SHAPE) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    for (name, a), b in zip(one.network.named_parameters(), two.network.parameters(), strict=True):
        assert torch.equal(a, b), name
    embeddings = 300 * 64
    assert read_bytes(one.network) == 4 * (sum(p.numel() for p in one.network.parameters()) - embeddings)


def test_a_conversation_is_measured_through_the_path_that_a_chat_takes(config: Config, monkeypatch: Any) -> None:
    monkeypatch.setattr(chat, "SEALED_TOKENS", 130)
    monkeypatch.setattr(chat, "TURN_TOKENS", 60)
    figures = conversation(config, SHAPE, None, 2400, 1, 1e12)
    assert json.loads(json.dumps(figures)) == figures
    assert set(figures) == {"build", "memory", "recall", "seal", "resume", "decode", "machine"}
    build, memory, resumed = figures["build"], figures["memory"], figures["resume"]
    assert build["tokens"] >= 2400 and build["turns"] > 4
    assert memory["0.3"]["kept_bytes"] < memory["0.5"]["kept_bytes"] < memory["1.0"]["kept_bytes"]
    assert memory["1.0"]["kept_bytes"] == memory["dense_bytes"] == build["tokens"] * 2 * 2 * 2 * 16 * 4
    assert resumed["cached_tokens"] == build["tokens"] and resumed["prefilled_tokens"] < 100
    lengths = [int(key) for key in figures["decode"] if key.isdigit()]
    assert len(lengths) == 3 and lengths[0] == build["tokens"] and lengths[2] < 700 < 900 < lengths[1] < 1300
    for row in (figures["decode"][str(length)] for length in lengths):
        assert row["over_floor"] == row["token_s"]["median"] / row["floor_s"]
        assert row["floor_s"] == (figures["decode"]["weight_bytes"] + row["kept_bytes"]) / 1e12
    assert figures["seal"]["segment_tokens"] > 400


@pytest.mark.parametrize("name", list(attention.FORMS))
def test_random_rows_have_the_form_and_the_lengths_that_are_asked_for(name: str) -> None:
    given = attention.inputs(attention.FORMS[name], [70, 0, 1, 33, 5, 6, 7, 8], torch.device("cpu"), 0)
    assert given.rows.form == attention.FORMS[name]
    assert given.rows.cu_seqlens.tolist() == [0, 70, 70, 71, 104, 109, 115, 122, 130]
    assert attention.error(given) < 0.02
