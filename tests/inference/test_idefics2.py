"""Idefics2 answers as in transformers, beyond its sliding window too."""

import pytest

from jvlm.inference.generate import complete, engine_for
from jvlm.inference.sampling import SamplingConfig
from tests.idefics2 import CASES, FAKE, IMAGE, create, hf_inputs

NAMES = ("three pictures of different sizes", "text only", "several turns")


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "split"])
def tiny(request, tmp_path_factory):
    return create(tmp_path_factory.mktemp("idefics2"), split=request.param)


def test_greedy_answers_equal_transformers_together_in_one_batch(tiny):
    records = [{**CASES[n], "messages": CASES[n]["messages"][:-1]} for n in NAMES]
    assert len(tiny.processor.encode(records[0]).tokens) > tiny.config["text_config"]["sliding_window"]
    engine = engine_for(tiny.model, tiny.processor)
    examples = [tiny.processor.encode(record, generation_prompt=True) for record in records]
    done = complete(engine, examples, SamplingConfig(max_new_tokens=12), request_ids=range(3))
    # ids without a token, and media, are never given
    never = [tiny.processor.tokenizer.convert_tokens_to_ids(t) for t in (FAKE, IMAGE)]
    never += range(len(tiny.processor.tokenizer), tiny.config["text_config"]["vocab_size"])
    for record, completion in zip(records, done, strict=True):
        inputs = hf_inputs(tiny, record, generation_prompt=True)
        found = tiny.torch_model.generate(**inputs, max_new_tokens=12, do_sample=False, suppress_tokens=never)
        assert list(completion.tokens) == found[0, inputs["input_ids"].shape[1] :].tolist()


def test_the_end_of_an_utterance_ends_an_answer_without_a_generation_config(tiny):
    engine = engine_for(tiny.model, tiny.processor)
    ids = {tiny.processor.tokenizer.convert_tokens_to_ids(t) for t in ("</s>", "<end_of_utterance>")}
    stored, tiny.processor.generation = tiny.processor.generation, {}
    try:
        assert engine.stop_tokens(SamplingConfig()) == ids
    finally:
        tiny.processor.generation = stored
