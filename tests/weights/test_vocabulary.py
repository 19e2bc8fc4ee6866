"""Tokens beyond the embedding table are refused by name, or get a row each on request."""

import json

import ml_dtypes
import numpy as np
import pytest

import jvlm
from jvlm import cli
from jvlm.data.errors import ExampleError
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.layers import Precision
from jvlm.training import starting_model
from jvlm.training.config import AdaptConfig, Experiment
from jvlm.weights.convert import convert
from tests import idefics2, support

EXTRA = tuple(f"<extra_{i}>" for i in range(12))
ROWS, NEEDED = 340, 346  # the special tokens of the tokenizer end at 334
ROW = {"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "yes"}]}


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A tokenizer with twelve tokens more than usual."""
    return support.make_tokenizer(tmp_path_factory.mktemp("extended"), (*support.SPECIAL_TOKENS, *EXTRA))


@pytest.fixture
def make(extended, tmp_path):
    """Writes a checkpoint with a table of so many rows; returns its folder and its tensors."""

    def write(rows=ROWS, *, dtype=np.float32, nested=False, **changes):
        folder = tmp_path / "source"
        config = support.tiny_config(support.token_ids(extended), vocab_size=rows, **changes)
        tensors = support.random_tensors(support.tensor_shapes(config))
        tensors = {name: value.astype(dtype) for name, value in tensors.items()}
        if nested:
            vision = config.pop("vision_config")
            text = {**config, "model_type": "qwen2_5_vl_text"}
            config = {**config, "text_config": text, "vision_config": vision}
            del config["vocab_size"]
        support.write_folder(folder, extended, {"eos_token_id": 322, **config}, limits=(4 * 784, 64 * 784))
        support.write_tensors(folder, tensors)
        return folder, tensors

    return write


def test_the_tokenizer_of_these_tests_needs_as_many_rows_as_they_say(extended):
    assert support.token_ids(extended)["<extra_11>"] == NEEDED - 1


@pytest.mark.parametrize("rows", [NEEDED, NEEDED + 1, 400])
def test_a_table_as_large_as_the_vocabulary_or_larger_is_usual(make, rows):
    folder, _ = make(rows)
    model, processor = jvlm.load(folder, grow_embedding=True)
    assert model.config.decoder.vocab_size == rows
    jvlm.generate(model, processor, [ROW], max_new_tokens=2)


@pytest.mark.parametrize("door", ["load", "data check", "train", "generate"])
def test_tokens_without_a_row_are_refused_with_their_names_ids_and_the_rows(make, tmp_path, capsys, door):
    folder, _ = make()
    rows = tmp_path / "examples.jsonl"
    rows.write_text(json.dumps(ROW) + "\n")
    says = "6 tokens without a row in the embedding table of 340 rows: <extra_6> (340), <extra_7> (341)"
    if door == "load":
        with pytest.raises(UserError) as caught:
            jvlm.load(folder)
        said = str(caught.value)
    elif door == "train":
        with pytest.raises(UserError) as caught:
            starting_model.start_model(Experiment(name="run", init_from=str(folder)))
        said = str(caught.value)
    else:
        arguments = {
            "data check": ["data", "check", str(rows), "--model", str(folder)],
            "generate": ["generate", "--model", str(folder), "--prompt", "hi"],
        }
        assert cli.main(arguments[door]) == 2
        said = capsys.readouterr().err
    assert says in said
    assert "grow_embedding" in said


@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
def test_a_token_added_after_loading_is_an_error_of_the_row_that_has_it_or_text_if_special(make, special):
    folder, _ = make(NEEDED)
    _, processor = jvlm.load(folder)
    processor.tokenizer.add_tokens(["<late>"], special_tokens=special)
    row = {"messages": [{"role": "user", "content": "a <late> one"}, *ROW["messages"][1:]]}
    if special:  # in text, a special token's spelling is words
        assert processor.encode(row).tokens.max() < NEEDED
        return
    with pytest.raises(ExampleError, match=r"token '<late>' has id 346, and the embedding table 346 rows"):
        processor.encode(row)


def test_an_idefics2_without_a_row_for_the_end_of_an_utterance_is_refused_or_grown(tmp_path):
    """Idefics2-8b-base: 32002 rows, where the processor's <end_of_utterance> is 32002."""
    end = support.token_ids(idefics2.write_tokenizer(tmp_path / "tokenizer"))[idefics2.END]
    folder = tmp_path / "base"
    values = idefics2.write_folder(folder, split=False, vocab_size=end)
    assert values["text_config"]["vocab_size"] == end
    with pytest.raises(UserError, match=rf"{idefics2.END} \({end}\)"):
        jvlm.load(folder)
    model, processor = jvlm.load(folder, grow_embedding=True)
    assert model.config.decoder.vocab_size == end + 1
    example = processor.encode(ROW)
    assert np.sum(example.tokens == end) == 2
    jvlm.save(model, processor, tmp_path / "grown")
    assert json.loads((tmp_path / "grown" / "config.json").read_text())["text_config"]["vocab_size"] == end + 1


def test_growing_adds_the_tokens_that_end_a_turn_to_a_tokenizer_that_lacks_them(tmp_path):
    """As the released base model comes, whose tokenizer has two added tokens."""
    folder = tmp_path / "base"
    values = idefics2.write_folder(folder, split=False, vocab_size=400)
    kept = [token for token in idefics2.SPECIAL if token != idefics2.END]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    support.make_tokenizer(folder, kept, begin="<s>", **settings)
    assert values["text_config"]["vocab_size"] == 400
    _, plain = jvlm.load(folder)
    assert plain.stop_ids == ()
    _, grown = jvlm.load(folder, grow_embedding=True)
    (end,) = grown.stop_ids
    assert grown.tokenizer.convert_ids_to_tokens(end) == idefics2.END
    assert grown.encode(ROW).tokens.tolist().count(end) == 2


def _grown(table, rows):
    """In float64: what the table must become."""
    exact = table.astype(np.float64)
    return np.concatenate([exact, np.repeat(exact.mean(0, keepdims=True), rows - len(exact), 0)])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "text_config"])
def test_a_grown_table_keeps_its_rows_and_has_their_mean_in_the_new_ones(make, tmp_path, tied, dtype, nested):
    folder, tensors = make(dtype=dtype, nested=nested, tie_word_embeddings=tied)
    model, processor = jvlm.load(folder, grow_embedding=True, precision=Precision())
    found = {path: np.asarray(v.get_value()) for path, v in vlm.parameters(model).items()}
    tolerance = {"rtol": 2**-7 if dtype != np.float32 else 1e-6, "atol": 1e-3 if dtype != np.float32 else 1e-7}
    np.testing.assert_allclose(
        found["decoder.embedding"], _grown(tensors["model.embed_tokens.weight"], NEEDED), **tolerance
    )
    assert ("decoder.head.kernel" in found) != tied
    if not tied:
        np.testing.assert_allclose(
            found["decoder.head.kernel"].T, _grown(tensors["lm_head.weight"], NEEDED), **tolerance
        )
    # the same tensors from all doors: an export of the loaded model, a converted folder, and a run folder
    jvlm.save(model, processor, tmp_path / "saved")
    convert(folder, tmp_path / "converted", grow_embedding=True)
    saved, converted = (support.raw_tensors(tmp_path / name) for name in ("saved", "converted"))
    assert saved == converted
    for name in ("saved", "converted"):
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert {written.get("vocab_size"), written.get("text_config", {}).get("vocab_size")} <= {NEEDED, None}
        again, _ = jvlm.load(tmp_path / name)
        assert again.config.decoder.vocab_size == NEEDED
    jvlm.save(model, processor, tmp_path / "run", format="jvlm")
    assert jvlm.load(tmp_path / "run")[0].config.decoder.vocab_size == NEEDED


def test_a_grown_model_loads_in_transformers_with_the_same_logits(make, tmp_path):
    import torch

    folder, _ = make()
    model, processor = jvlm.load(folder, grow_embedding=True)
    jvlm.save(model, processor, tmp_path / "saved")
    batch = processor.pack([{"messages": [{"role": "user", "content": "a <extra_9> b"}]}], generation_prompt=True)
    length = int(batch.segment_ids.sum())
    with torch.no_grad():
        ids = torch.from_numpy(np.asarray(batch.tokens[:, :length], np.int64))
        theirs = support.torch_model(tmp_path / "saved")(input_ids=ids).logits.numpy()[0]
    assert theirs.shape[1] == NEEDED
    np.testing.assert_allclose(np.asarray(model(batch))[0, :length], theirs, atol=1e-4)


def test_an_experiment_grows_the_table_of_the_model_it_starts_from(make):
    folder, _ = make()
    experiment = Experiment(name="run", init_from=str(folder), adapt=AdaptConfig(grow_embedding=True))
    model, processor = starting_model.start_model(experiment)
    assert model.config.decoder.vocab_size == processor.model.decoder.vocab_size == NEEDED
    assert vlm.parameters(model)["decoder.embedding"].get_value().shape == (NEEDED, 64)


def test_a_run_folder_whose_tokenizer_has_grown_grows_too(make, tmp_path):
    folder, _ = make(NEEDED)
    jvlm.save(*jvlm.load(folder), tmp_path / "run", format="jvlm")
    tokenizer = jvlm.load(folder)[1].tokenizer
    tokenizer.add_tokens(["<late>"], special_tokens=True)
    tokenizer.save_pretrained(str(tmp_path / "run" / "processor"))
    with pytest.raises(UserError, match=r"<late> \(346\)"):
        jvlm.load(tmp_path / "run")
    model, _ = jvlm.load(tmp_path / "run", grow_embedding=True)
    table = np.asarray(vlm.parameters(model)["decoder.embedding"].get_value())
    np.testing.assert_allclose(table[-1], table[:-1].astype(np.float64).mean(0), rtol=1e-5, atol=1e-6)
    convert(tmp_path / "run", tmp_path / "converted", grow_embedding=True)
    assert jvlm.load(tmp_path / "converted")[0].config.decoder.vocab_size == NEEDED + 1
