import pytest
from transformers import PreTrainedTokenizerFast

from flux_ray.toy.addition import character_tokenizer

CHARACTERS = "".join(chr(code) for code in range(32, 127)) + "\nøé"
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(**knobs):
    """One token a character."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=character_tokenizer(CHARACTERS), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    for name, value in knobs.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.fixture(scope="session")
def plain_tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer():
    return make_tokenizer(chat_template=CHAT_TEMPLATE)
