"""lmms-eval's OpenAI model on three questions: python lmms_client.py BASE_URL MODEL PICTURE_URL."""

import base64
import io
import json
import sys

from lmms_eval.api.instance import Instance
from lmms_eval.models.chat.openai import OpenAICompatible
from PIL import Image

base, name, picture = sys.argv[1:]
image = Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2])))
model = OpenAICompatible(
    model_version=name, base_url=base, api_key="none", max_retries=1, num_concurrent=3, httpx_trust_env=False
)
model.task_dict = {"questions": {"test": ["what?", "where?", "what?"]}}


def messages(question):
    return [{"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": question}]}]


def instance(number):
    told = {"task": "questions", "doc_id": number, "repeats": 1}
    arguments = ("", messages, {"max_new_tokens": 6, "temperature": 0}, number, "questions", "test")
    return Instance("generate_until", arguments=arguments, idx=0, metadata=told)


answers = model.generate_until([instance(number) for number in range(3)])
print(json.dumps({"answers": [getattr(one, "text", one) for one in answers]}))
