"""The engine's programs with abstract arguments, for devices that are described and not present."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from jvlm.adapters.layers import is_adapter_path
from jvlm.errors import UserError
from jvlm.inference import plan_arrays, programs, sharding
from jvlm.inference.device_state import DeviceState, image_room, picture_batch, vision_tokens_of
from jvlm.inference.programs import Chunks, DecodeRows, ModuleDef, Programs
from jvlm.inference.requests import EngineConfig
from jvlm.inference.sampling import SlotRules
from jvlm.inference.shapes import Shapes
from jvlm.inference.weights import decoding_state
from jvlm.models import vlm
from jvlm.models.batch import PackedBatch
from jvlm.models.vlm import VLM, VLMConfig
from jvlm.parallel.layout import MeshLayout

PAGE_SIZE = 128  # of an accelerator's cache


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Sequences that run together, tokens and patches of a prompt, and positions of the cache of each."""

    batch_size: int
    prompt_len: int
    max_patches: int
    cache_len: int


@dataclasses.dataclass(frozen=True)
class AbstractPrograms:
    """The programs for one size, and abstract values with shardings for their arguments.

    Attributes:
      leaves, decoder_leaves: parameters as `encode`, and as `prefill` and `decode`, take them.
      adapter_leaves: those of them that are room for adapters.
      pictures, destinations: of `encode`; None without patches.
      features: the feature pool.
      tokens: the last token of each slot.
    """

    config: VLMConfig
    layout: MeshLayout
    programs: Programs
    sizes: BatchShape
    leaves: list[jax.ShapeDtypeStruct]
    decoder_leaves: list[jax.ShapeDtypeStruct]
    adapter_leaves: list[jax.ShapeDtypeStruct]
    pictures: PackedBatch | None
    destinations: jax.ShapeDtypeStruct | None
    adapters: jax.ShapeDtypeStruct
    features: Any
    cache: Any
    chunks: Chunks
    tokens: jax.ShapeDtypeStruct
    rows: DecodeRows

    def lower_encode(self) -> jax.stages.Lowered:
        """The vision tower over all pictures of the prompts, lowered from shapes."""
        return self.programs.encode.lower(self.leaves, self.features, self.pictures, self.destinations, self.adapters)

    def lower_prefill(self) -> jax.stages.Lowered:
        """The pass over the prompts, lowered from shapes."""
        return self.programs.prefill.lower(self.decoder_leaves, self.cache, self.features, self.chunks, self.adapters)

    def lower_decode(self) -> jax.stages.Lowered:
        """A step of decoding without drawing, lowered from shapes."""
        return self.programs.step.lower(self.decoder_leaves, self.cache, self.tokens, self.rows)

    def lower_draw(self) -> jax.stages.Lowered:
        """Steps of decoding as the engine runs them, with drawing, lowered from shapes."""
        vocabulary, replicated = self.config.decoder.vocab_size, self.layout.replicated()
        slots = self.tokens.shape[0] - 1
        rules = jax.eval_shape(lambda: SlotRules.empty(slots, vocabulary))
        rules = jax.tree.map(lambda x: _at(x, replicated), rules)
        banned = _at(np.zeros((2, vocabulary), bool), replicated)
        mask = _at(np.zeros((slots, -(-vocabulary // 32)), np.int32), replicated)
        arguments = self.decoder_leaves, self.cache, self.tokens, rules, self.rows, banned, mask
        return self.programs.decode.lower(*arguments)

    def lower_copy(self) -> jax.stages.Lowered:
        """The copy of pages that answers of one prompt begin with, lowered from shapes."""
        pages = jax.ShapeDtypeStruct((self.programs.groups, 8), np.int32)
        return self.programs.copy_pages.lower(self.cache, pages, pages)


def abstract_programs(template: VLM, layout: MeshLayout, sizes: BatchShape) -> AbstractPrograms:
    """The programs of a model on a layout, whose devices may be described and not present.

    Args:
      template: the model's shapes; quantised, or with room for adapters, as it would serve.

    Raises:
      UserError: a layout that cannot generate, or sequences or parameters that it does not divide.
    """
    config = template.config
    placed = {p: _at(v.get_value(), layout.parameter(p, v)) for p, v in vlm.variables(template).items()}
    model = vlm.bind(template, placed)
    whole, leaves = ModuleDef.of(model, nnx.state(model))
    decoder, decoder_leaves = ModuleDef.of(model.decoder, decoding_state(model.decoder))
    checked = sharding.check_layout(layout, config)
    D = 1 if checked is None else layout.num_shards(layout.mesh_axes("batch"))
    if sizes.batch_size % D:
        raise UserError(f"{sizes.batch_size} sequences do not divide by {D} shards of the batch; choose another mesh")
    each, width = sizes.batch_size // D, -(-sizes.cache_len // PAGE_SIZE)
    beside = config.connector.tokens_per_image if config.decoder.vision_memory else None
    C = each * (-(-sizes.prompt_len // PAGE_SIZE)) * PAGE_SIZE
    P = each * sizes.max_patches
    vision = vision_tokens_of(config, P) if P else 0
    shapes = Shapes(
        groups=D,
        page_size=PAGE_SIZE,
        pages=each * width + 1 + (each == each * width + 1),
        slots=each,
        feature_slots=max(vision, 1),
        vision_memory=0 if beside is None else beside * max(1, image_room(config, sizes.max_patches)),
        decode_rows=(each,),
        tables=(width,),
        prefill_tokens=(C,),
        past=(0,),
        prefill_rows=each,
        encode_patches=(max(P, 1),),
        prefill_features=() if beside is None else (max(vision, 1),),
    )
    pool = DeviceState.features(config, whole, leaves, checked, shapes, False) if P else None
    compiled = Programs(whole, decoder, checked, shapes.cache, pool, steps=EngineConfig.decode_steps)

    def split(value: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        return _at(value, layout.sharding((*axes, *[None] * (np.ndim(value) - len(axes))), np.shape(value)))

    def placed_cache(part: Any) -> jax.ShapeDtypeStruct:
        if part.shape[1] == shapes.cache.pages:
            return split(part, None, "batch", "kv_heads")
        return split(part, None, "batch", *((None, "kv_heads") if part.ndim > 3 else ()))

    cache = jax.eval_shape(compiled.init_cache, decoder_leaves)
    chunks = plan_arrays.no_chunks(shapes, C, 0, shapes.prefill_features[0] if beside else C)
    pictures = picture_batch(config, D, P) if P else None
    return AbstractPrograms(
        config=config,
        layout=layout,
        programs=compiled,
        sizes=sizes,
        leaves=leaves,
        decoder_leaves=decoder_leaves,
        adapter_leaves=[value for path, value in placed.items() if is_adapter_path(path)],
        pictures=None if pictures is None else jax.tree.map(_at, pictures, layout.batch(pictures)),
        destinations=split(np.zeros((D, vision), np.int32), "batch") if P else None,
        adapters=split(np.zeros(D, np.int32), "batch"),
        features=None if pool is None else jax.tree.map(lambda x: split(x, "batch"), (pool.tokens, pool.deepstack)),
        cache=jax.tree.map(placed_cache, cache),
        chunks=Chunks(*(split(part, "batch") for part in chunks)),
        tokens=_at(np.zeros(sizes.batch_size + 1, np.int32), layout.replicated()),
        rows=DecodeRows(split(np.zeros((sizes.batch_size, programs.TABLE + width), np.int32), "batch")),
    )


def _at(value: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
