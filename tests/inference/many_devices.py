"""Run by test_meshes.py in a process of its own with 8 CPU devices: generation on meshes against one device."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np

from jvlm.data.packing import Example
from jvlm.inference import sharding
from jvlm.inference.engine import Engine
from jvlm.inference.requests import EngineConfig, Request, SamplingParams
from jvlm.parallel.mesh import ParallelConfig
from jvlm.parallel.rules import AXES
from jvlm.training import starting_model
from tests.parallel import models

NEW = 5


def _changed(config, **decoder):
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **decoder))


MODELS = {
    "qwen2_5_vl": models.qwen2_5_vl(),
    "idefics2": _changed(models.idefics2(), vocab_size=161),  # divided by nothing, as the published 32003
    "mm1_5": models.mm1_5(),
    "gated": models.cross_attention(),
}
SETTINGS = {"greedy": {}, "sampled": {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}}
COMMON = {"max_tokens": NEW, "stop_token_ids": (), "logprobs": 0}


def prompts(config, count: int = 3) -> list[Example]:
    """One of text alone, the others with one picture and with two."""
    rng = np.random.default_rng(0)
    places, features = models.FRAMES[config.family]
    found = []
    for frames in range(count):
        length = 9 + 11 * frames
        index = np.full(length, -1, np.int32)
        at = np.sort(rng.choice(length, frames * features, replace=False))
        index[at] = rng.permutation(frames * features)
        tokens = np.where(index >= 0, config.image_token_id, rng.integers(0, 140, length)).astype(np.int32)
        patches, ids = frames * places, np.arange(frames * places, dtype=np.int32)
        positions = rng.integers(0, 4, (patches, 2)).astype(np.int32)
        if getattr(config.encoder, "class_token", False):
            positions[::places] = -1
        found.append(
            Example(
                tokens=tokens,
                positions=np.repeat(np.arange(length, dtype=np.int32)[:, None], 3, axis=1),
                loss_weights=np.zeros(length, np.float32),
                turns=np.zeros(length, np.int32),
                vision_index=index,
                media=(index >= 0).astype(np.int32),
                vision_segment_ids=np.arange(frames * features, dtype=np.int32) // features + 1,
                patches=rng.integers(0, 256, (patches, config.encoder.patch_values)).astype(np.uint8),
                patch_segment_ids=ids // places + 1,
                patch_window_ids=ids // 16 + 1,
                patch_positions=positions,
                sizes=(),
                origin=None,
            )
        )
    return found


def processor(config) -> SimpleNamespace:
    """What the engine asks of one."""
    return SimpleNamespace(
        tokenizer=SimpleNamespace(
            get_vocab=lambda: {str(i): i for i in range(150)},
            added_tokens_decoder={},
            clean_up_tokenization_spaces=False,
            convert_ids_to_tokens=str,
            decode=lambda ids, **_: " ".join(map(str, ids)),
        ),
        decode=lambda ids: " ".join(map(str, ids)),
        delimiter_ids=(),
        stop_ids=(),
        generation={},
        image_processor=SimpleNamespace(patch_group=models.FRAMES[config.family][0]),
    )


def run(model, fields: dict | None, kinds: list[str]) -> dict:
    """Tokens and their log-probabilities on one device or a mesh; with how often programs were compiled."""
    layout = None
    if fields:
        fields = {"data": 1, "rules": sharding.RULES, **fields}
        count = math.prod(fields.get(axis, 1) for axis in AXES)
        layout = sharding.inference_layout(model.config, ParallelConfig(**fields), jax.devices()[:count])
    engine = Engine(model, processor(model.config), EngineConfig(max_slots=8), layout)
    found = {"tokens": {}, "logprobs": {}}
    for kind in kinds:
        requests = [
            Request(f"{kind} {i}", example, SamplingParams(**SETTINGS[kind], **COMMON, number=i))
            for i, example in enumerate(prompts(model.config))
        ]
        events = list(engine.run(requests))
        for name, take in (("tokens", lambda e: e.token), ("logprobs", lambda e: e.logprob.logprob)):
            found[name][kind] = [[take(e) for e in events if e.request_id == r.id] for r in requests]
    return found | {"compilations": engine.compilations}


def main(cases: str) -> None:
    """One JSON line for each mesh of a JSON object: architecture -> mesh -> fields of `ParallelConfig`, and "kinds"."""
    for architecture, meshes in json.loads(cases).items():
        model = starting_model.random_model(MODELS[architecture], 0, None)
        kinds = sorted({kind for fields in meshes.values() for kind in fields["kinds"]})
        expected = run(model, None, kinds)
        for name, fields in meshes.items():
            began = time.process_time()
            kinds = fields.pop("kinds")
            found = run(model, fields, kinds)
            line = {
                "architecture": architecture,
                "mesh": name,
                "difference": max(
                    float(np.abs(np.subtract(found["logprobs"][kind], expected["logprobs"][kind])).max())
                    for kind in kinds
                ),
                "same": {kind: found["tokens"][kind] == expected["tokens"][kind] for kind in kinds},
                "different_tokens": len(
                    {t for answers in expected["tokens"].values() for answer in answers for t in answer}
                ),
                "compilations": found["compilations"],
                "seconds": round(time.process_time() - began, 1),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
