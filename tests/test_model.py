from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from kvchat.errors import ConfigError, ModelError
from kvchat.fingerprint import TEXT_FIELDS, fingerprint_difference, fingerprint_id
from kvchat.model import Model, load
from kvchat.sections import ModelConfig
from tests.tiny import CHATML, FAMILIES, tiny_network, tiny_tokenizer

LOAD_THREE = """
import json, sys
from pathlib import Path
from kvchat.sections import ModelConfig
from kvchat.errors import ModelError
from kvchat.model import load
folder, there, nowhere, cache = *sys.argv[1:4], Path(sys.argv[4])
print(load(ModelConfig(name=there, device="cpu"), cache=cache).name)
try:
    load(ModelConfig(name=nowhere), cache=cache)
except ModelError as error:
    print(error)
config = ModelConfig(name=folder, dtype="float32", device="cpu", attention="reference")
print(json.dumps(load(config, cache=cache).fingerprint))
"""
"""What another process says: the name of a model of the hub, why there is none of another, a folder's fingerprint."""


def settings(path: Path | str, **more: str) -> ModelConfig:
    return ModelConfig(**{"name": str(path), "dtype": "float32", "device": "cpu", "attention": "reference", **more})


def save(path: Path, family: str = "llama", seed: int = 0, template: str = CHATML) -> Path:
    tiny_network(family, seed=seed, attn_implementation="eager").save_pretrained(path)
    tiny_tokenizer(template).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def loaded(folder) -> Model:
    return load(settings(folder), cache=folder / "cache")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_supported_family_loads_from_a_folder_and_computes_the_same(family, tmp_path):
    model = load(settings(save(tmp_path / "model", family)), cache=tmp_path)
    ids = torch.arange(40)[None]
    expected = tiny_network(family, attn_implementation="eager")(ids).logits
    torch.testing.assert_close(model.network(ids).logits, expected, rtol=1e-4, atol=1e-4)
    shape = (model.num_hidden_layers, model.num_attention_heads, model.num_key_value_heads, model.head_dim)
    assert shape == (3, 4, 2, 16)
    assert (model.context_window, model.dtype, model.device) == (4096, torch.float32, torch.device("cpu"))


def test_a_reply_ends_at_the_tokens_of_configuration_tokenizer_and_template(tmp_path):
    save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 257]}))
    assert load(settings(tmp_path), cache=tmp_path).stop_ids == {5, 257}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert load(settings(tmp_path), cache=tmp_path).stop_ids == {7, 257}


def test_the_name_of_a_folder_is_kept_as_an_absolute_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert load(settings(folder.name), cache=folder / "cache").name == str(folder)


def test_loading_is_silent_and_leaves_the_settings_of_transformers(folder, capfd):
    log = transformers.utils.logging
    before = (log.get_verbosity(), log.is_progress_bar_enabled())
    phases = []
    load(settings(folder), lambda event: phases.append((event.phase, event.done == event.total)), folder / "cache")
    assert capfd.readouterr() == ("", "")
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before
    assert phases == [("load", False), ("load", True)]


@pytest.fixture(scope="module")
def elsewhere(folder, tmp_path_factory) -> subprocess.CompletedProcess[str]:
    """LOAD_THREE run without a network, with a cache of the hub's files, and with other hashes than here."""
    cache = tmp_path_factory.mktemp("elsewhere")
    hub = cache / "hub" / "models--some--tiny"
    save(hub / "snapshots" / ("a" * 40))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("a" * 40)
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    apart = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", LOAD_THREE, str(folder), "some/tiny", "nobody/nothing", str(cache)]
    return subprocess.run(command, env=apart, capture_output=True, text=True, check=True)


def test_a_fingerprint_is_the_same_in_every_process(elsewhere, loaded):
    assert json.loads(elsewhere.stdout.splitlines()[2]) == loaded.fingerprint
    assert set(loaded.fingerprint) == {"weights", "config", "tokenizer", "template", "dtype", "rope", "format"}


def test_a_changed_weight_changes_the_weights_only(loaded, tmp_path):
    save(tmp_path)
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    changed = load(settings(tmp_path), cache=tmp_path).fingerprint
    assert fingerprint_difference(loaded.fingerprint, changed) == ["weights"]
    assert fingerprint_id(loaded.fingerprint) != fingerprint_id(changed)


def test_a_changed_template_changes_a_field_on_which_ids_depend(loaded, tmp_path):
    changed = load(settings(save(tmp_path, template=CHATML + "\n")), cache=tmp_path).fingerprint
    assert fingerprint_difference(loaded.fingerprint, changed) == ["template"]
    assert "template" in TEXT_FIELDS


def test_another_dtype_or_rope_is_another_fingerprint(folder, loaded, tmp_path):
    half = load(settings(folder, dtype="bfloat16"), cache=tmp_path)
    assert fingerprint_difference(loaded.fingerprint, half.fingerprint) == ["dtype"]
    assert half.fingerprint["dtype"] == "bfloat16"
    config = json.loads((save(tmp_path / "rope") / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5000.0
    (tmp_path / "rope" / "config.json").write_text(json.dumps(config))
    turned = load(settings(tmp_path / "rope"), cache=tmp_path).fingerprint
    assert fingerprint_difference(loaded.fingerprint, turned) == ["config", "rope"]


def test_the_version_that_wrote_a_configuration_does_not_count(loaded, tmp_path):
    config = json.loads((save(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0.0", "use_cache": False}))
    assert load(settings(tmp_path), cache=tmp_path).fingerprint == loaded.fingerprint


def test_equal_fingerprints_have_one_id(loaded):
    backwards = dict(reversed(loaded.fingerprint.items()))
    assert fingerprint_id(backwards) == fingerprint_id(loaded.fingerprint)
    assert fingerprint_difference(backwards, loaded.fingerprint) == []


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_is_not_a_whole_model_is_refused(missing, tmp_path):
    save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ModelError, match=f"has no {missing}; give the folder of a whole model"):
        load(settings(tmp_path), cache=tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    save(tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"has no model-1\.safetensors"):
        load(settings(tmp_path), cache=tmp_path)


def test_weights_that_lack_a_tensor_are_not_filled_with_random_numbers(tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ModelError, match=r"lacks 9 weights, first model\.layers\.3\..*; get a whole copy"):
        load(settings(tmp_path), cache=tmp_path)


@pytest.mark.parametrize("settings_changed", [{"hidden_size": 32}, {"vocab_size": 100}])
def test_weights_of_another_shape_are_one_line(settings_changed, tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **settings_changed}))
    with pytest.raises(ModelError) as error:
        load(settings(tmp_path), cache=tmp_path)
    assert "\n" not in str(error.value)


def test_cut_weights_are_one_line(tmp_path):
    weights = save(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot load") as error:
        load(settings(tmp_path), cache=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", '{"model": 1}'])
def test_a_broken_tokenizer_is_one_line(text, tmp_path):
    (save(tmp_path) / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match="cannot load the tokenizer of") as error:
        load(settings(tmp_path), cache=tmp_path)
    assert "\n" not in str(error.value)


def test_a_model_is_refused_before_its_weights_are_read(tmp_path):
    config = transformers.AutoConfig.for_model("mistral", sliding_window=2048)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(ModelError, match="sliding window of 2048 tokens"):
        load(settings(tmp_path), cache=tmp_path)


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cuda:-1", "cpu:1", "meta", ""])
def test_a_device_that_is_not_there_is_one_line(name, folder):
    with pytest.raises(ConfigError, match=r"device .*; use auto") as error:
        load(settings(folder, device=name), cache=folder / "cache")
    assert "\n" not in str(error.value)


def test_auto_takes_a_dtype_that_the_device_computes_in(folder):
    model = load(settings(folder, dtype="auto"), cache=folder / "cache")
    assert model.dtype in (torch.bfloat16, torch.float32)
    assert {parameter.dtype for parameter in model.network.parameters()} == {model.dtype}


def test_a_hub_id_is_taken_from_the_local_cache_and_is_one_line_without_a_network(elsewhere):
    loaded, refused, _ = elsewhere.stdout.splitlines()
    assert loaded == "some/tiny"
    assert refused.startswith("cannot get the model 'nobody/nothing' from Hugging Face (")
    assert elsewhere.stderr == ""


@pytest.mark.weights
def test_the_builtin_model_answers(builtin_model):
    template = builtin_model.template
    opening = template.system(None).ids + template.user("What is the capital of France?", first=True).ids
    ids, stream, text = [*opening, *template.generation_prompt], template.stream(), ""
    while (
        token := int(builtin_model.network(torch.tensor([ids])).logits[0, -1].argmax())
    ) not in builtin_model.stop_ids:
        ids.append(token)
        text += stream.step(token)
    assert text + stream.flush() == "The capital of France is Paris."
    assert builtin_model.name == "smollm2-135m"
    assert builtin_model.context_window == 8192
