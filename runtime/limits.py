"""How much of what it may ask for a request can have: what is checked in a request has this much room on the device."""

from typing import Final

MAX_LOGPROBS: Final = 20  # likeliest tokens of a place
MAX_STOP_TOKEN_IDS: Final = 32
MAX_EOS_IDS: Final = 32  # of a model
MAX_BAD_WORDS: Final = 128  # token sequences, after tokenizing
MAX_BAD_WORD_LEN: Final = 16  # tokens
