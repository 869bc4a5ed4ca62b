"""Routing that is replayed: against a forward of transformers whose routing is fixed by hand, gradients too."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from flux_ray.batch import make_micro_batch
from flux_ray.config import Config, from_dict
from flux_ray.errors import UserError
from flux_ray.model import check_routers, load_policy, skeleton
from flux_ray.model.policy import PolicyModel
from flux_ray.model.router_replay import takes_given_experts
from flux_ray.model.routing import Routing, routers_of
from flux_ray.records import Sample
from tests.families import EXPERTS_FAMILIES, make_family
from tests.model.test_policy import TEMPERATURE, gradients, ragged_samples

pytestmark = pytest.mark.unit
LAYERS, E, K = 2, 4, 2
SERVED = [name for name in EXPERTS_FAMILIES if name not in ("DeepSeek-V3", "gpt-oss")]
SIGMOID = ("glm4_moe",)  # scores of each expert by itself; a bias has a say in the choice, and none in the weights


def samples_with_experts(seed: int = 0) -> list[Sample]:
    """Experts at random for all tokens but each sequence's last; none for the second sequence."""
    rng = np.random.default_rng(seed)
    samples = []
    for i, one in enumerate(ragged_samples()):
        experts = rng.permuted(np.tile(np.arange(E, dtype=np.uint8), (one.num_tokens - 1, LAYERS, 1)), axis=-1)[..., :K]
        samples.append(Sample(one.token_ids, one.loss_mask, one.loss_weights, experts=None if i == 1 else experts))
    return samples


def by_hand(router: nn.Module, config: object, given: Callable[[], Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A router's forward that takes the experts `given` (R, K), where they aren't -1, weighed as its family does."""
    kind, norm = config.model_type, getattr(config, "norm_topk_prob", True)

    def forward(hidden: Tensor) -> tuple[Tensor, ...]:
        logits_RE = hidden.reshape(-1, hidden.shape[-1]) @ router.weight.T
        scores_RE = logits_RE.sigmoid() if kind in SIGMOID else logits_RE.softmax(-1)
        own_RK = (scores_RE + getattr(router, "e_score_correction_bias", 0)).topk(K).indices
        experts_RK = torch.where(given() >= 0, given(), own_RK)
        rows = [scores[experts] for scores, experts in zip(scores_RE, experts_RK, strict=True)]
        weights = [row / row.sum() if norm else row for row in rows]
        return logits_RE, torch.stack(weights) * getattr(config, "routed_scaling_factor", 1.0), experts_RK

    return forward


def fixed_by_hand(folder, samples: list[Sample]) -> tuple[Tensor, Tensor, nn.Module]:
    """(log-probs, entropies) of the loss tokens, one sequence at a time, by transformers; and its model."""
    hf = AutoModelForCausalLM.from_pretrained(folder)
    now: dict[str, Tensor] = {}
    for router in routers_of(hf):
        name = next(name for name, module in hf.named_modules() if module is router)
        layer = int(name.split(".")[2])
        router.forward = by_hand(router, hf.config, lambda layer=layer: now["experts"][:, layer])
    logprobs, entropies = [], []
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids).long()
        now["experts"] = torch.full((len(ids), LAYERS, K), -1)
        if sample.experts is not None:
            now["experts"][: len(sample.experts)] = torch.from_numpy(sample.experts).long()
        log_p = torch.log_softmax(hf(input_ids=ids[None]).logits[0].float() / TEMPERATURE, dim=-1)
        mask = torch.from_numpy(sample.loss_mask)[1:]
        logprobs.append(log_p[:-1].gather(1, ids[1:, None])[:, 0][mask])
        entropies.append(-(log_p.exp() * log_p).sum(-1)[:-1][mask])
    return torch.cat(logprobs), torch.cat(entropies), hf


def replaying(folder, *, replays: bool = True, **options: object) -> PolicyModel:
    policy = load_policy(folder, dtype=torch.float32, chunk_tokens=64, **options)
    policy.routing = Routing(policy.hf, replays=replays)
    return policy


def run(policy: PolicyModel, samples: list[Sample]) -> tuple[Tensor, Tensor]:
    micro_batch = make_micro_batch(samples, sample_ids=range(len(samples)))
    logprobs_S, entropy_S = policy(micro_batch, temperature=TEMPERATURE, with_entropy=True)
    return logprobs_S[micro_batch.loss_mask_S], entropy_S[micro_batch.loss_mask_S]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", ["padded", "block_diagonal"])
@pytest.mark.parametrize("name", SERVED)
def test_replayed_gradients_are_those_of_routing_fixed_by_hand(
    tmp_path, name: str, layout: str, checkpointing: bool,
) -> None:
    folder, samples = make_family(name, tmp_path), samples_with_experts()
    *wanted_values, hf = fixed_by_hand(folder, samples)
    wanted = gradients(hf, *wanted_values)
    policy = replaying(folder, layout=layout, gradient_checkpointing=checkpointing).train()
    values = run(policy, samples)
    torch.testing.assert_close(values, tuple(wanted_values), rtol=1e-4, atol=1e-5)
    got = gradients(policy.hf, *values)
    assert got.keys() == wanted.keys() and any(".gate.weight" in key for key in got)
    for key in wanted:
        gap = (got[key] - wanted[key]).norm()
        assert gap <= 1e-4 * wanted[key].norm() + 1e-6, key
    own = run(replaying(folder, layout=layout, replays=False), samples)
    assert (own[0] - values[0]).abs().max() > 0.01, "the given experts are the model's own: nothing was replayed"


@pytest.mark.parametrize("name", SERVED)
def test_what_it_would_have_chosen_itself_is_compared(tmp_path, name: str) -> None:
    """Given its own choice it agrees everywhere; with one expert changed in one layer of a token, not there."""
    policy, samples = replaying(make_family(name, tmp_path), replays=False), ragged_samples()
    chosen: dict[int, Tensor] = {}
    for router in routers_of(policy.hf):
        router.register_forward_hook(lambda router, given, output: chosen.update({id(router): output[2]}))
    policy.layout = "block_diagonal"
    plain = run(policy, samples)
    assert policy.routing.agreed_S is None and policy.routing.agreement(torch.ones(36, dtype=torch.bool)) == {}
    layers = [router._layer for router in policy.routing._replayed]
    experts_SLK = torch.zeros(sum(one.num_tokens for one in samples), LAYERS, K, dtype=torch.long)
    for layer, of_layer in zip(layers, chosen.values(), strict=True):
        experts_SLK[:, layer] = of_layer.flip(-1)  # a set has no order
    parts = experts_SLK.split([one.num_tokens for one in samples])
    theirs = [Sample(one.token_ids, one.loss_mask, one.loss_weights, experts=part[:-1].numpy().astype(np.uint8))
              for one, part in zip(samples, parts, strict=True)]
    last, used = theirs[0].num_tokens - 1, set(theirs[0].experts[5, layers[-1]].tolist())
    theirs[0].experts[5, layers[-1], 0] = min(set(range(E)) - used)
    for replays in (False, True):
        again = replaying(tmp_path, replays=replays)
        values = run(again, theirs)
        agreed_S = again.routing.agreed_S
        assert agreed_S[:5].tolist() == [1.0] * 5 and agreed_S[5] == 1 - 1 / len(layers) and agreed_S[last].isnan()
        if not replays:
            torch.testing.assert_close(values, plain)
            sampled_S = torch.zeros(len(agreed_S), dtype=torch.bool)
            sampled_S[[5, 6]] = True  # given by the passes of tokens 4 and 5
            found = again.routing.agreement(sampled_S)["rollout/router_agreement"]
            assert (found.value, found.weight) == (1 - 0.5 / len(layers), 2)


@pytest.mark.parametrize("name", EXPERTS_FAMILIES)
def test_routers_of_every_family_take_what_they_are_given(tmp_path, name: str) -> None:
    routers = routers_of(skeleton(make_family(name, tmp_path)))
    assert routers and all(takes_given_experts(router) for router in routers)


class Lottery(nn.Module):
    """A router that draws its experts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(E, 8, device="meta"))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.reshape(-1, hidden.shape[-1]) @ self.weight.T
        return logits, logits[:, :K], torch.multinomial(logits.softmax(-1), K)


def test_a_router_that_chooses_otherwise_is_told_apart() -> None:
    assert not takes_given_experts(Lottery())


def replay(**options: object) -> Config:
    return from_dict({"algo.router_replay": True} | options)


@pytest.mark.parametrize(("options", "told"), [
    ({"algo.router_replay": True}, "algo.router_replay=true"),
    ({"rollout.return_experts": True}, "rollout.return_experts=true"),
])
def test_a_dense_model_has_nothing_to_replay(tmp_path, options: dict, told: str) -> None:
    folder = make_family("Llama", tmp_path)
    with pytest.raises(UserError, match=rf"^{told}: the model \(llama\) has no routers: leave the option out$"):
        check_routers(lambda: skeleton(folder), from_dict(options))


def test_a_mixture_has(tmp_path) -> None:
    folder = make_family("Qwen 3 MoE", tmp_path)
    check_routers(lambda: skeleton(folder), replay())
