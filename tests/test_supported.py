from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from kvchat.engine import Engine
from kvchat.errors import ModelError
from kvchat.supported import cache_keyword, context_window, read_config, unsupported
from tests.tiny import FAMILIES, make_model, tiny_config

ROPE = {"rope_theta": 10000.0}
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
REFUSED = {
    "sliding_attention": ("gemma2", {}, "layer 0 is sliding_attention"),
    "mistral window": ("mistral", {"sliding_window": 2048}, "sliding window of 2048 tokens"),
    "phi3 window": ("phi3", {"sliding_window": 2047}, "sliding window of 2047 tokens"),
    "qwen2 window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, "layer 0 is sliding_attention"),
    "sinks": ("gpt_oss", {"layer_types": ["full_attention"] * 36}, "learned sinks"),
    "softcapping": ("gemma2", {"layer_types": ["full_attention"] * 26}, "attn_logit_softcapping"),
    "latent": ("deepseek_v3", {}, "kv_lora_rank"),
    "encoder-decoder": ("t5", {}, "t5 is an encoder-decoder"),
    "state space": ("mamba", {}, "no decoder for mamba"),
    "hybrid": ("qwen3_next", {}, "qwen3_next"),
    "multimodal": ("llava", {}, "llava is multimodal"),
    "not text": ("vit", {}, "no decoder for vit"),
    "dynamic rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **ROPE}}, "RoPE is dynamic"),
}
FINE = {
    "mistral without window": ("mistral", {"sliding_window": None}),
    "a window as long as the context": ("mistral", {"sliding_window": 4096, "max_position_embeddings": 4096}),
    "a window that is switched off": ("qwen2", {"sliding_window": 1024, "use_sliding_window": False}),
    "experts": ("qwen3_moe", {}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, **ROPE}}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_attention_is_refused_in_one_line_from_the_configuration_alone(case, tmp_path):
    family, settings, reason = REFUSED[case]
    AutoConfig.for_model(family, **settings).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as error:
        read_config("X", tmp_path)
    assert str(error.value).startswith("X cannot run here: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", FINE)
def test_full_attention_is_accepted(case):
    family, settings = FINE[case]
    assert unsupported(AutoConfig.for_model(family, **settings)) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_window_is_what_the_model_was_made_for(family):
    config = tiny_config(family, 4, 2, 3, 16)
    assert unsupported(config) is None
    assert context_window(config) == 4096


def test_longrope_stays_below_the_length_at_which_its_frequencies_change():
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 4096, **ROPE, **LONG}
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
    config = AutoConfig.for_model(
        "phi3", max_position_embeddings=131072, sliding_window=None, rope_parameters=rope, **shape
    )
    assert unsupported(config) is None
    assert context_window(config) == 3072


def test_a_model_with_code_of_its_own_is_refused_without_running_it(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    (tmp_path / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}')
    with pytest.raises(ModelError, match="cannot read the configuration of X"):
        read_config("X", tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "nothing"}', "{}"])
def test_a_broken_configuration_is_one_line(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match="cannot read the configuration of X") as error:
        read_config("X", tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 320


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_is_given_its_cache_by_the_name_it_has(family):
    engine = Engine(make_model(family), 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of the former name
        logits = engine.forward(engine.new_cache(), [5, 80, 33])
    assert logits.shape[0] == 1
    assert cache_keyword(SimpleNamespace(forward=lambda input_ids, past_key_values: None)) == "past_key_values"
    assert cache_keyword(SimpleNamespace(forward=lambda input_ids, cache: None)) == "cache"
