"""A whole model family outside of jvlm, as small as it can be: docs/adding-a-model.md walks through these files.

Its encoder looks at each patch alone. Its connector and language model are jvlm's own.
"""

from jvlm.data.chat_format import ChatFormat
from jvlm.families import AdapterTargets, Family, adapters
from toy_vlm.checkpoint import HF
from toy_vlm.image_processor import ToyImageConfig

FAMILY = Family(
    name="toy_vlm",
    # for tokenizers without a chat template; those with one must write this placeholder for an image
    chat_format=ChatFormat("{% for message in messages %}...{% endfor %}", image="<|image_pad|>"),
    image_config=ToyImageConfig(),
    token_ids={"image_token_id": 1},
    adapter_targets=AdapterTargets(
        encoder=(r"encoder\.(patch_embed|mix)",), connector=(r"connector\.(hidden|out)",), decoder=adapters.TRANSFORMER
    ),
    hf=HF,
)
