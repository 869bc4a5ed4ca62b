"""A registered function is tried before anything starts: its mistakes have one line with its name."""

import pytest
import torch

from flux_ray import algo
from flux_ray.algo.estimators import ESTIMATORS
from flux_ray.algo.losses import POLICY_LOSSES
from flux_ray.algo.trial import try_registered
from flux_ray.config import from_dict
from flux_ray.errors import UserError

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _registries():
    before = dict(ESTIMATORS), dict(POLICY_LOSSES)
    yield
    for registry, kept in zip((ESTIMATORS, POLICY_LOSSES), before, strict=True):
        registry.clear()
        registry.update(kept)


@pytest.mark.parametrize("group_size", [1, 4])
def test_what_works_is_let_through(group_size):
    @algo.register_adv_estimator("plain")
    def plain(token_level_rewards, response_mask, *, index, **kw):
        return token_level_rewards * response_mask, token_level_rewards

    @algo.register_policy_loss("plain")
    def loss(old_log_prob, log_prob, advantages, response_mask, *, factor=1.0, **kw):
        return factor * (old_log_prob - log_prob) * advantages, {}

    try_registered(from_dict({"algo.name": "plain", "rollout.group_size": group_size, "algo.options": {"factor": 2.0}}))
    try_registered(from_dict({"algo.name": "sft"}))
    try_registered(from_dict({}))


@pytest.mark.parametrize(("loss", "message"), [
    (lambda old_log_prob, log_prob, advantages, response_mask, **kw: (log_prob[:, :1], {}), "has shape (8, 1), wanted"),
    (lambda old_log_prob, log_prob, advantages, response_mask, **kw: (log_prob * torch.nan, {}), "the loss is nan"),
    (lambda old_log_prob, log_prob, advantages, response_mask, **kw: log_prob, "gave Tensor, wanted (loss, metrics)"),
    (lambda old_log_prob, log_prob, advantages, response_mask, **kw: (log_prob.nothing, {}),
     "failed on a made batch of 8 x 4: AttributeError: 'Tensor' object has no attribute 'nothing'"),
    (lambda one, two: one, "failed on a made batch of 8 x 4: TypeError: "),
    (lambda old_log_prob, log_prob, advantages, response_mask, **kw: (old_log_prob, {}), "does not require grad"),
])
def test_a_loss_that_does_not(loss, message):
    algo.register_policy_loss("odd")(loss)
    with pytest.raises(UserError) as caught:
        try_registered(from_dict({"algo.policy_loss": "odd", "algo.beta": 0.0, "algo.entropy_coef": 0.0}))
    assert str(caught.value).startswith("policy loss 'odd'") and message in str(caught.value)


def test_an_estimator_that_does_not():
    algo.register_adv_estimator("odd")(lambda token_level_rewards, response_mask, **kw: (token_level_rewards.sum(), 1))
    with pytest.raises(UserError, match=r"advantage estimator 'odd' gave tuple, wanted \(advantages, returns\)"):
        try_registered(from_dict({"algo.estimator": "odd"}))


@pytest.mark.parametrize(("values", "there"), [
    ({}, (False, True)), ({"algo.beta": 0.0, "algo.entropy_coef": 0.0}, (False, False)),
    ({"algo.beta": 0.0, "algo.kl_coef": 0.1}, (True, True)), ({"algo.epochs": 2}, (True, True)),
])
def test_an_estimator_is_shown_the_log_probs_that_the_run_has(values, there):
    seen = []

    @algo.register_adv_estimator("looks")
    def looks(token_level_rewards, response_mask, *, old_log_prob, reference_log_prob, **kw):
        seen.append((old_log_prob is not None, reference_log_prob is not None))
        return token_level_rewards * response_mask, token_level_rewards

    try_registered(from_dict({"algo.estimator": "looks", **values}))
    assert seen == [there]
