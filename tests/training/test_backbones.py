"""Training a model put together from a vision tower and a language model: only the connector moves."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

import jvlm
from jvlm.data.processor import ProcessorConfig
from jvlm.families.composed.compose import compose
from jvlm.families.mm1_5.image_processor import TiledImageConfig
from jvlm.models import vlm
from jvlm.models.connectors.pooled_mlp import PooledMLPConfig
from jvlm.models.layers import Precision
from jvlm.training import runs, starting_model
from jvlm.training.config import ExportConfig, OptimizerConfig
from jvlm.weights import backbones
from tests import support as common
from tests.training import support

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.slow
def test_a_composed_model_trains_its_connector_and_answers_from_its_run_folder(tmp_path):
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=56, patch_size=14)).save_pretrained(tmp_path / "clip")
    common.make_tokenizer(tmp_path / "llama")
    words = len(common.SPECIAL_TOKENS) + 320
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=words)).save_pretrained(tmp_path / "llama")
    folders = {"encoder": tmp_path / "clip", "decoder": tmp_path / "llama"}
    connector = PooledMLPConfig(grid=4, class_token=True, out_grid=2)
    model = compose(**folders, connector=connector, precision=Precision(compute_dtype="float32"))
    base = support.experiment(tmp_path, support.write_examples(tmp_path / "data", 12), steps=4)
    experiment = dataclasses.replace(
        base,
        model=model,
        encoder_from=str(folders["encoder"]),
        decoder_from=str(folders["decoder"]),
        tokenizer=str(folders["decoder"]),
        processor=ProcessorConfig(image=TiledImageConfig(splitting="none", indicator="none")),
        data=dataclasses.replace(base.data, max_patches=6 * 17),
        optimizer=OptimizerConfig(learning_rate=1e-2, encoder_lr=0.0, decoder_lr=0.0),
        export=ExportConfig(enabled=False),
    )
    result = runs.train(experiment)
    after = {path: np.asarray(v.get_value()) for path, v in vlm.parameters(result.model).items()}
    for folder, tower in ((folders["encoder"], model.encoder), (folders["decoder"], model.decoder)):
        for path, variable in backbones.load(folder, tower, model.precision).items():
            np.testing.assert_array_equal(after[path], variable.get_value(), err_msg=path)
    started, _ = starting_model.start_model(experiment)
    moved = {p: v.get_value() for p, v in vlm.parameters(started).items() if p.startswith("connector")}
    assert all(np.abs(after[path] - value).max() > 0 for path, value in moved.items())
    loaded, processor = jvlm.load(result.folder)
    example = {"messages": [{"role": "user", "content": "<image>what is it?"}], "images": [common.picture(60, 40)]}
    assert len(jvlm.generate(loaded, processor, [example], max_new_tokens=3)) == 1
