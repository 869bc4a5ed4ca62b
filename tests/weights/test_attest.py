"""Wrong weights are told, whatever made them wrong; right ones never are."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from flux_ray.weights.attest import Receipts, places
from flux_ray.weights.buckets import Param, buckets, size_of, unpack
from flux_ray.weights.checksum import Sums, checksum
from tests.weights.made_model import LAYERS, Made

pytestmark = pytest.mark.unit

TIMES = 100
LEARNING_RATE = 1e-6  # of a step: the weights change in their last bits
BUCKET = 10_000  # bytes: several of them


class Run:
    """A sender and an engine's worker, and updates between them: buckets as they travel, loads as vLLM does them."""

    def __init__(self, dtype, seed):
        self.random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self.model = Made(dtype=dtype, seed=seed)
        self.weights = dict(self.model.weights)
        self.receipts = Receipts(self.model)
        self.params = [Param(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.weights.items()]

    def step(self):
        """As an optimizer: masters in fp32, each weight by the learning rate; in bfloat16 few change at all."""
        for name, tensor in self.weights.items():
            by = LEARNING_RATE * torch.randn(tensor.shape, generator=self._generator).sign()
            stepped = (tensor.float() + by).to(tensor.dtype)
            one = self.random.randrange(tensor.numel())  # one at least
            stepped.view(-1).view(torch.int16)[one * tensor.element_size() // 2] ^= 1
            self.weights[name] = stepped

    def mend(self):
        for module in self.model.modules():
            module.__dict__.pop("pack", None)

    def sent(self, *, spoil=lambda packed: None):
        """(checksums, what comes out of the buckets)."""
        sums, packed = Sums(), []
        given = iter(sums.watch(self.weights.items()))
        for run in buckets(self.params, BUCKET):
            place = torch.zeros(size_of(run), dtype=torch.uint8)
            for _, there in unpack(place, run):
                there.copy_(next(given)[1])
            packed.append((run, place))
        assert next(given, None) is None
        spoil(packed)
        return sums.given(), [unpack(place, run) for run, place in packed]

    def update(self, *, spoil=lambda packed: None, stale=(), come=None, ahead=False):
        """What is told of an update. `come`: buckets that come; the others are never there. `ahead`: packed copies are
        read back before all else is looked at."""
        sent, came = self.sent(spoil=spoil)
        self.receipts.begin()
        self.receipts.expect(self.params)
        there = dict(pair for bucket in came for pair in bucket)
        for bucket in came[:come]:
            self.receipts.take(bucket)
        self.model.load(there, stale=stale)
        if ahead:
            self.receipts.read_ahead(lambda module: module)
        return self.receipts.wrong(sent)


def lost(run):
    def spoil(packed):
        run.random.choice(packed)[1].zero_()
    return {"spoil": spoil}


def flipped(run):
    def spoil(packed):
        params, place = run.random.choice(packed)
        pieces = [there.view(-1).view(torch.uint8) for _, there in unpack(place, params)]  # no padding
        piece = run.random.choice(pieces)
        piece[run.random.randrange(len(piece))] ^= 1 << run.random.randrange(8)
    return {"spoil": spoil}


def swapped(run):
    def spoil(packed):
        there = [pair for params, place in packed for pair in unpack(place, params)]
        one = run.random.choice([tensor for name, tensor in there if "layers" in name])
        other = run.random.choice([tensor for _, tensor in there if tensor.shape == one.shape and tensor is not one])
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)
    return {"spoil": spoil}


def halves(run):
    """Of one tensor."""
    def spoil(packed):
        params, place = run.random.choice(packed)
        tensor = run.random.choice(unpack(place, params))[1]
        tensor.copy_(tensor.roll(len(tensor) // 2, 0))
    return {"spoil": spoil}


def half_loaded(run):
    """All has come, and what follows some layer is left as it was."""
    paths = [path for path, module in run.model.named_modules() if hasattr(module, "weight")]
    return {"stale": paths[run.random.randrange(len(paths) // 3, len(paths) - 1):]}


def half_come(run):
    return {"come": -run.random.randrange(1, 3)}


def stale_head(run):
    return {"stale": ["lm_head"]}


def stale_packed(run):
    layer = run.random.choice(["qkv_proj", "o_proj", "gate_up_proj"])
    return {"stale": [f"layers.{run.random.randrange(LAYERS)}.{layer}"]}


def packed_of_old(run):
    """A copy that was made anew, of the weights of before: nothing but its numbers tells."""
    layer = getattr(run.model.layers[run.random.randrange(LAYERS)], run.random.choice(["qkv_proj", "gate_up_proj"]))
    old = layer.cpu_linear

    def pack(weight):
        type(layer).pack(layer, weight)
        layer.cpu_linear = lambda x, weight, bias: old(x, weight, bias)

    layer.pack = pack
    return {}


FAULTS = [lost, flipped, swapped, halves, half_loaded, half_come, stale_head, stale_packed, packed_of_old]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("times", [TIMES // 5, pytest.param(TIMES, marks=pytest.mark.all)])
def test_a_fault_is_told_each_time_and_a_right_update_never_is(fault, dtype, times):
    seed = FAULTS.index(fault)
    run = Run(dtype, seed)
    missed, false_alarms = [], []
    for time in range(times):
        run.step()
        ahead = time % 2 == 1
        if run.update(ahead=ahead):
            false_alarms.append(time)
        run.step()
        if not run.update(**fault(run), ahead=ahead):
            missed.append(time)
        run.mend()
    print(f"{fault.__name__}, seed {seed}: {times} times, missed {missed}, false alarms {false_alarms}")
    assert missed == false_alarms == []


def test_what_takes_the_weights_again_is_right_again():
    run = Run(torch.float32, 5)
    run.step()
    run.update()
    run.step()
    (told,) = run.update(stale=["layers.1.o_proj"])
    assert told == "layers.1.o_proj.weight was not packed anew"
    assert run.update() == []


def test_a_copy_that_was_read_ahead_and_is_not_the_one_in_place_is_told():
    run = Run(torch.float32, 8)
    layer = run.model.layers[0].o_proj
    old = layer.cpu_linear
    run.step()
    sent, came = run.sent()
    run.receipts.begin()
    run.receipts.expect(run.params)
    for bucket in came:
        run.receipts.take(bucket)
    run.model.load(dict(pair for bucket in came for pair in bucket))
    run.receipts.read_ahead(lambda module: module)
    layer.cpu_linear = lambda x, weight, bias: old(x, weight, bias)
    assert run.receipts.wrong(sent) == ["layers.0.o_proj.weight has a packed copy that is not what was sent"]


def test_the_first_update_of_an_engine_has_checks_too():
    """A stale layer beside others of its kind that are right."""
    run = Run(torch.float32, 6)
    run.step()
    assert run.update(stale=["layers.1.norm"]) == ["layers.1.norm.weight is not what was sent"]


def test_what_is_kept_in_another_form_is_not_called_wrong():
    """vLLM may hold a tensor transformed: no layer of this kind has ever been as it was sent."""
    run = Run(torch.float32, 7)
    for _ in range(2):
        run.step()
        sent, came = run.sent()
        run.receipts.begin()
        run.receipts.expect(run.params)
        for bucket in came:
            run.receipts.take(bucket)
        there = dict(pair for bucket in came for pair in bucket)
        run.model.load({name: tensor + 1 if "norm" in name else tensor for name, tensor in there.items()})
        assert run.receipts.wrong(sent) == []


def test_every_parameter_of_the_model_has_its_place():
    model = Made(dtype=torch.float32, seed=0)
    params = [Param(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in model.weights.items()]
    found = places(model, params)
    assert set(found) == set(model.weights)
    at = {name: (place.start, place.total) for name, place in found.items()}
    assert at["layers.1.k_proj.weight"] == (32, 64) and at["layers.1.v_proj.bias"] == (48, 64)
    assert at["norm.weight"] == (0, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64])
@pytest.mark.parametrize("num", [1, 7, 4096, 70_001])
def test_a_checksum_sees_each_bit_and_each_place(dtype, num):
    generator = torch.Generator().manual_seed(num)
    tensor = (torch.randn(num, generator=generator) * 100).to(dtype)
    known = int(checksum(tensor))
    assert known == int(checksum(tensor.clone())) == int(checksum(torch.stack([tensor, tensor], 1)[:, 0]))
    data = tensor.view(torch.uint8)
    for at in {0, data.numel() // 2, data.numel() - 1}:
        data[at] ^= 1
        assert int(checksum(tensor)) != known
        data[at] ^= 1
    if num > 7:
        assert int(checksum(tensor.roll(num // 2))) != known and int(checksum(tensor.flip(0))) != known
    assert int(checksum(tensor[: num - 1])) != known


def test_zeros_of_another_number_are_told():
    assert int(checksum(torch.zeros(8))) != int(checksum(torch.zeros(9)))


def test_the_worker_ends_the_update_before_it_looks():
    from flux_ray.weights.worker import AttestingWorker

    did = []

    class Worker(AttestingWorker):
        weight_transfer_engine = SimpleNamespace(
            receipts=SimpleNamespace(wrong=lambda sent: did.append("looked") or [str(sent)]))

        def finish_weight_update(self):
            did.append("ended")

    assert Worker().finish_and_attest({"a": 1}) == ["{'a': 1}"] and did == ["ended", "looked"]
    Worker.weight_transfer_engine = SimpleNamespace()  # vLLM's own end
    assert Worker().finish_and_attest({"a": 1}) == []
