"""What follows when an engine attests something else than was published: it takes it again, then it is ended."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from flux_ray.config import from_dict
from flux_ray.driver.ranks import Ranks
from flux_ray.messages import Attested
from tests.fakes.actors import LocalActor

pytestmark = pytest.mark.unit

RIGHT = Attested("3")
WRONG = [Attested("2"), Attested("3", ("embed.weight did not come",))]


def published(answers):
    """How two engines fare whose rank 0 is answered so in turn: (publishes, the ends of engines and why)."""
    ended = []

    class Engines:
        async def reached(self, only):
            return [0, 1]

        def serve(self, engines):
            ended.append("served")

        def end(self, engine, why):
            ended.append((engine, why))

        async def one_dies(self, within_s):
            return True

    left = list(answers)

    async def run():
        trainer = LocalActor("trainer", 0, lambda _: SimpleNamespace(publish=lambda version, step: left.pop(0)))
        ranks = Ranks(from_dict({}), trainer=[trainer], critic=None, engines=Engines())
        await ranks.publish(3, 1)

    asyncio.run(run())
    return len(answers) - len(left), ended


@pytest.mark.parametrize("wrong", WRONG, ids=["label", "weights"])
def test_the_first_time_it_takes_the_version_again(wrong):
    assert published([[RIGHT, wrong], [RIGHT, RIGHT]]) == (2, ["served"])


@pytest.mark.parametrize("wrong", WRONG, ids=["label", "weights"])
def test_the_second_time_it_is_ended_by_name(wrong):
    publishes, ((engine, why), served) = published([[RIGHT, wrong], [RIGHT, wrong], [RIGHT, RIGHT]])
    assert (publishes, engine, served) == (3, 1, "served")
    assert f"engine 1 serves version {wrong.version} after version 3 was published" in why
    assert all(name in why for name in wrong.wrong)
