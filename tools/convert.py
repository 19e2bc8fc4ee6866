"""Convert a checkpoint to a Hugging Face folder, one tensor in memory at a time.

python tools/convert.py SNAPSHOT TARGET --dtype bfloat16    another dtype, shard size or naming
python tools/convert.py RUN TARGET --step 1000              a jvlm run, for transformers, vLLM and SGLang
python tools/convert.py FILE.gguf TARGET                    a language model (Llama) in one GGUF file
python tools/convert.py FILE.onnx TARGET                    a DINOv2 backbone in one ONNX file
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from jvlm.weights.convert import DTYPES, convert
from jvlm.weights.single_files import unpack

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str) -> int:
    """Bytes of "5GB", "500 MB", "2GiB" or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write for example 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status. Errors of the user's making are one message, not a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a Hugging Face folder, a jvlm run, a .gguf or .onnx file")
    parser.add_argument("target", type=Path, help="a new folder")
    parser.add_argument("--layout", default="released", help="tensor names: released (default) or transformers")
    parser.add_argument("--dtype", default="keep", choices=DTYPES, help="of every tensor (default: as stored)")
    parser.add_argument("--shard-size", default="5GB", type=size, metavar="SIZE", help="of one file (default: 5GB)")
    parser.add_argument("--step", type=int, help="checkpoint of a run (default: the latest)")
    parser.add_argument(
        "--grow-embedding",
        action="store_true",
        help="give tokens without a row in the embedding table one (their mean)",
    )
    options = parser.parse_args(argv)
    if options.source.suffix in (".gguf", ".onnx"):
        return _run(lambda: unpack(options.source, options.target), options.target)
    with tqdm(unit="tensor", disable=None) as bar:

        def show(name: str, number: int, count: int) -> None:
            bar.total = count
            bar.set_postfix_str(name, refresh=False)
            bar.update(number - bar.n)

        return _run(
            lambda: convert(
                options.source,
                options.target,
                layout=options.layout,
                dtype=options.dtype,
                max_shard_bytes=options.shard_size,
                step=options.step,
                grow_embedding=options.grow_embedding,
                on_tensor=show,
            ),
            options.target,
        )


def _run(job: Callable[[], None], target: Path) -> int:
    try:
        job()
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
