"""The control tokens of DeepSeek-V3 and R1, under their own names.

Ids are assigned in the order of `SPECIAL_TOKENS`: 0 begin, 1 end and 2 pad as in DeepSeek's vocabulary; the others,
which DeepSeek puts behind its 128 000 merges, follow from 3 on, so that ids do not depend on the vocabulary's size.
The bars are U+FF5C and the blanks U+2581, which keeps the tokens out of anything people type.
"""

from tokenizers import AddedToken

BOS_TOKEN = "<｜begin▁of▁sentence｜>"
EOS_TOKEN = "<｜end▁of▁sentence｜>"
# DeepSeek pads with EOS. Padding is left out of the loss by its id in most collators, and a model that never sees
# its EOS in the loss never learns to stop; so padding has the id that DeepSeek's vocabulary keeps for it.
PAD_TOKEN = "<｜▁pad▁｜>"

USER_TOKEN = "<｜User｜>"
ASSISTANT_TOKEN = "<｜Assistant｜>"
THINK_TOKEN = "<think>"
END_THINK_TOKEN = "</think>"

# `skip_special_tokens=True` removes these from decoded text.
_REMOVED = (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, "<|EOT|>")

SPECIAL_TOKENS = (
    BOS_TOKEN,
    EOS_TOKEN,
    PAD_TOKEN,
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    USER_TOKEN,
    ASSISTANT_TOKEN,
    "<|EOT|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
    THINK_TOKEN,
    END_THINK_TOKEN,
)


def added_tokens() -> list[AddedToken]:
    """The control tokens as `tokenizers` wants them, in the order of their ids.

    The marks of turns and reasoning are not `special`, as in DeepSeek's tokenizer.json, and neither are the other
    marks inside a text: they survive `skip_special_tokens=True`, because who reads a reply must see where reasoning
    ends and a tool call begins.
    """
    return [AddedToken(token, special=token in _REMOVED, normalized=False) for token in SPECIAL_TOKENS]
