"""A real vLLM engine: its log-probs against transformers, repeats, updates over the real wire, turns with a tool."""

import asyncio
import threading

import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch
import transformers

from flux_ray.cluster.group import Members
from flux_ray.messages import Assignment, Attested, GroupAt, GroupReady, Orders
from flux_ray.protocols import ServesWeights
from flux_ray.records import FINISH_LENGTH, FINISH_STOP, Prompt, RolloutGroup, SamplingRequest, Scores
from flux_ray.rollout.dispatch import split
from flux_ray.rollout.engine import CPU_BATCHED_TOKENS, RolloutEngine
from flux_ray.rollout.functions import Turns
from flux_ray.rollout.generate import Limits, PromptGenerate
from flux_ray.rollout.sampling import Sampling
from flux_ray.rollout.worker import RolloutWorker
from flux_ray.weights import sender
from flux_ray.weights.publish import Publisher
from tests.fakes.actors import LocalActor, LocalGroup
from tests.rollout.conftest import TEMPERATURE
from tests.tiny import EOS_ID, tiny_tokenizer

pytestmark = [pytest.mark.system, pytest.mark.asyncio(loop_scope="session")]

MAX_GAP = 2e-5  # of log-probs between engine and transformers, in fp32
OWNER = "rollout 0 #1"


def prompt_of(tokens, *, num_samples=4, seed=7):
    return Prompt(0, 0, "", np.array(tokens, np.int32), {}, num_samples, seed)


class Rolls:
    """What a rollout worker does with an engine."""

    def __init__(self, served):
        self.config, self.actor = served.config, LocalActor("engine", 0, lambda index: served.engine)
        self.members = Members(1, {"engine": (self.actor,)})
        self.sampling = Sampling(served.config, tokenizer=tiny_tokenizer(), tokenizer_path=str(served.path))

    async def roll_and_step(self, prompt):
        assignment = Assignment(prompt, 0, 0, prompt.num_samples)
        trajectories, step = await self.sampling.sample(assignment, self.members, OWNER)
        return RolloutGroup(prompt, tuple(trajectories)), step

    async def roll(self, prompt):
        return (await self.roll_and_step(prompt))[0]

    async def probe(self, prompt):
        return (await self.sampling.probe([prompt], 0, self.members, OWNER))[0]

    async def generate_of(self, prompt):
        """What a rollout function of a user's is given."""
        limits = Limits(self.config.rollout.max_tokens, await self.actor.object.context_length(), 60.0)
        return PromptGenerate(prompt, self.actor, limits, TEMPERATURE, tiny_tokenizer(), OWNER)

    async def no_request_is_left(self):
        for _ in range(100):
            if not self.actor.object._engine.output_processor.has_unfinished_requests():
                return True
            await asyncio.sleep(0.02)
        return False


@pytest_asyncio.fixture(loop_scope="session")
async def rolls(served):
    rolls = Rolls(served)
    await rolls.sampling.start(rolls.members)
    return rolls


def largest_gap(model, trajectories, *, from_version=None):
    """Largest difference of sampler log-probs from a transformers model's, over sampled tokens (of a version on)."""
    gaps = []
    for trajectory in trajectories:
        ids = torch.tensor(trajectory.token_ids, dtype=torch.long)
        with torch.no_grad():
            logits_TV = model(ids[None]).logits[0].float() / TEMPERATURE
        logprobs_T = logits_TV.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0].numpy()
        wanted = trajectory.loss_mask[1:] & (trajectory.versions[1:] >= (from_version or 0))
        gaps.append(np.abs(logprobs_T - trajectory.sampler_logprobs[1:])[wanted])
    return float(np.concatenate(gaps).max())


class ModelWeights:
    """A transformers model as the trainer's end of the wire sees it."""

    def __init__(self, model):
        self.model = model

    def weight_metadata(self):
        return [(name, p.dtype, tuple(p.shape)) for name, p in self.model.named_parameters()]

    def iter_weights(self, bucket_bytes):
        yield from ((name, p.detach()) for name, p in self.model.named_parameters())


class Wire:
    """The real publisher, in a thread; its calls reach the engine on this loop."""

    def __init__(self, served, model, *, staged=False):
        self._engine, self._loop = served.engine, asyncio.get_running_loop()
        # A small bucket: the model takes several, and one parameter is larger than a bucket.
        self._publisher = Publisher(ModelWeights(model), rank=0, backend="gloo", bucket_bytes=8192, deadline_s=30.0,
                                    staged=staged)

    def _call(self, method, payloads):
        (payload,) = payloads
        calling = asyncio.run_coroutine_threadsafe(getattr(self._engine, method.__name__)(*payload), self._loop)
        return [calling.result(timeout=30)]

    async def connect(self):
        await asyncio.to_thread(self._publisher.connect, self._call, workers_per_engine=[1], address="127.0.0.1",
                                port=0, send_dtype="float32")

    @property
    def is_shared(self):
        return self._publisher._sender._channel.shared

    async def publish(self, version, step=None):
        """`step`: updates that these weights had; the version's number where none is given."""
        step = version if step is None else step
        assert await asyncio.to_thread(self._publisher.publish, version, step) == [Attested(str(version))]


@pytest.fixture
def model(served):
    return transformers.AutoModelForCausalLM.from_pretrained(served.path, dtype=torch.float32)


def perturb(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * p.std() * torch.randn(p.shape, generator=generator) if p.numel() > 1 else 0)


async def test_logprobs_repeats_and_ends(rolls, model):
    prompt = prompt_of([5, 6, 7, 8])
    group = await rolls.roll(prompt)
    again = await rolls.roll(prompt)
    others = [rolls.roll(prompt_of([9, 9, i + 3], seed=100 * i)) for i in range(8)]
    beside = (await asyncio.gather(rolls.roll(prompt), *others))[0]

    assert largest_gap(model, group.trajectories) < MAX_GAP
    for repeat in (again, beside):
        for a, b in zip(group.trajectories, repeat.trajectories, strict=True):
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
            np.testing.assert_array_equal(a.sampler_logprobs, b.sampler_logprobs)
    assert len({t.token_ids.tobytes() for t in group.trajectories}) > 1, "samples of a group have seeds of their own"


class Worthless:
    """A reward worker."""

    async def score(self, responses):
        self.responses, zeros = responses, np.zeros(len(responses.texts))
        return Scores(zeros, zeros, {})


async def test_a_group_drawn_in_parts_is_the_group_drawn_at_once(served, rolls):
    """Whatever engine draws a part: its samples have the group's seeds. The rollout worker joins them."""
    prompt = prompt_of([5, 6, 7, 8], num_samples=5, seed=70)
    whole = await rolls.roll(prompt)
    rewards = LocalGroup("reward", lambda index: Worthless(), 1)
    workers = LocalGroup("rollout", lambda index: RolloutWorker(
        served.config, index=index, tokenizer_path=str(served.path), most_groups=1), 1)
    worker = workers[0].object
    await worker.meet(Members(1, {**rolls.members.actors, "reward": tuple(rewards), "rollout": tuple(workers)}))
    parts = [Assignment(part, 0, 0, prompt.num_samples) for part in split(prompt, 3)]
    await worker.order(Orders(assignments=[parts[1], parts[2], parts[0]]))
    news = []
    async with asyncio.timeout(60):
        while not any(isinstance(one, GroupReady) for one in news):
            news += await worker.news()
    generated = {one.seed: one.num_tokens for one in news[:-1]}
    lengths = [t.num_loss_tokens for t in whole.trajectories]
    assert generated == {70: sum(lengths[:2]), 72: sum(lengths[2:4]), 74: lengths[4]}
    (owned,) = await worker.give([GroupAt(0, prompt.uid, 0)])
    joined = owned.group
    assert owned.scored.num_loss_tokens.tolist() == [t.num_loss_tokens for t in joined.trajectories]
    assert (joined.prompt.uid, joined.prompt.seed, joined.prompt.num_samples) == (prompt.uid, 70, 5)
    for a, b in zip(whole.trajectories, joined.trajectories, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.sampler_logprobs, b.sampler_logprobs)
    seen = rewards[0].object.responses
    tokenizer = tiny_tokenizer()
    no_text = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    kept = [[token for token in ids if token not in no_text] for ids in seen.response_ids]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=False)
    assert list(seen.texts) == texts and seen.num_loss_tokens.tolist() == lengths


async def test_a_request_that_is_cancelled_leaves_the_engine(rolls):
    rolling = asyncio.create_task(rolls.roll(prompt_of([5, 6], num_samples=64)))
    await asyncio.sleep(0.02)
    rolling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await rolling
    assert await rolls.no_request_is_left()


async def test_requests_of_those_that_are_no_member_any_more_leave_the_engine(served, rolls):
    """Their rollout worker has died, and another stands in its place: nobody waits for them."""
    living = LocalActor("rollout", 0, lambda index: None)
    asked = [SamplingRequest(np.array([5, 6], np.int32), 32, seed, TEMPERATURE, 48, owner=owner)
             for seed, owner in enumerate(["rollout 0 #dead", living.incarnation])]
    dead, going_on = [asyncio.create_task(served.engine.generate(request)) for request in asked]
    await asyncio.sleep(0.05)
    await served.engine.meet(Members(2, {"rollout": (living,)}))
    with pytest.raises(asyncio.CancelledError):
        await dead
    assert len((await going_on).completions) == 32
    assert await rolls.no_request_is_left()


async def test_a_probe_waits_for_a_place_and_not_for_those_that_wait_longer(rolls):
    """Four groups, of which the engine runs one at a time: the trainer is not to wait for all of them."""
    ended = []

    async def one(seed):
        await rolls.roll(prompt_of([5, 6, 7], num_samples=64, seed=1000 * seed))
        ended.append(seed)

    groups = [asyncio.create_task(one(seed)) for seed in range(4)]
    await asyncio.sleep(0.02)
    probed = await rolls.probe(prompt_of([5, 6, 7]))
    assert len(ended) <= 1 and len(probed.trajectories) == 4
    await asyncio.gather(*groups)


async def test_more_prompt_tokens_than_one_forward_takes(rolls, model):
    """Seeded requests whose prefill would be cut in two: on CPU that ends vLLM's engine, so none is cut."""
    prompts = [prompt_of([3 + (i + j) % 50 for j in range(400)], num_samples=1, seed=i) for i in range(40)]
    assert sum(len(p.token_ids) for p in prompts) > CPU_BATCHED_TOKENS
    groups = await asyncio.gather(*(rolls.roll(prompt) for prompt in prompts))
    assert largest_gap(model, [t for group in groups for t in group.trajectories]) < MAX_GAP


async def test_the_end_token_belongs_to_the_response_and_a_cut_one_has_none(served, rolls):
    groups = await asyncio.gather(*(rolls.roll(prompt_of([5, i + 3], seed=i * 1000)) for i in range(30)))
    trajectories = [t for group in groups for t in group.trajectories]
    ended = [t for t in trajectories if t.finish_reason == FINISH_STOP]
    cut = [t for t in trajectories if t.finish_reason == FINISH_LENGTH]
    assert ended and cut
    assert all(t.token_ids[-1] == EOS_ID and t.loss_mask[-1] for t in ended)
    assert all(EOS_ID not in t.token_ids[t.prompt_length:] for t in cut)
    assert all(t.num_loss_tokens == served.config.rollout.max_tokens for t in cut)


@pytest.mark.parametrize("staged", [False, True, None])
@pytest.mark.parametrize("shared", [False, True, "elsewhere"])
async def test_every_update_reaches_the_tied_head(served, rolls, model, staged, shared, monkeypatch):
    """Through memory of this machine, and through gloo alone, as between machines; staged where it costs nothing."""
    if shared != True:  # noqa: E712
        memory = {False: lambda num_bytes: None, "elsewhere": lambda num_bytes: ("not-here", torch.empty(num_bytes))}
        monkeypatch.setattr(sender, "create_memory", memory[shared])
    wire = Wire(served, model, staged=staged)
    await wire.connect()
    assert wire.is_shared == (shared is True), "an engine of another machine can't map it"
    assert served.engine._staged == (wire.is_shared if staged is None else staged)
    for version in (1, 2, 3):
        perturb(model, version)
        await wire.publish(version, step=version + 40)
        group, step = await rolls.roll_and_step(prompt_of([5, 6, 7], seed=version))
        assert largest_gap(model, group.trajectories) < MAX_GAP
        assert step == version + 40, "the updates that it had, whatever its number"
        assert all((t.versions[t.loss_mask] == version).all() for t in group.trajectories)


@pytest.mark.parametrize("staged", [False, True])
async def test_a_running_request_goes_on_under_the_new_weights(served, rolls, model, staged):
    wire = Wire(served, model, staged=staged)
    await wire.connect()
    await wire.publish(10, step=3)
    rolling = [asyncio.create_task(rolls.roll_and_step(prompt_of([5, 6, i + 3], seed=50 * i))) for i in range(40)]
    await asyncio.sleep(0.05)  # into the generation; how far does not matter, the versions tell
    perturb(model, 11)
    await wire.publish(11, step=4)
    rolled = await asyncio.gather(*rolling)
    assert all(step == max(t.newest_version for t in group.trajectories) - 7 for group, step in rolled), "the newest's"
    trajectories = [t for group, _ in rolled for t in group.trajectories]
    spanning = [t for t in trajectories if t.newest_version == 11]
    assert spanning, "the update came after every request had ended"
    assert any(t.oldest_version == 10 for t in spanning), "no request was running when the update came"
    assert all((np.diff(t.versions[t.loss_mask]) >= 0).all() for t in trajectories)
    # Recomputed KV: what follows the update is sampled as if the new weights had seen the whole sequence.
    assert largest_gap(model, spanning, from_version=11) < MAX_GAP


async def test_a_second_turn_after_a_tool(served, rolls, model):
    """Two turns: the policy speaks, a tool answers, the policy goes on, for so long as it is let. Only the policy's
    tokens are trained on."""
    tool_ids = [20, 21, 22]

    async def with_tool(prompt, generate):
        async def one(sample):
            turns = Turns(prompt.token_ids)
            for longest in (None, 3):
                (completion,) = await generate(turns.token_ids, sample=sample, max_tokens=longest)
                turns.sampled(completion)
                turns.observed(tool_ids)
            return turns.finish()

        return list(await asyncio.gather(*(one(i) for i in range(prompt.num_samples))))

    wire = Wire(served, model)
    await wire.connect()
    await wire.publish(20, step=19)
    prompt = prompt_of([5, 6], seed=3)
    generate = await rolls.generate_of(prompt)
    trajectories = await with_tool(prompt, generate)
    assert generate.step == 19
    again = await with_tool(prompt, await rolls.generate_of(prompt))
    for t, repeat in zip(trajectories, again, strict=True):
        np.testing.assert_array_equal(t.token_ids, repeat.token_ids)
        response = t.token_ids[t.prompt_length:]
        unmasked = response[~t.loss_mask[t.prompt_length:]]
        assert unmasked.tolist() == tool_ids * 2
        second_turn = t.loss_mask[np.flatnonzero(~t.loss_mask)[-4] + 1:]   # after the first answer of the tool
        assert second_turn.sum() <= 3
        assert (t.sampler_logprobs[~t.loss_mask] == 0).all() and (t.versions[~t.loss_mask] == -1).all()
    assert largest_gap(model, trajectories) < MAX_GAP


async def test_an_engine_that_nobody_sends_to_gives_up_by_its_deadline(served, rolls, model):
    """A sender that dies before the send: the wait ends by itself, and a new connection works again."""
    publisher = Publisher(ModelWeights(model), rank=0, backend="gloo", bucket_bytes=8192, deadline_s=2.0)

    def nobody_answers(method, payloads):
        if method is ServesWeights.init_weight_transfer_engine:
            threading.Event().wait(0.1)
        return [None]

    with pytest.raises(RuntimeError):
        await asyncio.wait_for(asyncio.to_thread(publisher.connect, nobody_answers, workers_per_engine=[1],
                                                 address="127.0.0.1", port=0, send_dtype="float32"), timeout=30)
    wire = Wire(served, model)
    await wire.connect()
    await wire.publish(30)
    group = await rolls.roll(prompt_of([5, 6, 7]))
    assert largest_gap(model, group.trajectories) < MAX_GAP


@pytest.mark.all  # an engine of its own, which dies; tests/system shows how a run sees it
async def test_a_call_that_vllm_holds_when_it_dies_fails_soon(served):
    """vLLM itself leaves it waiting for ever: no request runs whose failure would tell."""
    before = set(psutil.Process().children(recursive=True))
    engine = RolloutEngine(served.config, index=1, device="cpu", dtype="float32", weights_backend="gloo")
    await engine.start()
    try:
        (core,) = [p for p in psutil.Process().children(recursive=True)
                   if p not in before and "EngineCore" in " ".join(p.cmdline())]
        core.suspend()
        asked = asyncio.create_task(engine.start_weight_update())
        await asyncio.wait({asked}, timeout=0.5)
        assert not asked.done()
        core.kill()
        with pytest.raises(RuntimeError, match="the process in which vLLM computes died"):
            await asyncio.wait_for(asked, timeout=20)
    finally:
        await engine.close()


async def test_a_rollout_that_gives_up_by_itself_is_not_told_as_late(rolls, monkeypatch):
    async def gives_up(prompt, generate):
        raise TimeoutError("the tool did not answer")

    monkeypatch.setattr(rolls.sampling, "_function", gives_up)
    with pytest.raises(TimeoutError, match=r"^the tool did not answer$"):
        await rolls.roll(prompt_of([5, 6, 7]))
