"""Advantage estimators, and their registry, which takes users' own.

Takes:  token-level rewards and response mask, padded (N, L); `index` (group id of each row) and further keywords.
Gives:  (advantages, returns), both (N, L); `register_adv_estimator`, `get_adv_estimator`, `list_adv_estimators`.
Knows:  a score is the sum of a row's token rewards (a KL in the reward is in it already); group statistics in float64.
Never:  talks to another rank except by the `reduce` that it is given, which sums one small tensor over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from flux_ray.algo.rows import blocks, by_rows
from flux_ray.config import AlgoConfig, PPOAlgoConfig
from flux_ray.errors import UserError, unknown
from flux_ray.formula import Formula
from flux_ray.plugins import same_function

EPS_STD = 1e-6  # in the reward's unit, added to the standard deviation that divides: far below a reward's resolution

Reduce = Callable[[torch.Tensor], torch.Tensor]
AdvantagesAndReturns = tuple[torch.Tensor, torch.Tensor]

_DEFAULTS, _PPO_DEFAULTS = AlgoConfig(), PPOAlgoConfig()


def on_one_rank(statistics: torch.Tensor) -> torch.Tensor:
    """The sum over one rank."""
    return statistics


def grpo(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, *, index: Sequence[Hashable] | torch.Tensor,
    config: AlgoConfig = _DEFAULTS, **_: object,
) -> AdvantagesAndReturns:
    """A = (R − mean) / (std + ε_std) over the rows of one index, std with ddof 1 (2402.03300, eq. 3 and section 4.1.2).

    Without `config.normalize_by_std` there is no division. Equal rewards, and a group of one, give exactly 0.
    """
    scores_N = _scores(token_level_rewards)
    advantages_N = torch.zeros_like(scores_N)
    for rows in _rows_of_groups(index):
        advantages_N[rows] = _relative(scores_N[rows], divide=config.normalize_by_std)
    return _spread(advantages_N, token_level_rewards, response_mask)


def grpo_vectorized(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, group_size: int = 4, *,
    index: torch.Tensor | None = None, config: AlgoConfig = _DEFAULTS, **_: object,
) -> AdvantagesAndReturns:
    """The same numbers as `grpo`, for all groups at once, where groups are `group_size` consecutive rows.

    Without an index the rows are taken to be so; where the index says otherwise, `grpo` is used.
    """
    num_rows = len(token_level_rewards)
    if index is None and num_rows % group_size:
        raise UserError(f"grpo_vectorized: {num_rows} rows are no whole number of groups of {group_size}")
    if index is not None and not _consecutive(index, num_rows, group_size):
        return grpo(token_level_rewards, response_mask, index=index, config=config)
    scores = _scores(token_level_rewards).view(-1, group_size)
    advantages = _relative(scores, divide=config.normalize_by_std)
    return _spread(advantages.view(-1), token_level_rewards, response_mask)


def dr_grpo(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, *, index: Sequence[Hashable] | torch.Tensor,
    **_: object,
) -> AdvantagesAndReturns:
    """A = R − mean over the group, never divided (2503.20783, section 3.2)."""
    scores_N = _scores(token_level_rewards)
    return _spread(_less_group_mean(scores_N, index), token_level_rewards, response_mask)


def rloo(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, *, index: Sequence[Hashable] | torch.Tensor,
    **_: object,
) -> AdvantagesAndReturns:
    """A = R − mean of the other rows of the group (2402.14740, eq. 7), which is (R − mean)·G/(G−1).

    A group of one: 0.
    """
    scores_N = _scores(token_level_rewards)
    advantages_N = torch.zeros_like(scores_N)
    for rows in _rows_of_groups(index):
        size = len(rows)
        advantages_N[rows] = _relative(scores_N[rows], divide=False) * (size / max(size - 1, 1))
    return _spread(advantages_N, token_level_rewards, response_mask)


def reinforce(token_level_rewards: torch.Tensor, response_mask: torch.Tensor, **_: object) -> AdvantagesAndReturns:
    """A_t = Σ_{i≥t} r_i: the return to go, undiscounted; no baseline, no whitening."""
    returns_NL = _returns_to_go(token_level_rewards, response_mask)
    return returns_NL, returns_NL


def reinforce_pp(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, *, reduce: Reduce = on_one_rank, **_: object,
) -> AdvantagesAndReturns:
    """A_t = R − kl_coef·Σ_{i≥t} k1, whitened over all loss tokens of the batch (2501.03262)."""
    returns_NL = _returns_to_go(token_level_rewards, response_mask)
    return _whiten(returns_NL, response_mask, reduce), returns_NL


def reinforce_pp_baseline(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, *, index: Sequence[Hashable] | torch.Tensor,
    reduce: Reduce = on_one_rank, **_: object,
) -> AdvantagesAndReturns:
    """R − group mean, whitened over all loss tokens of the batch (2501.03262). A group of one: 0 before whitening."""
    scores_N = _scores(token_level_rewards)
    centred_NL, _same = _spread(_less_group_mean(scores_N, index), token_level_rewards, response_mask)
    return _whiten(centred_NL, response_mask, reduce), centred_NL


def gae(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, *, values: torch.Tensor | None,
    config: PPOAlgoConfig = _PPO_DEFAULTS, reduce: Reduce = on_one_rank, **_: object,
) -> AdvantagesAndReturns:
    """A_t = Σ_k (γλ)^k δ_{t+k}, δ_t = r_t + γ·V_{t+1} − V_t, over loss tokens alone (1506.02438, eq. 16); R = A + V.

    Tokens that the policy didn't sample are stepped over: V_{t+1} is the next loss token's, and 0 after the last one.
    With `config.whiten_advantages` A is whitened over the batch's loss tokens (ddof 0), R is not.
    """
    assert values is not None, "gae needs a critic's values"
    kind, decay = token_level_rewards.dtype, config.gamma * config.gae_lambda

    def of_rows(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> AdvantagesAndReturns:
        values = values.double()
        deltas = (rewards.double() + config.gamma * _next_loss_token(values, mask) - values) * mask
        advantages = _discounted_to_go(deltas, torch.ones_like(values).masked_fill(mask, decay)) * mask
        return advantages.to(kind), ((advantages + values) * mask).to(kind)

    advantages_NL, returns_NL = by_rows(of_rows, token_level_rewards, values, response_mask.bool())
    return _whiten(advantages_NL, response_mask, reduce) if config.whiten_advantages else advantages_NL, returns_NL


def _next_loss_token(values_NL: torch.Tensor, mask_NL: torch.Tensor) -> torch.Tensor:
    """At each place the value at the next loss token after it; 0 where there is none."""
    length = values_NL.shape[-1]
    places_NL = torch.arange(length, device=values_NL.device).expand_as(values_NL).masked_fill(~mask_NL, length)
    here_or_later_NL = places_NL.flip(-1).cummin(-1).values.flip(-1)
    later_NL = torch.nn.functional.pad(here_or_later_NL[:, 1:], (0, 1), value=length)
    return torch.nn.functional.pad(values_NL, (0, 1)).gather(-1, later_NL)


def _discounted_to_go(values_NL: torch.Tensor, discounts_NL: torch.Tensor) -> torch.Tensor:
    """x_t = v_t + d_t·x_{t+1}, by doubling: after k rounds x_t has the terms of 2^k places."""
    sums, factors, reach = values_NL, discounts_NL, 1
    while reach < values_NL.shape[-1]:
        further = torch.nn.functional.pad(sums[:, reach:], (0, reach))
        sums = torch.addcmul(sums, factors, further)
        factors = factors * torch.nn.functional.pad(factors[:, reach:], (0, reach))
        reach *= 2
    return sums


def _scores(token_level_rewards: torch.Tensor) -> torch.Tensor:
    return token_level_rewards.sum(-1).double()


def _spread(advantages_N: torch.Tensor, like: torch.Tensor, response_mask: torch.Tensor) -> AdvantagesAndReturns:
    """A row's advantage at each of its loss tokens; the returns are the same numbers."""
    advantages_N1 = advantages_N.to(like.dtype)[:, None]
    advantages_NL = torch.where(response_mask.bool(), advantages_N1, torch.zeros_like(advantages_N1))
    return advantages_NL, advantages_NL


def _rows_of_groups(index: Sequence[Hashable] | torch.Tensor) -> list[list[int]]:
    rows: dict[Hashable, list[int]] = {}
    for row, group in enumerate(index.tolist() if isinstance(index, torch.Tensor) else index):
        rows.setdefault(group, []).append(row)
    return list(rows.values())


def _relative(scores: torch.Tensor, *, divide: bool) -> torch.Tensor:
    """Scores less their mean over the last axis (over std + ε_std). Exactly 0 where all are equal, without rounding."""
    size = scores.shape[-1]
    if size < 2:
        return torch.zeros_like(scores)
    centred = scores - scores.mean(-1, keepdim=True)
    if divide:
        centred = centred / (scores.std(-1, correction=1, keepdim=True) + EPS_STD)
    equal = scores.amax(-1, keepdim=True) == scores.amin(-1, keepdim=True)
    return centred.masked_fill(equal, 0.0)


def _less_group_mean(scores_N: torch.Tensor, index: Sequence[Hashable] | torch.Tensor) -> torch.Tensor:
    centred_N = torch.zeros_like(scores_N)
    for rows in _rows_of_groups(index):
        centred_N[rows] = _relative(scores_N[rows], divide=False)
    return centred_N


def _consecutive(index: torch.Tensor, num_rows: int, group_size: int) -> bool:
    if num_rows % group_size:
        return False
    groups = torch.as_tensor(index).view(-1, group_size)
    return bool((groups == groups[:, :1]).all()) and len(groups[:, 0].unique()) == len(groups)


def _returns_to_go(token_level_rewards: torch.Tensor, mask_NL: torch.Tensor) -> torch.Tensor:
    """Σ_{i≥t} r_i at each loss token, 0 elsewhere."""
    (returns_NL,) = by_rows(lambda rewards, mask: (rewards.flip(-1).cumsum(-1).flip(-1) * mask,),
                            token_level_rewards, mask_NL)
    return returns_NL


def _whiten(values_NL: torch.Tensor, mask_NL: torch.Tensor, reduce: Reduce) -> torch.Tensor:
    """(v − mean) / (std + ε_std) over the loss tokens of all ranks, ddof 0: one reduction of (Σv, Σv², count).

    Values outside the mask must be 0.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=values_NL.device)
    for values, mask in blocks(values_NL, mask_NL):
        wide = values.double()
        sums += torch.stack([wide.sum(), wide.square().sum(), mask.sum().double()])
    total, squares, count = reduce(sums).unbind()
    mean = total / count.clamp(min=1)
    std = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()

    def block(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor]:
        return (((values.double() - mean) / (std + EPS_STD) * mask).to(values.dtype),)

    (whitened_NL,) = by_rows(block, values_NL, mask_NL)
    return whitened_NL


#: Options of algo that an estimator reads only where it says so.
GAE_KNOBS = ("gamma", "gae_lambda", "whiten_advantages")


@dataclass(frozen=True)
class Estimator:
    function: Callable[..., AdvantagesAndReturns]
    formula: Formula          # of A; empty where none was given
    needs_groups: bool        # compares the rows of a group: a group of one teaches nothing
    needs_whole_batch: bool   # its numbers depend on every row of the step
    needs_values: bool = False  # a critic's
    reads: tuple[str, ...] = ()  # which of GAE_KNOBS and normalize_by_std
    ours: bool = True


WHITENED = "…, whitened: less the mean, then divided by (std + 1e-6), both over the batch's loss tokens, ddof 0"
OVER_STD = {"normalize_by_std": "(…) / (std + 1e-6), std over the group with ddof 1"}
TO_GO = "Σ_{i≥t} r_i, the return to go"

#: name ► estimator; `register_adv_estimator` adds to it
ESTIMATORS: dict[str, Estimator] = {
    "grpo": Estimator(
        grpo, Formula("R − mean over the group", "2402.03300, section 4.1.2", given=OVER_STD),
        needs_groups=True, needs_whole_batch=False, reads=("normalize_by_std",)),
    "grpo_vectorized": Estimator(
        grpo_vectorized, Formula("R − mean over the group", "2402.03300, section 4.1.2", given=OVER_STD),
        needs_groups=True, needs_whole_batch=False, reads=("normalize_by_std",)),
    # It never normalizes by std; normalize_by_std=true brings a warning.
    "dr_grpo": Estimator(
        dr_grpo, Formula("R − mean over the group", "2503.20783, section 3.2"),
        needs_groups=True, needs_whole_batch=False, reads=("normalize_by_std",)),
    "rloo": Estimator(
        rloo, Formula("R − mean of the group's other samples", "2402.14740, eq. 7"),
        needs_groups=True, needs_whole_batch=False),
    "reinforce": Estimator(
        reinforce, Formula(f"{TO_GO}, no baseline", "Williams 1992"),
        needs_groups=False, needs_whole_batch=False),
    "reinforce_pp": Estimator(
        reinforce_pp, Formula(WHITENED.replace("…", TO_GO), "2501.03262"),
        needs_groups=False, needs_whole_batch=True),
    "reinforce_pp_baseline": Estimator(
        reinforce_pp_baseline, Formula(WHITENED.replace("…", "R − mean over the group"), "2501.03262"),
        needs_groups=True, needs_whole_batch=True),
    "gae": Estimator(
        gae, Formula("Σ_{k≥0} ({gamma}·{gae_lambda})^k·δ_{t+k}", "1506.02438, eq. 16",
                     "δ_t = r_t + {gamma}·V_{t+1} − V_t, t counts loss tokens, V after the last is 0",
                     given={"whiten_advantages": WHITENED}),
        needs_groups=False, needs_whole_batch=True, needs_values=True, reads=GAE_KNOBS),
}


def register_adv_estimator(
    name: str, *, formula: str = "", needs_groups: bool = False, needs_whole_batch: bool = True,
    needs_values: bool = False,
) -> Callable[[Callable[..., AdvantagesAndReturns]], Callable[..., AdvantagesAndReturns]]:
    """Register `f(token_level_rewards, response_mask, **kw) -> (advantages, returns)`; all are (batch, length).

    `kw` holds index (the group of each row), group_size, old_log_prob, reference_log_prob, values (None where absent),
    config, reduce and what `algo.options` holds. The function is never called without rows.

    Args:
        name: For `algo.estimator`.
        formula: The text of A that `flux-ray explain` prints. In it `{alpha}` is the option algo.options.alpha.
        needs_groups: It compares the samples of a prompt, so that `rollout.group_size=1` is refused.
        needs_whole_batch: It is shown the rows of all ranks, of a whole step; else some whole groups of one rank.
        needs_values: A critic is trained, on the returns.

    Raises:
        UserError: The name is taken.
    """
    def add(function: Callable[..., AdvantagesAndReturns]) -> Callable[..., AdvantagesAndReturns]:
        if name in ESTIMATORS and not same_function(ESTIMATORS[name].function, function):
            raise UserError(f"advantage estimator {name!r} is taken: choose another name")
        ESTIMATORS[name] = Estimator(
            function, Formula(formula), needs_groups, needs_whole_batch, needs_values, ours=False)
        return function
    return add


def get_adv_estimator(name: str) -> Callable[..., AdvantagesAndReturns]:
    return find_adv_estimator(name).function


def find_adv_estimator(name: str) -> Estimator:
    """The registry's entry: the function and what it needs."""
    if name not in ESTIMATORS:
        raise unknown("advantage estimator", name, ESTIMATORS)
    return ESTIMATORS[name]


def list_adv_estimators() -> list[str]:
    return sorted(ESTIMATORS)
