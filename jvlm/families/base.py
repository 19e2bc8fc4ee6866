"""The record of a model family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jvlm.families.adapters import AdapterTargets
from jvlm.families.gguf import GGUFFormat

if TYPE_CHECKING:
    from jvlm.data.chat_format import ChatFormat
    from jvlm.data.image_processor import ImageProcessorConfig
    from jvlm.models.contracts import ConnectorConfig, DecoderConfig, EncoderConfig
    from jvlm.models.vlm import VLMConfig
    from jvlm.weights.processor_files import Pixels, ProcessorFiles
    from jvlm.weights.table import Rule


@dataclasses.dataclass(frozen=True)
class HFFormat:
    """How a family's Hugging Face folders are read and written.

    Attributes:
      model_types: values of ``model_type`` in config.json that belong to the family.
      read_config: config.json, as a dict, to `VLMConfig`.
      write_config: the inverse.
      rules: the table of tensor names, given a configuration; see `jvlm.weights.table`.
      axis_sizes: lengths of the axes that the rules' einops patterns take apart.
      canonical: maps any known spelling of a tensor name to the one of the table; None drops the tensor.
      layouts: spellings for export by name, each a map from the table's name to the stored one. "released" is needed.
      fused: tensors that hold those of several parameters side by side along their last axis: the end of the stored
        name to the ends of the table's names, in order.
      pixels: how pixels are resampled and normalised where a folder does not say.
      read_image_config: the folder's processor files, over the settings that jvlm stored there if it did.
      write_image_config: the inverse: name and content of each processor file.
      unsupported: what of a configuration no public checkpoint has ("gated cross-attention"), so that it cannot be
        exported; None if there is nothing.
      tokenizer_classes: values of ``tokenizer_class`` that the family's transformers processor insists on.
    """

    model_types: tuple[str, ...]
    read_config: Callable[[dict[str, Any]], VLMConfig]
    write_config: Callable[[VLMConfig], dict[str, Any]]
    rules: Callable[[VLMConfig], tuple[Rule, ...]]
    axis_sizes: Callable[[VLMConfig], dict[str, int]]
    canonical: Callable[[str], str | None]
    layouts: Mapping[str, Callable[[str], str]]
    pixels: Pixels
    read_image_config: Callable[[ProcessorFiles, VLMConfig, ImageProcessorConfig | None], ImageProcessorConfig]
    write_image_config: Callable[[VLMConfig, ImageProcessorConfig], dict[str, dict[str, Any]]]
    unsupported: Callable[[VLMConfig], str | None] = lambda config: None
    tokenizer_classes: tuple[str, ...] = ()
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything that is particular to one architecture.

    What its encoder, connector and decoder compute, and how much arithmetic that is, stands with their configurations
    (`jvlm.models.registry`): families share them.

    Attributes:
      name: as in `VLMConfig.family`, and in saved files.
      chat_format: how the family's chat templates are used.
      image_config: default settings of its image processor; their type says which image processor that is.
      token_ids: `VLMConfig` fields of special token ids, where no configuration file gives them.
      adapter_targets: which linear layers adapters may be put on.
      presets: published sizes by name.
      hf: its Hugging Face form; None where no public checkpoint of the family exists.
      gguf: its form in llama.cpp's GGUF files; None where llama.cpp has none.
      prepare_tokenizer: called with a tokenizer that is new to the family, to add the tokens that it needs.
      text_config: returns the configuration of a model of text alone on a language model's folder; of the one family
        that is made from such folders.
    """

    name: str
    chat_format: ChatFormat
    image_config: ImageProcessorConfig
    token_ids: Mapping[str, Any]
    adapter_targets: AdapterTargets
    presets: Mapping[str, VLMConfig] = dataclasses.field(default_factory=dict)
    hf: HFFormat | None = None
    gguf: GGUFFormat | None = None
    prepare_tokenizer: Callable[[Any], None] = lambda tokenizer: None
    text_config: Callable[[Path], VLMConfig] | None = None

    def new_config(
        self, *, encoder: EncoderConfig, connector: ConnectorConfig, decoder: DecoderConfig, **fields: Any
    ) -> VLMConfig:
        """Return the configuration of a model of this family, with its default token ids; ``fields`` replace any."""
        from jvlm.models.vlm import VLMConfig

        parts = {"encoder": encoder, "connector": connector, "decoder": decoder}
        return VLMConfig(family=self.name, **{**parts, **self.token_ids, **fields})

    def __reduce__(self):
        """Pickle by name: the functions of a record cannot be sent to another process."""
        from jvlm.families.registry import get

        return get, (self.name,)
