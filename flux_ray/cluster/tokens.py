"""Who may join a Ray cluster: whoever has its token, or, without one, whoever reaches its ports.

Gives:  `check_closed`, after joining one; `hint`, for a cluster that doesn't answer.
Knows:  Ray takes RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token by itself. A cluster whose
        machines are all at a loopback address is reached from that machine alone.
Never:  reads a token.
"""

from __future__ import annotations

import ipaddress

import ray
from ray._private.authentication.authentication_utils import is_token_auth_enabled

from flux_ray.errors import UserError

HOW = "RAY_AUTH_MODE=token, with the token in RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"


def check_closed(address: str) -> None:
    """UserError where the cluster that was joined has no token, and other machines reach it."""
    if is_token_auth_enabled():
        return
    reached = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    if any(not ipaddress.ip_address(of_node).is_loopback for of_node in reached):
        raise UserError(f"cluster.address={address}: the cluster has no token, so whoever reaches {reached[0]} runs "
                        f"code in it: start it with a token ({HOW}), or take it as it is by cluster.allow_open=true")


def hint() -> str:
    """A likely cause, where this process has no token: a cluster with one doesn't answer it."""
    return "" if is_token_auth_enabled() else f"; a cluster with a token answers only who has it ({HOW})"
