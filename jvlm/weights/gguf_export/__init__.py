"""GGUF files for llama.cpp: the language model, the vision tower ("mmproj") and LoRA adapters.

Names and values of keys are those of llama.cpp's converters (github.com/ggml-org/llama.cpp, conversion/ and
gguf-py/gguf/constants.py).
"""

from jvlm.weights.gguf_export.folder import export, export_folder
from jvlm.weights.gguf_export.lora import write_lora
from jvlm.weights.gguf_export.text import write_text
from jvlm.weights.gguf_export.vision import write_vision

__all__ = ["export", "export_folder", "write_lora", "write_text", "write_vision"]
