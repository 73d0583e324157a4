"""A tokenizer of one token a character."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]
VOCAB = {token: i for i, token in enumerate([*SPECIAL_TOKENS, "\n", *map(chr, range(32, 127))])}


def build_tokenizer(bos=False, eos=True, chat_template=None):
    """One token a character (ASCII); `<s>` is 1 and put first only if `bos`, `</s>` is 2 and known only if `eos`."""
    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>"} | ({"eos_token": "</s>"} if eos else {})
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = chat_template
    return wrapped
