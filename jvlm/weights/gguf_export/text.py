"""The language model of a VLM as a GGUF file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jvlm import families
from jvlm.errors import UserError
from jvlm.families.gguf import ARCHITECTURES, DecoderLayers, GGUFFormat
from jvlm.models.decoders.moe import MoEConfig
from jvlm.models.decoders.transformer import TransformerConfig
from jvlm.models.vlm import VLM, VLMConfig
from jvlm.weights.gguf_export import files, tokenizer
from jvlm.weights.gguf_export.files import ReadLayer, Tensor, Written

_WHOLE = {"decoder.embedding": "token_embd.weight", "decoder.norm.scale": "output_norm.weight"}
_HEAD = {"decoder.head.kernel": "output.weight"}
_LAYER = {
    "norm1": "attn_norm",
    "norm2": "ffn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.out": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
_ENDINGS = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_PATH = re.compile(r"decoder\.blocks\.layer\.(.+)\.(kernel|scale|bias)")
_EXPERTS = {f"decoder.blocks.layer.mlp.{name}": f"ffn_{name}_exps" for name in ("gate", "up", "down")}
_OF_LAYER = {**_EXPERTS, "decoder.blocks.layer.mlp.router": "ffn_gate_inp"}


def write_text(
    model: VLM,
    path: Path,
    *,
    format: str = "f16",
    read: ReadLayer | None = None,
    processor_tokenizer: Any = None,
    name: str | None = None,
) -> Written:
    """Write the language model, in the architecture that the family's record names.

    Args:
      format: of the matrices, one of `files.FORMATS`.
      read: gives a parameter's value by path, or one layer of it; None takes those of the model.
      processor_tokenizer: the model's tokenizer; None writes a file without words, which answers to token ids.
      name: of the model, as llama.cpp shows it.

    Raises:
      UserError: a language model or tokenizer that llama.cpp does not compute, naming what; a model with adapters.
    """
    form, decoder = form_of(model.config), checked(model.config)
    read = read or files.values_of(model)

    def keys(writer: Any) -> None:
        _keys(writer, decoder)
        if form.add_keys is not None:
            form.add_keys(writer, model.config)
        if processor_tokenizer is None:
            writer.add_tokenizer_model("none")
            writer.add_vocab_size(decoder.vocab_size)
        else:
            begin = model.config.bos_token_id
            tokenizer.add(writer, processor_tokenizer, decoder.vocab_size, form.pre_tokenizers, begin)

    tensors = _tensors(model, read)
    return files.write_model(model, path, architecture(model.config), "model", keys, tensors, format=format, name=name)


def _keys(writer: Any, decoder: TransformerConfig) -> None:
    writer.add_block_count(decoder.num_layers)
    # within the window both compute the same; llama.cpp's "llama" has none
    context = min(decoder.max_position_embeddings, decoder.sliding_window or decoder.max_position_embeddings)
    writer.add_context_length(context)
    writer.add_embedding_length(decoder.hidden_size)
    writer.add_feed_forward_length(decoder.intermediate_size)
    writer.add_head_count(decoder.num_heads)
    writer.add_head_count_kv(decoder.num_kv_heads)
    writer.add_layer_norm_rms_eps(decoder.rms_norm_eps)
    writer.add_rope_freq_base(decoder.rope_theta)
    if decoder.mrope_section is not None:
        writer.add_rope_dimension_sections([*decoder.mrope_section, 0])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(decoder.head_size)
    if isinstance(decoder.mlp, MoEConfig):
        writer.add_expert_count(decoder.mlp.experts)
        writer.add_expert_used_count(decoder.mlp.top_k)
        writer.add_expert_feed_forward_length(decoder.mlp.intermediate_size)


def _tensors(model: VLM, read: ReadLayer) -> Iterator[Tensor]:
    for entry in files.entries(model):
        if not entry.path.startswith("decoder."):
            continue
        tensor = files.tensor_of(entry, tensor_name(entry.path, entry.layer), read)
        heads = rotary_heads(model.config, entry.path)
        if heads:
            tensor = dataclasses.replace(tensor, read=lambda t=tensor, n=heads: side_by_side(t.read(), n))
        if entry.path in _EXPERTS:  # [experts, in, out], which llama.cpp has turned around
            count, d_in, d_out = tensor.shape
            tensor = Tensor(tensor.name, (count, d_out, d_in), lambda t=tensor: t.read().swapaxes(1, 2))
        yield tensor


def tensor_name(path: str, layer: int | None) -> str:
    """Return the GGUF name of a parameter of the decoder."""
    if layer is None:
        return (_WHOLE | _HEAD)[path]
    if path in _OF_LAYER:
        return f"blk.{layer}.{_OF_LAYER[path]}.weight"
    match = _PATH.fullmatch(path)
    return f"blk.{layer}.{_LAYER[match[1]]}.{_ENDINGS[match[2]]}"


def form_of(config: VLMConfig) -> GGUFFormat:
    """Return llama.cpp's form of a model's family. Raises UserError if it has none."""
    form = families.get(config.family).gguf
    if form is None:
        known = [name for name in families.names() if families.get(name).gguf]
        raise UserError(
            f"models of family {config.family!r} have no GGUF form; written are those of {', '.join(known)}. Serve the "
            "Hugging Face folder"
        )
    return form


def checked(config: VLMConfig) -> TransformerConfig:
    """Return the decoder's configuration. Raises UserError for what llama.cpp computes otherwise, naming it."""
    decoder = config.decoder
    if not isinstance(decoder, TransformerConfig):
        raise UserError(f"GGUF files of a {type(decoder).__name__} decoder cannot be written: llama.cpp has none")
    name, mlp = architecture(config), decoder.mlp
    mrope = "none" if decoder.mrope_section is None else "interleaved" if decoder.mrope_interleaved else "in sections"
    found = DecoderLayers(decoder.qkv_bias, decoder.qk_norm, mrope, mlp is not None)
    odd = [
        f"{field} = {value}"
        for field, value, expected in zip(DecoderLayers._fields, found, ARCHITECTURES[name], strict=True)
        if value != expected
    ]
    odd += ["rope_scaling"] if decoder.rope_scaling is not None else []
    odd += [f"experts in every layer number {mlp.every} alone"] if mlp is not None and mlp.every != 1 else []
    if odd:
        raise UserError(
            f"llama.cpp's {name!r} computes no decoder with {', '.join(odd)}: GGUF files of it are not written; keep "
            "the Hugging Face folder"
        )
    return decoder


def architecture(config: VLMConfig) -> str:
    """Return llama.cpp's name of the language model. Raises UserError if the family has none."""
    return form_of(config).architecture(config)


def rotary_heads(config: VLMConfig, path: str) -> int | None:
    """Return the number of heads of a query or key map that llama.cpp wants in its own order; None for others.

    Its "llama" turns neighbours, where Hugging Face turns the first half of a head with the second.
    """
    if architecture(config) != "llama" or not path.endswith((".attention.q.kernel", ".attention.k.kernel")):
        return None
    return config.decoder.num_heads if ".q." in path else config.decoder.num_kv_heads


def side_by_side(weight: Shaped[np.ndarray, "o i"], heads: int) -> Shaped[np.ndarray, "o i"]:
    """Reorder rows from the two halves of each head to rotary pairs side by side. [heads * size, columns]"""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
