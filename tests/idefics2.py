"""A random small Idefics2 checkpoint, written by transformers, on both sides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import CORPUS, Tiny, chat_messages, make_tokenizer, picture, token_ids

FAKE, IMAGE, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
SPECIAL = ("<unk>", "<s>", "</s>", FAKE, IMAGE, END)
# As the hub's tokenizer folder has it.
TEMPLATE = (
    "{% for message in messages %}{{message['role'].capitalize()}}{% if message['content'][0]['type'] == 'image' %}"
    "{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
LATENTS, LONGEST, SHORTEST, PATCH = 4, 112, 42, 14


def write_tokenizer(folder: Path, *, template: bool = True) -> Path:
    """A tokenizer with Idefics2's special tokens, which begins every text with <s>."""
    return make_tokenizer(
        folder,
        SPECIAL,
        begin="<s>",
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        pad_token="<unk>",
        chat_template=TEMPLATE if template else None,
    )


def write_llama_tokenizer(folder: Path) -> Path:
    """A tokenizer as the hub's Idefics2 has it: Llama's kind, which falls back to bytes and begins texts with a space.

    Its vocabulary needs a ``vocab_size`` of 512.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = [*SPECIAL[:3], *(f"<0x{i:02X}>" for i in range(256)), *model["vocab"]]
    vocabulary, merges = {t: i for i, t in enumerate(dict.fromkeys(tokens))}, [tuple(m) for m in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    values = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_prefix_space": True}
    values |= {"additional_special_tokens": list(SPECIAL[3:]), "chat_template": TEMPLATE, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def config_values(ids: dict[str, int], **text: Any) -> dict[str, Any]:
    """config.json of a small model; ``text`` replaces values of the language model."""
    return {
        "model_type": "idefics2",
        "architectures": ["Idefics2ForConditionalGeneration"],
        "image_token_id": ids[IMAGE],
        "tie_word_embeddings": False,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 44,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 8 * PATCH,
            "patch_size": PATCH,
        },
        "perceiver_config": {
            "hidden_size": 64,
            "resampler_n_latents": LATENTS,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 12,
            "num_key_value_heads": 2,
        },
        "text_config": {
            "model_type": "mistral",
            "hidden_size": 64,
            "intermediate_size": 88,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 352,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "sliding_window": 24,
            "bos_token_id": ids["<s>"],
            "eos_token_id": ids["</s>"],
            "pad_token_id": ids["<unk>"],
            **text,
        },
    }


def write_folder(
    folder: Path, *, split: bool, tokenizer: Callable[[Path], Path] = write_tokenizer, **text: Any
) -> dict[str, Any]:
    """A whole Hugging Face folder, its tensors named and written by transformers. Returns its config.json."""
    import torch
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration

    ids = token_ids(tokenizer(folder))
    values = config_values(ids, **text)
    torch.manual_seed(0)
    model = Idefics2ForConditionalGeneration(Idefics2Config(**values))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1 and "embed" not in name and "latents" not in name:
                value.normal_(0, float(np.prod(value.shape[1:])) ** -0.5)
            elif value.ndim > 1:
                value.normal_()
            else:
                value.normal_(0 if name.endswith("bias") else 1, 0.2)
    model.save_pretrained(str(folder))
    preprocessor = {
        "do_image_splitting": split,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "image_processor_type": "Idefics2ImageProcessor",
        "processor_class": "Idefics2Processor",
        "size": {"longest_edge": LONGEST, "shortest_edge": SHORTEST},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    generation = {"eos_token_id": [ids["</s>"], ids[END]], "bad_words_ids": [[ids[FAKE]], [ids[IMAGE]]]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return values


def create(folder: Path, *, split: bool, **text: Any) -> Tiny:
    """The checkpoint of `write_folder`, loaded twice."""
    import jvlm

    values = write_folder(folder, split=split, **text)
    model, processor = jvlm.load(folder)
    return Tiny(folder, values, torch_model(folder), model, processor)


def torch_model(folder: Path) -> Any:
    """The transformers model of a folder, float32."""
    import torch
    from transformers import Idefics2ForConditionalGeneration

    return Idefics2ForConditionalGeneration.from_pretrained(str(folder), dtype=torch.float32).eval()


def hf_processor(folder: Path) -> Any:
    """transformers' own processor of a folder, in its form without torchvision."""
    from transformers import AutoTokenizer, Idefics2Processor
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    class WithPil(Idefics2Processor):
        def check_argument_for_proper_class(self, argument_name, argument):
            return type(argument)

    images, tokenizer = (c.from_pretrained(str(folder)) for c in (Idefics2ImageProcessorPil, AutoTokenizer))
    return WithPil(images, tokenizer, image_seq_len=LATENTS, chat_template=tokenizer.chat_template)


def hf_inputs(tiny: Tiny, example: dict[str, Any], *, generation_prompt: bool = False) -> dict[str, Any]:
    """What transformers' processor gives for an example."""
    processor = hf_processor(tiny.folder)
    text = processor.tokenizer.apply_chat_template(
        chat_messages(example), tokenize=False, add_generation_prompt=generation_prompt
    )
    return dict(processor(text=text, images=example.get("images") or None, return_tensors="pt"))


def turn(text: str, answer: str = "it is the red circle.", **media: Any) -> dict[str, Any]:
    """A conversation of one question and its answer."""
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], **media}


CASES = {
    "text only": turn("what is the answer?"),
    "one picture": turn("<image>what is it?", images=[picture(112, 84)]),
    "a large picture, brought down": turn("what is in <image>?", images=[picture(333, 187)]),
    "a small picture, brought up": turn("<image> ?", images=[picture(30, 20)]),
    "three pictures of different sizes": turn(
        "<image>is the <image> cat in both?<image>",
        images=[picture(84, 112), picture(140, 56, 1), picture(61, 75, 2)],
    ),
    "adjacent pictures": turn("<image><image>which one?", images=[picture(84, 112), picture(100, 84, 1)]),
    "several turns": {
        "messages": [
            {"role": "user", "content": "<image>what is it?"},
            {"role": "assistant", "content": "a dog"},
            {"role": "user", "content": "and <image>"},
            {"role": "assistant", "content": "a cat"},
        ],
        "images": [picture(112, 84), picture(84, 140, 3)],
    },
}
