"""Which Ray a run joins: what the config says, then RAY_ADDRESS in all its forms."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from flux_ray.cluster.groups import Cluster
from flux_ray.errors import UserError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("configured", "from_environment", "wanted"), [
    (None, None, None), (None, "", None), (None, " ", None), (None, "local", None), (None, "auto", "auto"),
    (None, "10.0.0.1:6379", "10.0.0.1:6379"), (None, "http://127.0.0.1:8265", None), ("local", "10.0.0.1:6379", None),
    (None, "https://cluster", None), ("auto", "10.0.0.1:6379", "auto"), ("10.0.0.2:6379", "local", "10.0.0.2:6379"),
])
def test_the_cluster_to_join(monkeypatch, configured, from_environment, wanted):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if from_environment is not None:
        monkeypatch.setenv("RAY_ADDRESS", from_environment)
    assert Cluster.wanted_address(configured) == wanted


@pytest.mark.parametrize(("configured", "from_environment", "named"), [
    ("ray://10.0.0.1:10001", "", "cluster.address=ray://10.0.0.1:10001"),
    (None, "ray://10.0.0.1:10001", "RAY_ADDRESS=ray://10.0.0.1:10001"),
    ("http://127.0.0.1:8265", "", "cluster.address=http://127.0.0.1:8265"),
])
def test_a_client_s_address_is_refused(monkeypatch, configured, from_environment, named):
    monkeypatch.setenv("RAY_ADDRESS", from_environment)
    with pytest.raises(UserError, match=f"{named}: a run joins a cluster from one of its machines"):
        Cluster.wanted_address(configured)


def test_an_address_where_nobody_listens_is_refused_at_once():
    """Ray would try it for minutes."""
    with socket.socket() as taken:   # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        cluster, said = Cluster(log_dir=Path("/nowhere"), plugins=[]), rf"no Ray cluster answers at .*={address}: "
        with pytest.raises(UserError, match=f"{said}Connection refused"):
            cluster.connect(address, cpus=1)
    with pytest.raises(UserError, match=r"no Ray cluster answers at cluster\.address=no\.such\.host:6379: "):
        cluster.connect("no.such.host:6379", cpus=1)
