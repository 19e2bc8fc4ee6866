"""Options of commands that answer: which model, how, and on which devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from jvlm import families
from jvlm.data.image_processor import FieldError
from jvlm.errors import UserError
from jvlm.inference.sampling import SamplingConfig
from jvlm.inference.sharding import RULES
from jvlm.options import FLAT, parse
from jvlm.parallel.mesh import ParallelConfig
from jvlm.quantization.config import QuantizationConfig

if TYPE_CHECKING:
    from jvlm.data.processor import Processor
    from jvlm.models.vlm import VLM
    from jvlm.parallel.layout import MeshLayout


def _image_options() -> type:
    """Return a dataclass of what the command line may change about the image processors of all families."""
    fields, docs = [], []
    for name, (limit, owners) in families.image_limits().items():
        fields.append((name, (int if limit.whole else float) | None, None))
        docs.append(f"  {name}: {limit.help} ({', '.join(owners)}); None takes the model's.")
    options = dataclasses.make_dataclass("ImageOptions", fields, frozen=True)
    options.__doc__ = "\n".join(["What to change about the image processor.", "", "Attributes:", *docs])
    return options


ImageOptions = _image_options()


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The model that answers, how, and on which devices.

    Attributes:
      model: a Hugging Face folder, a jvlm run folder, or an id on the Hub (ORG/NAME, ORG/NAME@REVISION).
      adapters: NAME=FOLDER of each adapter, of which a request names one or none; or one FOLDER, for all requests.
      param_dtype: dtype of the parameters; None is float32.
      quantization: hold the matrices of the language model in 8 bits (int8, fp8) or 4 (nf4); None leaves them.
      images: what to change about the image processor.
      sampling: how answers are made.
      parallel: how devices share the work. Without any of these options all devices do, by the model's heads.
    """

    model: str
    adapters: tuple[str, ...] = ()
    param_dtype: Literal["float32", "bfloat16"] | None = None
    quantization: Literal["int8", "fp8", "nf4"] | None = None
    images: Annotated[ImageOptions, FLAT] = ImageOptions()
    sampling: Annotated[SamplingConfig, FLAT] = SamplingConfig()
    parallel: ParallelConfig | None = ParallelConfig(rules=RULES)


T = TypeVar("T")


def parse_model_command(kind: type[T], words: Sequence[str], program: str) -> T:
    """Return a command with a field ``model`` of `ModelOptions`; its mesh is None where no option sets it."""
    try:
        command = parse(kind, words, program)
    except UserError as error:
        raise UserError(str(error).replace("sampling.", "--", 1)) from error
    if any(word.startswith("--parallel.") for word in words):
        return command
    return dataclasses.replace(command, model=dataclasses.replace(command.model, parallel=None))


def load(options: ModelOptions) -> tuple[VLM, Processor, MeshLayout | None]:
    """Return the model of the options, on the devices that they ask for, its processor, and its layout over them."""
    from jvlm.inference import sharding
    from jvlm.weights import io as weights_io
    from jvlm.weights import run_dir

    folder = run_dir.local(options.model)
    config = weights_io.read_config(folder)
    _with_image_settings(options, families.get(config.family).image_config.checked)  # before the weights are read
    if options.param_dtype:
        precision = dataclasses.replace(config.precision, param_dtype=options.param_dtype)
        config = dataclasses.replace(config, precision=precision)
    layout = sharding.inference_layout(config, options.parallel)
    parameter_sharding = layout.parameter if layout else None
    quantize = None if options.quantization is None else QuantizationConfig(options.quantization)
    model, processor = weights_io.load(
        folder, precision=config.precision, sharding=parameter_sharding, quantize=quantize
    )
    model = _with_adapters(model, options.adapters, parameter_sharding)
    return model, processor.replace(image_config=_with_image_settings(options, processor.image_config.changed)), layout


def _with_adapters(model: VLM, words: tuple[str, ...], sharding: Any) -> VLM:
    from jvlm.adapters import attach, folders, several

    if not words:
        return model
    if len(words) == 1 and "=" not in words[0]:
        return attach.attach(model, folders.read(words[0], model.config), sharding=sharding)
    return several.load(model, several.names_of(words))


def _with_image_settings(options: ModelOptions, use: Callable[[dict[str, Any]], T]) -> T:
    """Return what is made of the image settings that were typed. Raises UserError naming the option."""
    typed = {name: value for name, value in dataclasses.asdict(options.images).items() if value is not None}
    try:
        return use(typed)
    except FieldError as error:
        raise UserError(f"--{error.field}: {error.problem}. {error.fix}") from error
