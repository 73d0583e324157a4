"""The processor of a tiny llava: one token a character, four for a picture of one shade."""

import numpy as np
from PIL import Image
from tiny_tokenizers import build_tokenizer
from transformers import CLIPImageProcessorPil, LlavaProcessor


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
)


def make_processor(chat_template=TEMPLATE):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<unk>"})
    size = {"height": 16, "width": 16}
    pictures = CLIPImageProcessorPil(size=size, crop_size=size)
    options = dict(patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    return LlavaProcessor(pictures, tokenizer, chat_template=chat_template, **options)


def picture(number):
    return Image.fromarray(np.full((16, 16, 3), 10 * number, dtype=np.uint8))
