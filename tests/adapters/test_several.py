"""Several adapters side by side in generation, each against the model that has it alone."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import jvlm
from jvlm.adapters import several
from jvlm.adapters.attach import attach, extract
from jvlm.adapters.config import AdapterConfig
from jvlm.adapters.peft_write import write_peft
from jvlm.errors import UserError
from jvlm.inference.batch_file import generate_file
from jvlm.inference.generate import engine_for
from jvlm.inference.sampling import SamplingConfig
from jvlm.models import vlm
from tests import quick
from tests.adapters import golden
from tests.support import picture

KINDS = {
    "lora": AdapterConfig(rank=4, targets=("all-linear",)),
    "dora": AdapterConfig(rank=4, targets=("decoder", "embed", "patch_embed"), use_dora=True),
    "wide": AdapterConfig(rank=6, targets=("q_proj", "qkv"), use_rslora=True, alpha_pattern=(("q_proj", 3.0),)),
}


def random_adapter(model, config, seed):
    attached = attach(model, config, seed=seed)
    rng = np.random.default_rng(seed)
    values = {}
    for path, variable in vlm.variables(attached).items():
        value = variable.get_value()
        if path.endswith(".adapter.b"):
            value = jnp.asarray(0.2 * rng.standard_normal(value.shape, np.float32))
        elif path.endswith(".magnitude"):
            value = value * (1 + 0.3 * rng.random(value.shape, np.float32))
        values[path] = value
    return extract(vlm.bind(attached, values))


@pytest.fixture(scope="module")
def weights(tiny):
    return {name: random_adapter(tiny.model, config, seed) for seed, (name, config) in enumerate(KINDS.items(), 1)}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics2"])
def test_each_sequence_has_the_logits_of_its_adapter_and_the_bits_of_the_base_without_one(family):
    base, batch = golden.base(family), golden.batch(family)
    given = {name: golden.weights(family, name) for name in ("lora", "dora")}
    model = several.stacked(base, given)
    names = ["dora", None, "lora"]
    repeated = dataclasses.replace(
        batch,
        **{
            field.name: np.repeat(np.asarray(getattr(batch, field.name)), len(names), 0)
            for field in dataclasses.fields(batch)
            if not field.metadata.get("static")
        },
    )
    index = jnp.asarray(several.numbers(model.adapters, names))
    with several.choosing(index):
        found = quick.logits(model, repeated)
    for logits, name in zip(found, names, strict=True):
        if name is None:
            np.testing.assert_array_equal(logits, quick.logits(base, repeated)[1])
        else:
            np.testing.assert_allclose(logits, golden.expected(family, name)["logits"][0], atol=5e-5, rtol=0)


def asked(tmp_path, count=4):
    picture(60, 44).save(tmp_path / "a.png")
    rows = []
    for number in range(count):
        images = [str(tmp_path / "a.png")] if number % 2 else []
        content = f"{'<image>' * len(images)}what is {number}?"
        rows.append({"messages": [{"role": "user", "content": content}], "images": images})
    return rows


def test_requests_name_their_adapter_and_all_share_one_program(tiny, weights, tmp_path):
    for name, one in weights.items():
        write_peft(one, tiny.model.config, tmp_path / name)
    rows = asked(tmp_path)
    folders = {name: tmp_path / name for name in weights}
    settings = {"max_new_tokens": 6, "batch_size": 4}
    names = ["lora", None, "wide", "dora"]
    found = jvlm.generate(tiny.model, tiny.processor, rows, adapters=folders, adapter=names, **settings)
    base = jvlm.generate(tiny.model, tiny.processor, rows, **settings)
    assert found[1] == base[1]
    for number, name in enumerate(names):
        if name is not None:
            alone = attach(tiny.model, weights[name])
            assert [found[number]] == jvlm.generate(alone, tiny.processor, rows[number : number + 1], **settings)
    assert found != base
    model = several.load(tiny.model, folders)
    lines = [{**row, "adapter": name} for row, name in zip(rows, names, strict=True)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    generate_file(model, tiny.processor, tmp_path / "in.jsonl", tmp_path / "out.jsonl", SamplingConfig(6), batch_size=4)
    answers = [json.loads(line)["response"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert answers == found

    # other adapters for the same shapes compile nothing
    def compiled():
        counts = engine_for(model, tiny.processor).compilations
        return {name: counts[name] for name in ("encode", "first", "decode")}

    before = compiled()
    jvlm.generate(model, tiny.processor, rows, adapter=["dora", "lora", None, "wide"], **settings)
    assert compiled() == before


def test_an_unknown_name_and_adapters_that_cannot_share_are_refused(tiny, weights):
    model = several.stacked(tiny.model, weights)
    row = {"messages": [{"role": "user", "content": "hi"}], "adapter": "doar"}
    with pytest.raises(UserError, match="no adapter 'doar'; there are lora, dora, wide"):
        jvlm.generate(model, tiny.processor, [row], max_new_tokens=2)
    with pytest.raises(UserError, match="names the adapter 'doar', and the model was loaded without"):
        jvlm.generate(tiny.model, tiny.processor, [row], max_new_tokens=2)
    whole = attach(tiny.model, AdapterConfig(targets=("q_proj",), train_modules=("connector",)))
    with pytest.raises(UserError, match=r"'whole' brings whole parameters \(connector"):
        several.stacked(tiny.model, {"whole": extract(whole)})
    with pytest.raises(UserError, match=r"'head' is on decoder\.head\.kernel"):
        several.stacked(tiny.model, {"head": extract(attach(tiny.model, AdapterConfig(targets=("head",))))})
