"""The perplexity of texts is that of transformers' model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jvlm.inference.perplexity import TextPerplexity
from tests.support import CORPUS

TEXTS = [CORPUS[0], "the cat", CORPUS[2] + CORPUS[1], "a", CORPUS[3]]


def reference(model, tokenizer, texts, most=1024):
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:most]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="mean")
        found.append(float(torch.exp(losses)) if ids.shape[1] > 1 else float("inf"))
    return found


def test_perplexity_equals_that_of_transformers_whatever_texts_are_beside(tiny):
    score = TextPerplexity(tiny.folder)
    found = score(TEXTS)
    np.testing.assert_allclose(found, reference(tiny.torch_model, tiny.processor.tokenizer, TEXTS), rtol=2e-4)
    np.testing.assert_allclose(score(TEXTS[2:3]), found[2:3], rtol=1e-5)


@pytest.mark.slow
def test_perplexity_of_a_language_model_alone_equals_that_of_transformers(tokenizer_folder, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = TextPerplexity(tmp_path, max_tokens=20)(TEXTS)
    np.testing.assert_allclose(found, reference(model, tokenizer, TEXTS, 20), rtol=2e-4)
