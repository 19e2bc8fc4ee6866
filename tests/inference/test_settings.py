"""What a batch file's answers depend on: any change shows, and nothing else does."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import jvlm
from jvlm.errors import UserError
from jvlm.inference import settings as module
from jvlm.inference.batch_file import FileResult, generate_file
from jvlm.inference.engine import Engine
from jvlm.inference.sampling import SamplingConfig
from jvlm.inference.settings import _checksums, answer_settings, files_hash, settings_hash, weights_hash
from jvlm.weights.fingerprints import mixed_sum
from tests.inference.support import prompt
from tests.support import cpu_devices, fmix32, random_tensors, run_python, tensor_shapes, write_tensors


@pytest.fixture(scope="module")
def engine(tiny):
    return Engine(tiny.model, tiny.processor)


def brute_force(values):
    """The checksum in integers of Python's own size."""
    bits = np.asarray(values).reshape(-1)
    bits = bits.view(f"uint{8 * bits.dtype.itemsize}")
    return sum(fmix32(int(b) + (i + 1) * 0x9E3779B1) for i, b in enumerate(bits)) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (4, 3, 2), (0, 4)])
def test_checksums_equal_a_sum_in_plain_integers(shape, dtype):
    values = jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)
    assert int(mixed_sum(values)) == brute_force(values)


@pytest.mark.parametrize("most", [1, 3, 10, 60, 100])
def test_as_many_values_as_are_asked_for_are_read(most):
    values = jnp.arange(5 * 4 * 3.0).reshape(5, 4, 3)
    sample = np.asarray(module._sample(values, most))
    assert most // 8 <= sample.size <= most
    assert len(set(sample.ravel().tolist())) == sample.size
    assert [int(s) for s in module._checksums([values], most)] == [brute_force(sample)]


def test_another_seed_another_order_and_one_bit_are_other_weights(tiny, tmp_path):
    model, _ = jvlm.load(tiny.folder)
    before = weights_hash(model)
    assert before == weights_hash(tiny.model)
    kernel = model.decoder.head.kernel
    value = kernel[...]
    kernel[...] = jnp.flip(value, 0)
    assert weights_hash(model) != before
    kernel[...] = value.at[3, 5].set(jnp.nextafter(value[3, 5], jnp.inf))
    assert weights_hash(model) != before
    kernel[...] = value
    assert weights_hash(model) == before
    for path in tiny.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_tensors(tmp_path, random_tensors(tensor_shapes(tiny.config), seed=1))
    assert weights_hash(jvlm.load(tmp_path)[0]) != before


def test_every_setting_that_decides_an_answer_is_in_the_hash(tiny, engine, monkeypatch):
    def now(**sampling):
        return settings_hash(answer_settings(tiny.model, engine, SamplingConfig(**sampling)))

    before = now()
    assert now() == before
    changes = {
        "max_new_tokens": 3, "temperature": 0.5, "top_k": 2, "top_p": 0.5, "repetition_penalty": 1.1, "seed": 1,
        "stop_token_ids": (1,),
    }  # fmt: skip
    hashes = {now(**{name: value}) for name, value in changes.items()}
    with monkeypatch.context() as patch:
        patch.setattr(tiny.processor.tokenizer, "chat_template", "{{ messages }}")
        hashes.add(now())
    with monkeypatch.context() as patch:
        patch.setitem(tiny.processor.generation, "eos_token_id", [5])
        hashes.add(now())
    image_config = dataclasses.replace(tiny.processor.image_config, max_pixels=784 * 7)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "processor", tiny.processor.replace(image_config=image_config))
        hashes.add(now())
    tiny.processor.tokenizer(["a", "b c d"], padding=True)
    assert now() == before
    assert len({before, *hashes}) == len(changes) + 4


def test_data_is_known_by_what_it_holds(tmp_path):
    for name, text in {"a": "1", "b": "1", "c": "2"}.items():
        (tmp_path / name).write_text(text)
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert files_hash([a]) == files_hash([b])
    assert len({files_hash(names) for names in ([a], [c], [a, c], [c, a])}) == 4


def test_an_output_goes_on_with_the_same_model_and_sampling_only(tiny, tmp_path):
    examples = [prompt(text) for text in "abc"]
    data, output = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for example in examples))

    def run(model=tiny.model, accept_changes=False, **sampling):
        sampling = SamplingConfig(**{"max_new_tokens": 3} | sampling)
        return generate_file(model, tiny.processor, data, output, sampling, accept_changes=accept_changes)

    assert run() == FileResult(3, 0, 0)
    whole = output.read_bytes()
    kept = b"".join(whole.splitlines(keepends=True)[:2])
    output.write_bytes(kept)
    other, _ = jvlm.load(tiny.folder)
    other.decoder.head.kernel[...] = jnp.flip(other.decoder.head.kernel[...], 1)
    with pytest.raises(UserError, match=r"model\.weights: '\w+' -> '\w+'"):
        run(other)
    with pytest.raises(UserError, match=r"sampling\.max_new_tokens: 3 -> 9; sampling\.temperature: 0\.0 -> 1\.0"):
        run(max_new_tokens=9, temperature=1.0)
    data.write_text(data.read_text() + json.dumps(prompt("d")) + "\n")
    with pytest.raises(UserError, match="examples: 3 -> 4"):
        run()
    assert output.read_bytes() == kept
    assert run(accept_changes=True) == FileResult(2, 0, 2)
    assert output.read_bytes().startswith(whole)


def test_checksums_do_not_depend_on_the_devices():
    code = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jvlm.inference.settings import _checksums
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
x = np.random.default_rng(0).standard_normal((6, 10, 4))
places = [NamedSharding(mesh, p) for p in (P(), P(None, "a"), P("b", "a"), P("a", None, "b"))]
for most in (10**6, 50):
    print(len({int(_checksums([jax.device_put(x, place)], most)[0]) for place in places}))
"""
    assert run_python(code, **cpu_devices(4)) == "1\n1\n"


def test_arrays_that_differ_everywhere_alike_have_other_checksums():
    x = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    others = [x, 2 * x, 4 * x, -x, np.abs(x), x[::-1], x.T.reshape(x.shape), np.roll(x, 1), x + 0.0 * x[::-1] + 1]
    assert len({int(n) for n in _checksums([jnp.asarray(other) for other in others], 10**6)}) == len(others)
