"""The model: configurations, equality with transformers, files."""

import pytest
import torch
import transformers

from llmbook.model import ModelConfig, TransformerLM, count_parameters

PUBLISHED = {
    "gpt2": 124_439_808,
    "llama3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_counts(name):
    config = ModelConfig.preset(name)
    with torch.device("meta"):
        model = TransformerLM(config)
    assert count_parameters(config) == count_parameters(model) == PUBLISHED[name]


def test_a_transformers_llama_opens_in_ours(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = TransformerLM.from_pretrained(tmp_path)
    ids = torch.randint(97, (2, 20))
    torch.testing.assert_close(ours(ids), theirs(ids).logits)
