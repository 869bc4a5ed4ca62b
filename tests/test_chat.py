"""A conversation before it is sampled from: templates, limits, and the mistakes of a command line."""

import pytest

from flux_ray import __main__ as cli
from flux_ray.chat import Chat
from flux_ray.config import from_dict
from flux_ray.errors import UserError
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.unit

#: A command line ► what its one line says.
MISTAKES = {
    "chat temperature=1": "the model comes first", "chat m x": "'x' is no option", "chat /no/model": "no such folder",
    "generate m": "flux-ray generate MODEL FILE", "generate m f -o /no/such/x": "there is no folder /no/such",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_told_in_a_line(words, capsys):
    assert cli.main(words.split()) == 2
    assert MISTAKES[words] in capsys.readouterr().err


def test_a_chat_that_fills_the_context_says_how_to_go_on():
    config = from_dict({"model.path": "m", "rollout.max_model_len": 40, "rollout.max_tokens": 30})
    chat = Chat(config, tiny_tokenizer())
    assert chat.request("hi").max_tokens == 40 - len("user:hi\nassistant:")
    chat.answered("hi", "there")
    with pytest.raises(UserError, match=r"/reset begins anew"):
        chat.request("and what else?")


def test_a_model_without_a_template_is_asked_line_by_line():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    chat = Chat(from_dict({"model.path": "m", "rollout.max_model_len": 40}), tokenizer)
    chat.answered("1+1=", "2")
    assert tokenizer.decode(chat.request("2+2=").token_ids) == "2+2="
    with pytest.raises(UserError, match="no chat template"):
        chat.reset("Be brief.")
