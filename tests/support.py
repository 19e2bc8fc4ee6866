"""Oracles and small random checkpoints shared by the tests. Torch and transformers are imported by the tests only."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jvlm.planning.environment import WITHOUT_A_GPU, WITHOUT_A_TPU
from tests import compilation

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])

# The order of Qwen2.5-VL's added tokens, so that the differences between their ids are the real ones.
SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()

CORPUS = (
    "what is in the picture? is there a red circle, or a blue triangle? the answer is yes, no, two, three.",
    "where is the cat on the chair? describe this video of a dog that runs over the green grass.",
    'the box is [{"bbox_2d": [12, 34, 56, 78], "label": "the cat"}] and the image is 640 x 480 pixels.',
    "you are a helpful assistant. system user assistant. count the objects in both images, one by one.",
)


def make_tokenizer(folder: Path, special: Sequence[str] = SPECIAL_TOKENS, begin: str = "", **settings: Any) -> Path:
    """A byte-level BPE tokenizer of the Qwen2 kind, trained on a few sentences, with the real chat template.

    ``begin`` is a special token put before every text; ``settings`` replace those of tokenizer_config.json.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    if begin:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "chat_template": (GOLDEN / "chat_template.jinja").read_text(),
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def token_ids(folder: Path) -> dict[str, int]:
    """Special token -> id of a folder written by `make_tokenizer`."""
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    return {token["content"]: token["id"] for token in added}


def tiny_config(ids: dict[str, int], **changes: Any) -> dict[str, Any]:
    """config.json of a small model, in the flat form of the released checkpoints.

    ``changes`` replaces values; ``vision_config=`` updates that of the vision tower.
    """
    vision = {
        "model_type": "qwen2_5_vl",
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_heads": 2,
        "in_chans": 3,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        "hidden_act": "silu",
    }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 352,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "max_position_embeddings": 4096,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "torch_dtype": "float32",
        **changes,
        "vision_config": {**vision, **changes.get("vision_config", {})},
    }


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a released Qwen2.5-VL checkpoint: section 1.4 of our specification."""
    vit = config["vision_config"]
    d, i, p = vit["hidden_size"], vit["intermediate_size"], vit["patch_size"]
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = D // config["num_attention_heads"] * config["num_key_value_heads"]
    group = vit["spatial_merge_size"] ** 2 * d
    shapes = {"visual.patch_embed.proj.weight": (d, 3, vit["temporal_patch_size"], p, p)}

    def linear(name: str, out: int, into: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (out, into)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    for block in range(vit["depth"]):
        name = f"visual.blocks.{block}"
        shapes[f"{name}.norm1.weight"] = shapes[f"{name}.norm2.weight"] = (d,)
        linear(f"{name}.attn.qkv", 3 * d, d, True)
        linear(f"{name}.attn.proj", d, d, True)
        linear(f"{name}.mlp.gate_proj", i, d, True)
        linear(f"{name}.mlp.up_proj", i, d, True)
        linear(f"{name}.mlp.down_proj", d, i, True)
    shapes["visual.merger.ln_q.weight"] = (d,)
    linear("visual.merger.mlp.0", group, group, True)
    linear("visual.merger.mlp.2", D, group, True)
    shapes["model.embed_tokens.weight"] = (V, D)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        linear(f"{name}.self_attn.q_proj", D, D, True)
        linear(f"{name}.self_attn.k_proj", kv, D, True)
        linear(f"{name}.self_attn.v_proj", kv, D, True)
        linear(f"{name}.self_attn.o_proj", D, D, False)
        linear(f"{name}.mlp.gate_proj", F, D, False)
        linear(f"{name}.mlp.up_proj", F, D, False)
        linear(f"{name}.mlp.down_proj", D, F, False)
        shapes[f"{name}.input_layernorm.weight"] = shapes[f"{name}.post_attention_layernorm.weight"] = (D,)
    shapes["model.norm.weight"] = (D,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors at a scale where every one of them, norms and biases included, moves the logits."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        value = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1 and not name.endswith("bias"):
            value = 1 + 0.2 * value
        elif len(shape) == 1:
            value = 0.3 * value
        elif name != "model.embed_tokens.weight":
            value = value / np.float32(np.sqrt(np.prod(shape[1:])))
        tensors[name] = value.astype(np.float32)
    return tensors


def new_layout(name: str) -> str:
    """A released tensor name as transformers >= 4.52 spells it."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """Save with the safetensors library, in one file or in several with an index."""
    from safetensors.numpy import save_file

    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_folder(folder: Path, tokenizer: Path, config: dict[str, Any], *, limits: tuple[int, int]) -> None:
    """Everything of a Hugging Face folder but the weights; ``limits`` are min_pixels and max_pixels."""
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    preprocessor = {
        "min_pixels": limits[0],
        "max_pixels": limits[1],
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": CLIP_MEAN.tolist(),
        "image_std": CLIP_STD.tolist(),
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    generation = {"do_sample": True, "temperature": 0.1, "top_p": 0.9, "eos_token_id": [config["eos_token_id"]]}
    for name, values in {
        "config.json": config,
        "preprocessor_config.json": preprocessor,
        "generation_config.json": generation,
    }.items():
        (folder / name).write_text(json.dumps(values, indent=2))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random picture: resizing it gives the same pixels whatever the rounding of single weights."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(height // 12, 2), max(width // 12, 2), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def reference_patches(
    frames: Sequence[Image.Image], height: int, width: int
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """float32 pixel_values and grid (t, h, w) in patches of transformers 4.49, written from its description."""
    pixels = np.stack([np.asarray(f.resize((width, height), Image.Resampling.BICUBIC), np.float64) for f in frames])
    if len(pixels) % 2:
        pixels = np.concatenate([pixels, pixels[-1:]])
    pixels = ((pixels / 255 - CLIP_MEAN) / CLIP_STD).transpose(0, 3, 1, 2)
    t, h, w = len(pixels) // 2, height // 14, width // 14
    blocks = pixels.reshape(t, 2, 3, h // 2, 2, 14, w // 2, 2, 14).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return blocks.reshape(t * h * w, 3 * 2 * 14 * 14).astype(np.float32), (t, h, w)


def cpu_devices(count: int) -> dict[str, str]:
    """Environment of a process with so many CPU devices."""
    devices = f"--xla_force_host_platform_device_count={count}"
    flags = f"{compilation.FAST} {devices} --xla_cpu_collective_call_terminate_timeout_seconds=600"
    # Collectives of a step may wait for one another on as many threads as there are cores; with few that is for ever.
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PJRT_NPROC": "64", "NPROC": "64"}


def run_python(code: str, *, timeout: float = 120, **env: str) -> str:
    """Standard output of a fresh interpreter in the repository's root; fails with its standard error."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **env},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def hearing_ctrl_c(*command: str) -> list[str]:
    """Return the command of a program that Ctrl-C ends.

    What a shell starts with & is deaf to it, and so is all that it starts: these tests too, perhaps. subprocess's
    preexec_fn, which could mend it, forks a process that has JAX's threads.
    """
    code = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", code, *command]


def with_compiler(folders: str, *command: str, timeout: float = 600) -> subprocess.CompletedProcess:
    """A Python program beside the compilers that `make test` puts into these folders of its environment."""
    beside = (Path(sys.prefix) / folder for folder in folders.split())
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", *beside)))
    settings = {**WITHOUT_A_TPU, **WITHOUT_A_GPU, "XLA_FLAGS": "", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@dataclasses.dataclass(frozen=True)
class Tiny:
    """One random checkpoint on both sides: transformers in torch and jvlm in JAX, float32."""

    folder: Path
    config: dict[str, Any]
    torch_model: Any
    model: Any
    processor: Any

    @classmethod
    def create(cls, folder: Path, tokenizer: Path, **changes: Any) -> Tiny:
        """Write a checkpoint with the changes to `tiny_config`, and load it twice."""
        import jvlm

        config = tiny_config(token_ids(tokenizer), **changes)
        folder.mkdir(parents=True, exist_ok=True)
        write_folder(folder, tokenizer, config, limits=(4 * 784, 64 * 784))
        write_tensors(folder, random_tensors(tensor_shapes(config)))
        model, processor = jvlm.load(folder)
        return cls(folder, config, torch_model(folder), model, processor)


def torch_model(folder: Path) -> Any:
    """The transformers model of a folder, float32."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(str(folder), dtype=torch.float32).eval()


def image_processor(folder: Path) -> Any:
    """transformers' image processor of a folder, in its form without torchvision."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(str(folder))


def chat_messages(example: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of an ms-swift example as transformers' chat templates take them."""
    messages = []
    for message in example["messages"]:
        parts = [p for p in re.split("(<image>|<video>)", message["content"]) if p]
        blocks = [{"type": p[1:-1]} if p in ("<image>", "<video>") else {"type": "text", "text": p} for p in parts]
        messages.append({"role": message["role"], "content": blocks})
    return messages


def hf_inputs(tiny: Tiny, example: dict[str, Any], *, generation_prompt: bool = False) -> dict[str, Any]:
    """What transformers' processor gives for an example; video pixels from `reference_patches`, frames not resized."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tiny.folder))
    text = tokenizer.apply_chat_template(
        chat_messages(example), tokenize=False, add_generation_prompt=generation_prompt
    )
    inputs: dict[str, Any] = {}
    grids: dict[str, list] = {"image": [], "video": []}
    if example.get("images"):
        media = image_processor(tiny.folder)(example["images"], return_tensors="np")
        inputs["pixel_values"] = torch.from_numpy(np.ascontiguousarray(media["pixel_values"]))
        grids["image"] = [tuple(int(n) for n in g) for g in media["image_grid_thw"]]
    if example.get("videos"):
        videos = [reference_patches(frames, frames[0].height, frames[0].width) for frames in example["videos"]]
        inputs["pixel_values_videos"] = torch.from_numpy(np.concatenate([pixels for pixels, _ in videos]))
        grids["video"] = [grid for _, grid in videos]
    for kind, name in (("image", "image_grid_thw"), ("video", "video_grid_thw")):
        if grids[kind]:
            inputs[name] = torch.tensor(grids[kind])
        pieces = text.split(f"<|{kind}_pad|>")
        pads = [f"<|{kind}_pad|>" * (t * h * w // 4) for t, h, w in grids[kind]]
        text = "".join(a + b for a, b in itertools.zip_longest(pieces, pads, fillvalue=""))
    ids = tokenizer(text, return_tensors="np")["input_ids"]
    inputs["input_ids"] = torch.from_numpy(ids)
    kinds = (ids == tiny.config["image_token_id"]) + 2 * (ids == tiny.config["video_token_id"])
    inputs["mm_token_type_ids"] = torch.from_numpy(kinds.astype(np.int32))
    return inputs


def hf_positions(positions: np.ndarray) -> Any:
    """Position ids [S, 3] of ours as transformers wants them, [3, 1, S]."""
    import torch

    return torch.from_numpy(np.asarray(positions, np.int64).T[:, None].copy())


# Prepended to programs that measure themselves: peak of anonymous memory, so pages mapped from files do not count.
MEMORY_PROBE = """
import threading, time

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

class Peak:
    def __enter__(self):
        self.start = self.most = anonymous()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self
    def watch(self):
        while not self.done.is_set():
            self.most = max(self.most, anonymous())
            time.sleep(0.002)
    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
    @property
    def growth(self):
        return max(self.most, anonymous()) - self.start
"""


def write_big_checkpoint(folder: Path, tokenizer: Path, *, shards: int = 1) -> int:
    """About 300 MB of bfloat16 in many tensors; returns the bytes of the largest of them in float32."""
    import ml_dtypes

    config = tiny_config(
        token_ids(tokenizer),
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=4096,
        rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]},
        vision_config={"out_hidden_size": 1024},
    )
    write_folder(folder, tokenizer, config, limits=(4 * 784, 64 * 784))
    noise = np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32).astype(ml_dtypes.bfloat16)
    shapes = tensor_shapes(config)
    write_tensors(folder, {name: np.resize(noise, shape) for name, shape in shapes.items()}, shards)
    return 4 * max(int(np.prod(shape)) for shape in shapes.values())


def raw_tensors(folder: Path) -> dict[str, tuple[Any, tuple[int, ...], bytes]]:
    """Tensor name -> (dtype, shape, bytes), read by the safetensors library through torch."""
    import torch
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                value = tensors.get_tensor(name)
                found[name] = (value.dtype, tuple(value.shape), value.contiguous().view(torch.uint8).numpy().tobytes())
    return found


def fmix32(h):
    """The end of MurmurHash3, as Austin Appleby wrote it down."""
    h &= 0xFFFFFFFF
    h ^= h >> 16
    h = h * 0x85EBCA6B & 0xFFFFFFFF
    h ^= h >> 13
    h = h * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16
