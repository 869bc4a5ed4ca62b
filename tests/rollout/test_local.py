"""A model that answers in this process: streamed, from a file, in a chat."""

import asyncio
import json
import os
import signal

import numpy as np
import pytest

from flux_ray import generate
from flux_ray.chat import Chat, _answer, _obey
from flux_ray.config import changed
from flux_ray.data import PromptSource
from flux_ray.records import SamplingRequest
from tests.tiny import tiny_tokenizer

pytestmark = [pytest.mark.system, pytest.mark.asyncio(loop_scope="session")]

CONTEXT = 512


@pytest.fixture
def config(served):
    return changed(served.config, {"rollout.max_model_len": CONTEXT, "eval.num_samples": 2})


def request(seed=5, max_tokens=20):
    return SamplingRequest(np.array([4, 13, 5], np.int32), 1, seed=seed, temperature=0.7, max_tokens=max_tokens)


async def test_a_stream_is_the_text_of_the_same_sample(served):
    (whole,) = (await served.engine.generate(request())).completions
    pieces = [piece async for piece in served.engine.stream(request())]
    assert "".join(pieces) == tiny_tokenizer().decode(whole.token_ids, skip_special_tokens=True)
    assert len(pieces) > 1 and served.engine.was_cut == (whole.finish_reason == "length")


async def test_ctrl_c_ends_an_answer_and_not_the_chat(served, capsys):
    asyncio.get_running_loop().call_later(0.3, os.kill, os.getpid(), signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    for seed in range(50):  # one may end by itself before
        if await _answer(served.engine, request(seed, max_tokens=500)) is None:
            break
    assert capsys.readouterr().out.count("(ended; not kept)") == 1
    assert signal.getsignal(signal.SIGINT) is before
    assert await _answer(served.engine, request()) is not None


async def test_a_chat_remembers_until_it_is_reset(served, config, capsys):
    chat = Chat(config, tiny_tokenizer())
    assert await _obey(chat, served.engine, "hello")
    first = capsys.readouterr().out
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert chat.messages[1]["content"] == first.partition(" (cut")[0].rstrip("\n")
    assert await _obey(chat, served.engine, "/system be brief")
    assert chat.messages == [] and chat.system == "be brief"
    decoded = tiny_tokenizer().decode(chat.request("hi").token_ids)
    assert decoded == "system:be brief\nuser:hi\nassistant:"
    assert await _obey(chat, served.engine, "/what") and "/what is none of /reset" in capsys.readouterr().out
    assert not await _obey(chat, served.engine, "/quit")


async def test_each_prompt_of_a_file_is_answered_in_its_order(served, config, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(8)))
    tokenizer = tiny_tokenizer()
    source = PromptSource.for_eval(config, tokenizer, prompts=str(file), context_length=CONTEXT)
    lines = [line async for line in generate.responses(config, served.engine, tokenizer, source)]
    assert [(line["row"], line["prompt"], len(line["responses"])) for line in lines] == [
        (i, f"{i}+{i}=", 2) for i in range(8)]
    again = [line async for line in generate.responses(config, served.engine, tokenizer, source)]
    assert again == lines
