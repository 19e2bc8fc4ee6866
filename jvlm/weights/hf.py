"""Hugging Face folders: reading them into sharded arrays, writing them."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jvlm import config as config_tree
from jvlm import families, json_files
from jvlm.data import vocabulary
from jvlm.data.processor import Processor, ProcessorConfig
from jvlm.data.processor_config import SETTINGS, read_settings
from jvlm.data.tokenizers import load_tokenizer
from jvlm.errors import UserError
from jvlm.models import vlm
from jvlm.models.layers import Precision
from jvlm.models.vlm import VLM, VLMConfig, parameters
from jvlm.quantization.config import QuantizationConfig
from jvlm.quantization.formats import quantize_all
from jvlm.quantization.kernels import is_part, quantized_kernels
from jvlm.quantization.model import fill, quantized_template
from jvlm.quantization.stored import open_tensors, report, stored_parts
from jvlm.weights import chat_templates, labels, names, processor_files, safetensors_files, table, tokenizer_files
from jvlm.weights.processor_files import ProcessorFiles
from jvlm.weights.vocabulary import EMBEDDING, TOKEN_AXIS, with_vocabulary

ReadLayer = Callable[[str, int | None], np.ndarray]
Encode = Callable[[table.Entry], list[tuple[str, np.dtype, tuple[int, ...], Callable[[], np.ndarray]]] | None]
ShardingOf = Callable[[str, nnx.Variable], jax.sharding.Sharding]


def default_precision() -> Precision:
    """float32 parameters; float32 compute on CPU, where bfloat16 is slower, and bfloat16 elsewhere."""
    return Precision(compute_dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")


def read_config(folder: Path, precision: Precision | None = None) -> VLMConfig:
    """Return the model configuration of a Hugging Face folder."""
    path = folder / "config.json"
    values = json_files.read_object(path)
    try:
        form = families.for_model_type(values.get("model_type")).hf
    except UserError as error:
        raise table.WeightError(f"{path}: {error}") from error
    config = table.read_values(path, lambda v: labels.read(v, _typed(form.read_config(v))), values)
    config = dataclasses.replace(config, precision=precision or default_precision())
    settings = processor_files.read(folder).image
    if settings is not None:
        pixels = processor_files.read_pixels(settings, form.pixels)
        encoder = dataclasses.replace(config.encoder, image_mean=pixels.mean, image_std=pixels.std)
        config = dataclasses.replace(config, encoder=encoder)
    return config


def _typed(config: VLMConfig) -> VLMConfig:
    """Return the configuration. Raises ValueError for a field of the wrong type, naming it."""
    return config_tree.from_dict(VLMConfig, config_tree.to_dict(config))


def load_weights(
    folder: Path,
    config: VLMConfig,
    sharding: ShardingOf | None = None,
    *,
    stored_rows: int | None = None,
    quantize: QuantizationConfig | None = None,
) -> VLM:
    """Return the model of a Hugging Face folder; see `load`.

    Args:
      stored_rows: rows of the folder's embedding table and head, which grow to the configuration's; None: as many.
      quantize: which kernels are held quantised, from the moment they are read.
    """
    model = vlm.abstract(config)
    shapes = {path: tuple(v.get_value().shape) for path, v in parameters(model).items()}
    expected = table.entries(config, shapes)
    if quantize is not None:
        model = quantized_template(model, quantize)
    kernels = dict(quantized_kernels(model))
    variables = {path: v for path, v in parameters(model).items() if not is_part(path)}
    with open_tensors(folder) as tensors:
        form = table.hf_format(config)
        tensors.split(form.fused)
        stored = match(tensors, form.canonical, expected, stored_rows)
        read_parameters(variables, expected, stored, tensors, sharding)
        for path, kernel in kernels.items():
            entries = {() if e.layer is None else (e.layer,): e for e in expected if e.path == path}
            tensors.dtypes(stored[e.name] for e in entries.values())  # raises for one that is not read

            def parts(index: tuple[int, ...], entries=entries, format: str = kernel.format) -> dict[str, np.ndarray]:
                entry = entries[index]
                if (codes := stored_parts(tensors, stored[entry.name], entry.pattern, format)) is not None:
                    return codes
                return quantize_all(entry.to_param(tensors.read(stored[entry.name])), format)

            fill(path, kernel, parts, sharding)
        report(tensors, config.precision.param_dtype)
    nnx.update(model, nnx.from_flat_state([(tuple(p.split(".")), v) for p, v in variables.items()]))
    return model


def read_parameters(
    variables: Mapping[str, nnx.Variable],
    expected: Iterable[table.Entry],
    stored: Mapping[str, str],
    tensors: safetensors_files.Tensors,
    sharding: ShardingOf | None = None,
) -> None:
    """Fill abstract variables, by path, with what the tensors hold; ``stored`` names the tensor of each entry."""
    dtypes = tensors.dtypes(stored.values())
    by_path: dict[str, list[table.Entry]] = {}
    for entry in expected:
        by_path.setdefault(entry.path, []).append(entry)
    for path, variable in variables.items():
        aval = variable.get_value()
        reader = _Reader(by_path[path], stored, tensors, dtypes, aval)
        array_sharding = sharding(path, variable) if sharding else jax.sharding.SingleDeviceSharding(jax.devices()[0])
        # waiting keeps the host's buffers of one parameter alive, not those of several in flight
        variable.set_value(jax.make_array_from_callback(aval.shape, array_sharding, reader).block_until_ready())
        variable.set_metadata(stored=reader.dtypes)


def match(
    tensors: safetensors_files.Tensors,
    canonical: Callable[[str], str | None],
    expected: list[table.Entry],
    stored_rows: int | None = None,
) -> dict[str, str]:
    """Table name -> stored name of every expected tensor. Raises WeightError listing all that is wrong.

    ``stored_rows`` is as in `load_weights`.
    """
    stored = names.canonical_names(tensors, canonical, {e.name for e in expected})
    if stored_rows is not None:
        rows = {e.name: e.shape[0] for e in expected if e.path in TOKEN_AXIS}
        for name in {*rows, "lm_head.weight"} & stored.keys():  # a tied model may bring a copy as its head
            tensors.grow(stored[name], stored_rows, max(rows.values()))
    tied = stored.pop("lm_head.weight", None) if all(e.name != "lm_head.weight" for e in expected) else None
    table.check(expected, {name: tensors.shape(raw) for name, raw in stored.items()}, str(tensors.folder))
    if tied is not None:
        embedding = next(e.name for e in expected if e.path == EMBEDDING)
        _check_tied_head(tensors, tied, stored[embedding])
    return stored


def _check_tied_head(tensors: safetensors_files.Tensors, head: str, embedding: str) -> None:
    """Refuse a stored head that is no copy of the tied embedding: transformers 4 drops it, transformers 5 uses it."""
    if not np.array_equal(tensors.read(head), tensors.read(embedding)):
        raise table.WeightError(
            f"{tensors.folder}: tie_word_embeddings is true, yet {head} differs from {embedding}; set it to false in "
            "config.json to keep the head, or remove the tensor to keep the tie"
        )


class _Reader:
    """Gives any slice of one parameter, reading the tensors it needs and nothing else."""

    def __init__(self, entries: list[table.Entry], stored: dict[str, str], tensors, dtypes, aval):
        self.entries, self.stored, self.tensors = entries, stored, tensors
        self.shape, self.dtype = aval.shape, aval.dtype
        stored_dtypes = tuple(dtypes[stored[e.name]].name for e in entries)
        self.dtypes = stored_dtypes[0] if len(set(stored_dtypes)) == 1 else stored_dtypes

    def __call__(self, index: tuple[slice, ...]) -> np.ndarray:
        if self.entries[0].layer is None:
            return np.ascontiguousarray(self._read(self.entries[0])[index], self.dtype)
        chosen = self.entries[index[0]]
        out = None
        for i, entry in enumerate(chosen):
            value = self._read(entry)[index[1:]]
            if out is None:
                out = np.empty((len(chosen), *value.shape), self.dtype)
            out[i] = value
        return out

    def _read(self, entry: table.Entry) -> np.ndarray:
        return entry.to_param(self.tensors.read(self.stored[entry.name]))


def load_processor(folder: Path, config: VLMConfig, *, grow_embedding: bool = False) -> Processor:
    """Return the processor of a Hugging Face folder: its tokenizer, template, image settings and generation defaults.

    Args:
      grow_embedding: the processor's model has a larger embedding table where the tokenizer needs one; the tokens that
        end a turn in this family's template are added to a tokenizer that lacks them.

    Raises:
      UserError: a chat template that cannot write an image, or a setting of images that has no meaning here.
    """
    tokenizer, chat_format = load_tokenizer(folder), families.get(config.family).chat_format
    tokenizer.chat_template, source = chat_templates.choose(folder, tokenizer)
    if tokenizer.chat_template:
        chat_templates.check_writes_images(tokenizer, chat_format, source)
    if grow_embedding:
        vocabulary.add_tokens(tokenizer, chat_format.stops)
        config = with_vocabulary(config, vocabulary.rows_needed(tokenizer))
    return Processor(
        tokenizer,
        config,
        _read_settings(folder, config),
        generation=_read_json(folder / "generation_config.json"),
    )


def _read_settings(folder: Path, config: VLMConfig) -> ProcessorConfig:
    """jvlm's own settings; where the files that everybody reads say something else, these count, and it is told."""
    settings = read_settings(folder) or ProcessorConfig()
    files = processor_files.read(folder)
    if settings.image is not None and files == ProcessorFiles():
        return settings
    image = table.hf_format(config).read_image_config(files, config, settings.image)
    if settings.image is not None and image != settings.image:
        before, after = (config_tree.to_dict(value) for value in (settings.image, image))
        lines = "; ".join(config_tree.differences(before, after))
        warnings.warn(
            f"{folder}: {SETTINGS} differs from {', '.join(processor_files.FILES)}, which count: {lines}", stacklevel=2
        )
    return dataclasses.replace(settings, image=image)


def _read_json(path: Path) -> dict[str, Any]:
    return json_files.read_object_if_there(path)


def save(
    model: VLM,
    processor: Processor,
    folder: Path,
    *,
    dtype: str | None,
    layout: str = "released",
    max_shard_bytes: int = 5 * 10**9,
    read: ReadLayer | None = None,
    encode: Encode | None = None,
) -> None:
    """Write a Hugging Face folder; see `jvlm.weights.io.save`.

    Args:
      read: gives a parameter's value by path, or one layer of it; None takes those of the model, which may otherwise
        be without arrays.
      encode: gives the tensors that are written in place of one, each with what its name ends in instead of "weight";
        None for one that is written as it is.
    """
    if model.adapters is not None:
        raise UserError(
            "the model has adapters, which a Hugging Face model folder cannot hold: merge them first "
            "(jvlm.adapters.merge.merge), or write them by themselves (jvlm.adapters.peft_write.write_peft)"
        )
    form = table.export_format(model.config)
    if layout not in form.layouts:
        raise UserError(f"unknown layout {layout!r}; known: {', '.join(form.layouts)}")
    wanted = None if dtype is None else safetensors_files.dtype_of(dtype)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    variables = parameters(model)
    expected = table.entries(model.config, {p: tuple(v.get_value().shape) for p, v in variables.items()})
    rename = form.layouts[layout]
    tensors, dtypes = [], {}
    for entry in expected:
        variable = variables[entry.path]
        dtypes[entry.path] = target = wanted or np.dtype(stored_dtype(variable, entry.layer))
        encoded = encode(entry) if encode else None
        if encoded is None:
            tensors.append((rename(entry.name), target, entry.shape, _writer(read or values_of(variables), entry)))
        else:
            begin = rename(entry.name).removesuffix("weight")
            tensors += [(begin + end, *tensor) for end, *tensor in encoded]
    written = safetensors_files.write(folder, safetensors_files.joined(tensors, form.fused), max_shard_bytes)
    for old in [*folder.glob("model*.safetensors"), *folder.glob(safetensors_files.INDEX)]:
        if old.name not in written:
            old.unlink()
    write_sidecars(folder, model.config, processor, dtypes[EMBEDDING].name)


def stored_dtype(variable: nnx.Variable, layer: int | None) -> str:
    """Return the dtype a parameter had in the checkpoint it came from, or has now."""
    stored = variable.get_metadata().get("stored")
    if stored is None:
        return str(variable.get_value().dtype)
    return stored if isinstance(stored, str) else stored[layer or 0]


def values_of(variables: Mapping[str, nnx.Variable]) -> ReadLayer:
    """Return what reads a parameter's value, or one layer of it."""

    def read(path: str, layer: int | None) -> np.ndarray:
        value = variables[path].get_value()
        return np.asarray(value if layer is None else value[layer])

    return read


def _writer(values: ReadLayer, entry: table.Entry) -> Callable[[], np.ndarray]:
    return lambda: entry.to_checkpoint(values(entry.path, entry.layer))


def write_sidecars(folder: Path, config: VLMConfig, processor: Processor, dtype: str) -> None:
    """Everything of a Hugging Face folder but the weights; settings that a former model left there are removed."""
    form = table.hf_format(config)
    _write_json(folder / "config.json", {**labels.write(config, form.write_config), "torch_dtype": dtype})
    write_processor(folder, config, processor)
    files = form.write_image_config(config, processor.image_config)
    for name in processor_files.FILES:
        (folder / name).unlink(missing_ok=True)
    for name, values in files.items():
        _write_json(folder / name, values)


def write_processor(folder: Path, config: VLMConfig, processor: Processor) -> None:
    """Tokenizer, chat template, generation defaults, and jvlm's own settings: what `load_processor` reads."""
    templates = processor.template.templates
    form = processor.family.hf
    tokenizer_files.save(processor.tokenizer, folder, templates, form.tokenizer_classes if form else ())
    chat_templates.write(folder, templates)
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    generation["pad_token_id"] = processor.tokenizer.pad_token_id
    _write_json(folder / "generation_config.json", {**generation, **processor.generation})
    _write_json(folder / SETTINGS, processor.settings())


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
