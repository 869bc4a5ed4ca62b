"""What is measured of routers: against transformers' own balance loss, and by hand."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from flux_ray.batch import make_micro_batch
from flux_ray.config import from_dict
from flux_ray.errors import UserError
from flux_ray.model import check_routers, load_policy, skeleton
from flux_ray.model.routing import Routing, balance_loss, load_metrics, routers_of
from tests.families import EXPERTS_FAMILIES, make_family
from tests.model.test_policy import ragged_samples

pytestmark = pytest.mark.unit
E, K = 4, 2


def test_the_balance_loss_is_that_of_transformers_for_one_layer() -> None:
    """Theirs counts each of K choices as a whole token: it is K times ours. So are its gradients."""
    logits_SE = torch.randn(50, E, generator=torch.Generator().manual_seed(0)).requires_grad_()
    experts_SK = logits_SE.softmax(-1).topk(K, dim=-1).indices
    ours, theirs = balance_loss(logits_SE, experts_SK), load_balancing_loss_func((logits_SE,), E, K)
    torch.testing.assert_close(ours * K, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours * K, logits_SE), torch.autograd.grad(theirs, logits_SE))


def test_the_balance_loss_is_1_where_all_get_equally_much_and_e_where_one_gets_all() -> None:
    even = torch.zeros(E, E)
    torch.testing.assert_close(balance_loss(even, torch.arange(E)[:, None]), torch.tensor(1.0))
    one = torch.tensor([[100.0, 0, 0, 0]] * 3)
    torch.testing.assert_close(balance_loss(one, torch.zeros(3, 1, dtype=torch.long)), torch.tensor(float(E)))


def test_the_load_is_told_by_layer() -> None:
    assert load_metrics(torch.tensor([[2, 2, 2, 2], [6, 2, 0, 0]])) == {
        "router/load_max/0": 1.0, "router/load_max/1": 3.0, "router/load_max": 3.0, "router/unused": 0.25}


@pytest.mark.parametrize("name", EXPERTS_FAMILIES)
def test_every_token_is_counted_and_no_padding(tmp_path, name: str) -> None:
    policy = load_policy(make_family(name, tmp_path), dtype=torch.float32, chunk_tokens=64)
    policy.routing = Routing(policy.hf)
    samples = ragged_samples()
    counted = {}
    for layout in ("padded", "block_diagonal"):
        policy.layout = layout
        policy(make_micro_batch(samples, sample_ids=range(len(samples))), temperature=1.0, with_entropy=False)
        counted[layout] = policy.routing.counts_LE
    num_tokens, layers = sum(sample.num_tokens for sample in samples), len(routers_of(policy.hf))
    assert counted["padded"].sum(1).tolist() == [num_tokens * K] * layers
    if name != "gpt-oss":  # its own attention sees no borders in one row
        assert torch.equal(counted["padded"], counted["block_diagonal"])
    policy.routing.balance.backward()
    assert all(router.weight.grad is not None for router in routers_of(policy.hf))


@pytest.mark.parametrize(("options", "words"), [
    ({"algo.name": "dpo"}, "a loss of pairs has no weights of tokens"),
    ({"train.freeze_routers": True}, "nothing would learn from that loss"),
    ({"train.gradient_checkpointing": True}, "made again in backward"),
    ({"train.lora.rank": 4}, "an adapter leaves routers as they are"),
])
def test_a_loss_that_would_not_reach_the_routers_is_refused(tmp_path, options: dict, words: str) -> None:
    folder = make_family("Mixtral", tmp_path)
    with pytest.raises(UserError, match=rf"^train\.router_balance_coef=0\.1 .*{words}"):
        check_routers(lambda: skeleton(folder), from_dict({"train.router_balance_coef": 0.1} | options))


def test_options_of_routers_are_refused_for_a_model_without_any(tmp_path) -> None:
    folder = make_family("Llama", tmp_path)
    with pytest.raises(UserError, match=r"^train\.freeze_routers=true: the model \(llama\) has no routers"):
        check_routers(lambda: skeleton(folder), from_dict({"train.freeze_routers": True}))
