import asyncio
import math
import pickle

import numpy as np
import psutil
import pytest

from flux_ray.cluster.group import Members
from flux_ray.config import PolicyGradientConfig, PromptDataConfig, RewardConfig, RolloutConfig, from_dict
from flux_ray.messages import Assignment, GroupReady, Orders, PartGenerated
from flux_ray.records import Completion, Prompt, RolloutGroup, Sampled, Trajectory
from flux_ray.reward.values import BAD_RESULT, RAISED, TIMED_OUT, RewardError
from flux_ray.reward.worker import RewardWorker, overlong
from flux_ray.rollout.scoring import responses_of, scored_group
from flux_ray.rollout.worker import RolloutWorker
from tests.fakes.actors import LocalGroup
from tests.tiny import CHARACTERS, tiny_tokenizer

pytestmark = pytest.mark.system  # users' functions run in processes of their own

EOS = 1
STEP, VERSION = 3, 8  # a run that went back to a step has published more versions than it has done steps
TOKENIZER = tiny_tokenizer(None)


def responses_to(group):
    """What a reward worker is given of the group, by a rollout worker."""
    ids = [t.token_ids[t.prompt_length :].tolist() for t in group.trajectories]
    return responses_of(group, TOKENIZER.batch_decode(ids, skip_special_tokens=True), STEP)


async def scored_by(worker, group):
    """The ScoredGroup, as a rollout worker makes it of what the reward worker says."""
    return scored_group(group, await worker.score(responses_to(group)))


def make_group(texts, *, uid=9, prompt="12+30=", columns=None, versions=None, truncated=(), rewards=()):
    """A group whose responses are `texts`, each with its end token but for those truncated."""
    ids = {character: number for number, character in enumerate(CHARACTERS, start=3)}
    start = [ids[character] for character in "12+30="]
    trajectories = []
    for place, text in enumerate(texts):
        response = [ids[character] for character in text] + ([] if place in truncated else [EOS])
        mask = np.array([False] * len(start) + [True] * len(response))
        version = versions[place] if versions else VERSION
        trajectories.append(
            Trajectory(
                token_ids=np.array(start + response, np.int32),
                loss_mask=mask,
                sampler_logprobs=np.zeros(len(mask), np.float32),
                versions=np.where(mask, version, -1).astype(np.int32),
                prompt_length=len(start),
                finish_reason="length" if place in truncated else "stop",
            )
        )
    columns = {"answer": "42"} if columns is None else columns
    row = Prompt(uid, 4, prompt, np.array(start, np.int32), columns, len(texts), 1, rewards=rewards)
    return RolloutGroup(row, tuple(trajectories))


@pytest.fixture
def score(tmp_path):
    """Score a group by functions of a file (or by rules), with the reward's knobs."""

    def run(group, code="", data=None, **knobs):
        path = tmp_path / "mine.py"
        path.write_text(code)
        knobs["functions"] = [name if name.isidentifier() else f"{path}{name}" for name in knobs.get("functions", [])]
        rollout = RolloutConfig(max_tokens=knobs.pop("max_tokens", 256))
        config = PolicyGradientConfig(reward=RewardConfig(**knobs), data=data or PromptDataConfig(), rollout=rollout)
        return asyncio.run(scored(RewardWorker(config), group))

    async def scored(worker, group):
        try:
            return await scored_by(worker, group)
        finally:
            worker.close()

    return run


def test_a_scored_group_is_complete(score):
    group = make_group(["42", "41", "429"], versions=[5, 4, 6], truncated={2})
    scored = score(group)
    assert scored.uid == 9 and scored.oldest_version == 4
    assert scored.rewards.tolist() == scored.task_rewards.tolist() == [1, 0, 0]
    assert scored.parts["numeric_or_exact"].tolist() == [1, 0, 0]
    assert scored.num_tokens.tolist() == [9, 9, 9] and scored.num_loss_tokens.tolist() == [3, 3, 3]
    assert scored.truncated.tolist() == [False, False, True]


def test_weights_and_shaping(score):
    scored = score(make_group(["42", "4142"]), functions=["exact_match", "length"], weights=[2.0, 1.0],
                   options={"length": {"penalty": 0.1}})  # fmt: skip
    np.testing.assert_allclose(scored.rewards, [2 - 0.3, -0.5])
    np.testing.assert_allclose(scored.task_rewards, [2, 0])
    np.testing.assert_allclose(scored.parts["length"], [-0.3, -0.5])


def test_a_prompt_is_scored_by_the_functions_of_its_set_alone(score):
    code = "def fails(**given): raise ValueError('of another set')\n"
    knobs = {"functions": ["exact_match", ":fails"], "weights": [2.0, 1.0]}
    scored = score(make_group(["42", "7"], rewards=("exact_match",)), code, **knobs)
    assert scored.rewards.tolist() == [2.0, 0.0] and scored.task_rewards.tolist() == [2.0, 0.0]
    assert np.isnan(scored.parts["fails"]).all()


def test_the_soft_penalty_on_length_is_shaping(score):
    """Sampled tokens 2, 8, 9, 10 of 10: 0 up to 8, then down to the whole penalty at the limit."""
    group = make_group(["4", "4242424", "42424242", "4242424242"], truncated={3}, columns={"answer": "4"})
    scored = score(group, functions=["exact_match"], overlong_penalty=1.0, max_tokens=10)
    np.testing.assert_allclose(scored.parts["overlong"], [0, 0, -0.5, -1], atol=1e-12)
    np.testing.assert_allclose(scored.rewards, [1, 0, -0.5, -1], atol=1e-12)
    np.testing.assert_allclose(scored.task_rewards, [1, 0, 0, 0])
    scored = score(group, functions=["exact_match"], overlong_penalty=0.5, overlong_tokens=4, max_tokens=10)
    np.testing.assert_allclose(scored.parts["overlong"], [0, -0.25, -0.375, -0.5])
    assert "overlong" not in score(group, functions=["exact_match"], max_tokens=10).parts


def test_the_soft_penalty_goes_by_the_set_s_own_limit():
    config = from_dict({"reward.overlong_penalty": 1.0, "reward.overlong_tokens": 6, "rollout.max_tokens": 100})
    np.testing.assert_allclose(overlong(np.array([4, 7, 10]), config.reward, longest=10), [0, -0.5, -1])
    np.testing.assert_allclose(overlong(np.array([0, 2, 4]), config.reward, longest=4), [0, -0.5, -1])
    np.testing.assert_allclose(overlong(np.array([94, 97, 100]), config.reward, longest=100), [0, -0.5, -1])


def test_the_configured_answer_column_is_what_rules_compare_with(score):
    group = make_group(["42"], columns={"gold": "42", "answer": "no"})
    assert score(group, functions=["exact_match"], data=PromptDataConfig(answer_column="gold")).rewards.tolist() == [1]
    assert score(group, functions=["exact_match"]).rewards.tolist() == [0]


def test_none_is_left_out_and_dicts_are_logged_apart(score):
    code = """
def some(prompts, completions, **columns):
    return [None, 1, {"a": 2.0, "b": None}, {"a": 0.5, "c": 0.25}]
def never(completions, **columns):
    return [None, None, None, float("nan")]
"""
    scored = score(make_group(["1"] * 4), code, functions=[":some", ":never"], weights=[2.0, 1.0])
    np.testing.assert_array_equal(scored.rewards, [math.nan, 2, 4, 1.5])
    np.testing.assert_array_equal(scored.parts["some"], [math.nan, 1, 2, 0.75])
    np.testing.assert_array_equal(scored.parts["some/a"], [math.nan, math.nan, 2, 0.5])
    np.testing.assert_array_equal(scored.parts["some/c"], [math.nan, math.nan, math.nan, 0.25])
    assert np.isnan(scored.parts["never"]).all()


# In TRL's form: everything by keyword, texts for plain prompts, messages for chats.
TRL_CODE = """
def by_ids(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]

def accuracy(completions, solution, log_extra=None, **kwargs):
    log_extra("solution", list(solution))
    kwargs["log_metric"]("seen", len(solution))
    assert kwargs["trainer_state"].global_step == 3, "the step, whatever version it was published as"
    assert "completion" not in kwargs and kwargs["level"] == ["easy", "easy"]
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if content == right else 0.0 for content, right in zip(contents, solution)]

async def judged(prompts, completions, **kwargs):
    import asyncio
    await asyncio.sleep(0.001)
    return [float(prompt[-1]["content"] == "sum?") for prompt in prompts]

class Judge:
    async def __call__(self, completions, **kwargs):
        return [0.5 for _ in completions]

judge = Judge()
"""


def test_functions_written_for_trl_work_unchanged(score):
    chat = [{"role": "user", "content": "sum?"}]
    group = make_group(["42", "1"], prompt=chat, columns={"solution": "42", "level": "easy", "completion": "42"})
    scored = score(group, TRL_CODE, functions=[":by_ids", ":accuracy", ":judged", ":judge"])
    assert scored.parts["by_ids"].tolist() == [3, 2]
    assert scored.parts["accuracy"].tolist() == [1, 0]
    assert scored.parts["judged"].tolist() == [1, 1]
    assert scored.parts["judge"].tolist() == [0.5, 0.5]
    assert scored.parts["seen"].tolist() == [2, 2]
    assert scored.rewards.tolist() == [5.5, 3.5]


def test_a_plain_prompt_gives_texts(score):
    code = "def f(prompts, completions): return [float(p + c == '12+30=42') for p, c in zip(prompts, completions)]"
    assert score(make_group(["42", "41"]), code, functions=[":f"]).rewards.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        ("return [1 / (c != '41') for c in completions]", RAISED, "row 5 (from 1), sample 2 of 3: ZeroDivisionError"),
        ("raise TimeoutError('of its own')", RAISED, "sample 1 of 3: TimeoutError: of its own"),
        ("raise StopIteration", RAISED, "sample 1 of 3: StopIteration"),
        ("raise SystemExit(3)", RAISED, "sample 1 of 3: SystemExit"),
        ("return [0.0]", BAD_RESULT, "gave 1 values for 3 samples"),
        ("return 1.0", BAD_RESULT, "gave float 1.0, not a list of 3 values"),
        ("return None", BAD_RESULT, "gave NoneType None"),
        ("return 'abc'", BAD_RESULT, "gave str 'abc'"),
        ("return [0.0, '1', 0.0]", BAD_RESULT, "sample 2 of 3: gave str '1'"),
        ("return [0.0, 0.0, float('inf')]", BAD_RESULT, "sample 3 of 3: gave float inf"),
        ("return [0.0, {'a': [1]}, 0.0]", BAD_RESULT, "sample 2 of 3, part 'a': gave list [1]"),
        ("return [0.0, {'a': {'b': 1.0}}, 0.0]", BAD_RESULT, "sample 2 of 3, part 'a': gave dict {'b': 1.0}"),
        ("import time; time.sleep(30)", TIMED_OUT, "no value within reward.deadline_s=0.2"),
    ],
)
@pytest.mark.parametrize("keyword", ["def", "async def"])
def test_a_failure_names_function_row_sample_and_cause(score, keyword, body, kind, message):
    if keyword == "async def":
        body = body.replace("import time; time", "import asyncio; await asyncio")
        message = message.replace("StopIteration", "RuntimeError")  # Python's own doing
    deadline_s = 0.2 if kind == TIMED_OUT else 60.0
    with pytest.raises(RewardError) as error:
        code = f"{keyword} f(completions): {body}"
        score(make_group(["42", "41", "1"]), code, functions=[":f"], deadline_s=deadline_s)
    assert error.value.kind == kind
    assert str(error.value).startswith("reward f, prompt row 5") and message in str(error.value)
    again = pickle.loads(pickle.dumps(error.value))  # noqa: S301
    assert (str(again), again.kind) == (str(error.value), kind)


def test_a_late_call_does_not_hold_up_the_next_one(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import time\ndef f(completions):\n    time.sleep(30 if completions == ['1'] else 0)\n    return [1.0]\n"
    )
    config = PolicyGradientConfig(reward=RewardConfig(functions=[f"{tmp_path}/mine.py:f"], deadline_s=1.0))
    worker = RewardWorker(config)

    async def both():
        groups = [make_group(["1"]), make_group(["2"])]
        return await asyncio.gather(*(scored_by(worker, group) for group in groups), return_exceptions=True)

    late, scored = asyncio.run(both())
    assert isinstance(late, RewardError) and late.kind == TIMED_OUT
    assert scored.rewards.tolist() == [1]


def test_an_async_function_that_blocks_harms_no_other(tmp_path):
    """Each call's time counts from its own beginning, though they share a loop; one that blocks it for good is late
    alone, and those behind it and after it are answered by a loop of their own."""
    (tmp_path / "mine.py").write_text(
        "import time\nasync def f(completions):\n"
        "    time.sleep({'1': 0.4, '2': 30}.get(completions[0], 0))\n    return [1.0]\n"
    )
    config = PolicyGradientConfig(reward=RewardConfig(functions=[f"{tmp_path}/mine.py:f"], deadline_s=1.0))
    worker = RewardWorker(config)

    async def all_of_them():
        slow = await asyncio.gather(*(scored_by(worker, make_group(["1"])) for _ in range(4)))  # 1.6 s together
        groups = [make_group([text]) for text in ("2", "3", "3")]
        behind = await asyncio.gather(*(scored_by(worker, group) for group in groups), return_exceptions=True)
        return slow, behind, await scored_by(worker, make_group(["3"]))

    slow, (late, *behind), after = asyncio.run(all_of_them())
    assert [scored.rewards.tolist() for scored in (*slow, *behind, after)] == [[1]] * 7
    assert isinstance(late, RewardError) and late.kind == TIMED_OUT


def test_functions_that_are_not_async_take_turns(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import time\nRUNNING = []\ndef f(completions):\n    RUNNING.append(1)\n    time.sleep(0.01)\n"
        "    at_once = len(RUNNING)\n    RUNNING.pop()\n    return [at_once]\n"
    )
    config = PolicyGradientConfig(reward=RewardConfig(functions=[f"{tmp_path}/mine.py:f"]))
    worker = RewardWorker(config)

    async def many():
        return await asyncio.gather(*(scored_by(worker, make_group(["1"])) for _ in range(5)))

    assert [scored.rewards.tolist() for scored in asyncio.run(many())] == [[1]] * 5


def test_a_cancelled_call_leaves_the_line_and_a_running_one_keeps_its_turn_to_its_end(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import time\nfrom pathlib import Path\nRUNNING, CALLED = [], []\ndef f(completions):\n"
        "    CALLED.append(completions[0])\n    Path(__file__).with_name('called').touch()\n"
        "    RUNNING.append(1)\n    time.sleep(0.3)\n    at_once = len(RUNNING)\n    RUNNING.pop()\n"
        "    return [10 * len(CALLED) + at_once]\n"
    )
    config = PolicyGradientConfig(reward=RewardConfig(functions=[f"{tmp_path / 'mine.py'}:f"]))

    async def three():
        worker = RewardWorker(config)
        first, second, third = (asyncio.create_task(scored_by(worker, make_group([text]))) for text in "123")
        while not (tmp_path / "called").exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.01)
        first.cancel()
        second.cancel()
        async with asyncio.timeout(60):
            return await asyncio.gather(first, second, third, return_exceptions=True)

    *cancelled, scored = asyncio.run(three())
    assert all(isinstance(result, asyncio.CancelledError) for result in cancelled)
    assert scored.rewards.tolist() == [21.0], "the second was never called, and the first ran alone to its end"


class Says:
    """An engine that gives each sample of a prompt its response."""

    def __init__(self, *texts):
        self.sampled = [t.token_ids[t.prompt_length :] for t in make_group(texts).trajectories]

    async def context_length(self):
        return 256

    async def generate(self, request):
        completions = [Completion(ids, np.zeros(len(ids), np.float32), np.full(len(ids), VERSION, np.int32), "stop")
                       for ids in self.sampled[: request.n]]
        return Sampled(tuple(completions), STEP)


async def test_what_is_sampled_reaches_rewards_without_special_tokens(tmp_path):
    """A rollout worker decodes each response once, for its rewards and for people."""
    (tmp_path / "mine.py").write_text(
        "def f(prompts, completions, completion_ids, trainer_state):\n"
        "    assert trainer_state.global_step == 3 and [len(ids) for ids in completion_ids] == [3, 3, 1]\n"
        "    return [float(['42', '7+', ''].index(text)) for text in completions]\n"
    )
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    config = from_dict({"reward.functions": [f"{tmp_path}/mine.py:f"], "rollout.group_size": 3})
    groups = {"engine": LocalGroup("engine", lambda index: Says("42", "7+", ""), 1),
              "reward": LocalGroup("reward", lambda index: RewardWorker(config), 1),
              "rollout": LocalGroup("rollout", lambda index: RolloutWorker(
                  config, index=index, tokenizer_path=str(tmp_path / "tokenizer"), most_groups=1), 1)}
    worker = groups["rollout"][0].object
    await worker.meet(Members(1, {role: tuple(group) for role, group in groups.items()}))
    prompt = make_group(["42", "7+", ""]).prompt
    await worker.order(Orders(assignments=[Assignment(prompt, attempt=0, engine=0, group_size=3)]))
    news = []
    async with asyncio.timeout(30):
        while not any(isinstance(one, GroupReady) for one in news):
            news += await worker.news()
    (generated, ready) = news
    assert isinstance(generated, PartGenerated) and generated.num_tokens == 3 + 3 + 1
    assert ready.scored.rewards.tolist() == [0, 1, 2] and ready.scored.num_loss_tokens.tolist() == [3, 3, 1]
    assert await worker.texts([(prompt.uid, 0)]) == ["42"]


def test_the_process_of_a_hanging_reward_is_ended(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os, time\nfrom pathlib import Path\ndef f(completions):\n"
        "    Path(__file__).with_name('pid').write_text(str(os.getpid()))\n    time.sleep(3600)\n")
    reward = RewardConfig(functions=[f"{tmp_path}/mine.py:f"], deadline_s=0.5)
    worker = RewardWorker(PolicyGradientConfig(reward=reward))
    with pytest.raises(RewardError):
        asyncio.run(scored_by(worker, make_group(["1"])))
    _, alive = psutil.wait_procs([child for child in psutil.Process().children(recursive=True)
                                  if child.pid == int((tmp_path / "pid").read_text())], timeout=10)
    assert not alive


SAME_NAME_CODE = """
def mine(completions, log_metric, **kwargs):
    log_metric("mine", 100)
    log_metric("overlong", 100)
    log_metric("other", 7)
    return [1.0 for _ in completions]
"""


def test_a_logged_metric_never_takes_the_place_of_a_reward(score):
    scored = score(make_group(["42", "1"]), SAME_NAME_CODE, functions=[":mine"], overlong_penalty=1.0)
    assert scored.rewards.tolist() == scored.task_rewards.tolist() == [1, 1]
    assert scored.parts["mine"].tolist() == [1, 1] and scored.parts["overlong"].tolist() == [0, 0]
    assert scored.parts["other"].tolist() == [7, 7]


GATED_CODE = """
import asyncio
from pathlib import Path
HERE = Path(__file__).parent
async def f(completions):
    (HERE / f"began {completions[0]}").touch()
    while not (HERE / f"open {completions[0]}").exists():
        await asyncio.sleep(0.005)
    return [1.0]
"""


@pytest.fixture
def gated(tmp_path):
    """A worker whose reward is given as soon as the test opens the gate of that text, and what has begun there."""
    (tmp_path / "mine.py").write_text(GATED_CODE)
    worker = RewardWorker(PolicyGradientConfig(reward=RewardConfig(functions=[f"{tmp_path}/mine.py:f"])))

    class Gates:
        def score(self, text):
            return asyncio.create_task(worker.score(responses_to(make_group([text], uid=int(text)))))

        def score_alone(self, text):
            return asyncio.create_task(worker.score_alone(responses_to(make_group([text], uid=int(text)))))

        def begun_alone(self, text):
            return asyncio.create_task(worker.begun_alone(int(text)))

        def open(self, *texts):
            for text in texts:
                (tmp_path / f"open {text}").touch()

        async def began(self, text):
            """Waits until the function has been called with that text."""
            for _ in range(3000):
                if (tmp_path / f"began {text}").exists():
                    return
                await asyncio.sleep(0.01)
            raise AssertionError(f"{text} has not begun")

        async def has_not_begun(self, text):
            """It has had the time to, and does not."""
            await asyncio.sleep(0.5)
            return not (tmp_path / f"began {text}").exists()

    return Gates()


async def rewards_of(*scorings):
    async with asyncio.timeout(30):
        return [scores.rewards.tolist() for scores in await asyncio.gather(*scorings)]


async def test_who_is_scored_alone_waits_for_those_that_run_and_others_wait_for_it(gated):
    running = [gated.score("1"), gated.score("2")]
    await gated.began("1")
    await gated.began("2")
    alone, begun = gated.score_alone("3"), gated.begun_alone("3")
    await asyncio.sleep(0)
    later = gated.score("4")
    gated.open("1", "4")
    assert await rewards_of(running[0]) == [[1]]
    assert await gated.has_not_begun("3") and not begun.done(), "one of those before it still runs"
    assert await gated.has_not_begun("4"), "it came after"
    gated.open("2")
    await gated.began("3")
    assert begun.done(), "whoever waits is told before users' code begins"
    assert await gated.has_not_begun("4"), "nobody is scored beside it"
    gated.open("3")
    assert await rewards_of(running[1], alone, later) == [[1]] * 3


async def test_who_fails_alone_lets_others_go_on(tmp_path):
    (tmp_path / "mine.py").write_text("def f(completions): return [1 / (completions[0] != '1')]")
    worker = RewardWorker(PolicyGradientConfig(reward=RewardConfig(functions=[f"{tmp_path}/mine.py:f"])))
    alone = asyncio.create_task(worker.score_alone(responses_to(make_group(["1"]))))
    await asyncio.sleep(0)
    other = asyncio.create_task(worker.score(responses_to(make_group(["2"]))))
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        await asyncio.wait_for(alone, 30)
    assert await rewards_of(other) == [[1]]


@pytest.mark.parametrize("begins", [True, False])
async def test_who_is_cancelled_alone_lets_others_go_on(gated, begins):
    """While it is scored, and while it still waits for its turn."""
    running = gated.score("1")
    await gated.began("1")
    alone, begun = gated.score_alone("2"), gated.begun_alone("2")
    await asyncio.sleep(0)
    later = gated.score("3")
    gated.open("3")
    if begins:
        gated.open("1")
        await gated.began("2")
    assert await gated.has_not_begun("3")
    alone.cancel()
    assert await rewards_of(later) == [[1]]
    gated.open("1")
    assert await rewards_of(running) == [[1]]
    assert alone.cancelled() and begun.done() == begins, "who never had the process to itself is not told as having had"


async def test_two_are_each_scored_alone(gated):
    one, other, begun = gated.score_alone("1"), gated.score_alone("2"), gated.begun_alone("2")
    await gated.began("1")
    later = gated.score("3")
    assert await gated.has_not_begun("2") and not begun.done()
    gated.open("1", "3")
    await gated.began("2")
    assert later.done() or await gated.has_not_begun("3"), "it is scored before or after, and not beside"
    gated.open("2")
    assert await rewards_of(one, other, later) == [[1]] * 3


async def test_who_was_scored_alone_before_has_to_begin_again(gated):
    """An evaluation's groups have the same uids each time: an innocent one must not be told as guilty."""
    gated.open("1")
    assert await rewards_of(gated.score_alone("1")) == [[1]]
    running = gated.score("2")
    await gated.began("2")
    again, begun = gated.score_alone("1"), gated.begun_alone("1")
    await asyncio.sleep(0.1)
    assert not begun.done(), "another one runs, which may end the process"
    gated.open("2")
    assert await rewards_of(running, again) == [[1]] * 2
    assert begun.done()


async def test_who_waited_for_one_alone_is_not_overtaken_by_the_next(gated):
    """What waited is scored beside nobody that is to be alone."""
    one = gated.score_alone("1")
    await gated.began("1")
    waited = gated.score("2")
    await asyncio.sleep(0)
    gated.open("1")
    assert await rewards_of(one) == [[1]]
    other = gated.score_alone("3")
    await gated.began("2")
    assert await gated.has_not_begun("3")
    gated.open("2", "3")
    assert await rewards_of(waited, other) == [[1]] * 2
