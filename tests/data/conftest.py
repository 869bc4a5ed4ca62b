import pytest

from tests.tiny import tiny_tokenizer

CHARACTERS = "".join(chr(code) for code in range(32, 127)) + "\nøé"
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(**knobs):
    """One token a character; without a chat template, where none is given."""
    tokenizer = tiny_tokenizer(None, characters=CHARACTERS)
    for name, value in {"chat_template": None, **knobs}.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.fixture(scope="session")
def plain_tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer():
    return make_tokenizer(chat_template=CHAT_TEMPLATE)
