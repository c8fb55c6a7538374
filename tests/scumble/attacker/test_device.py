"""Everything that trains or asks a network does so where the network is."""

import numpy as np
import pytest
import torch

from scumble.attacker import device, students
from scumble.attacker.adapt import make
from tests.scumble.attacker.pretend_gpu import GPU, PretendGpu
from tests.scumble.attacker.stand_ins import (
    LABELS,
    SHAPE,
    FunctionOracle,
    linear_victim,
    noise_pool,
)
from tests.scumble.attacker.test_attacks import SMALL, steal

pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")


@pytest.fixture
def gpu():
    with PretendGpu() as pretended, device.chosen(GPU):
        yield pretended


def test_without_a_gpu_networks_are_on_the_cpu():
    assert device.best(available=lambda: False) == device.CPU


def test_a_chosen_device_is_used_in_its_block_only():
    found = device.best()
    with device.chosen(GPU):
        assert device.best() == GPU
    assert device.best() == found


def test_networks_are_made_on_the_chosen_device():
    with device.chosen(device.CPU):
        net = students.make("small_cnn", SHAPE, LABELS, seed=0)
        assert device.of(net) == device.CPU
        assert device.gpu() is None


def test_with_a_gpu_it_is_chosen():
    assert device.best(available=lambda: True) == GPU


def test_the_pretended_gpu_refuses_what_a_real_one_does(gpu):
    x = torch.ones(3).to(GPU)
    assert (x * 2).device == GPU
    assert x.cpu().device.type == "cpu"
    with pytest.raises(RuntimeError, match="both sides"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="both sides"):
        torch.ones(3)[torch.arange(3).to(GPU)]
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


@pytest.mark.parametrize("name", SMALL)
def test_every_attack_trains_its_copy_there(name, gpu):
    attack, _ = SMALL[name]
    images, seen = noise_pool(8, seed=5).images, []
    student = steal(
        attack,
        FunctionOracle(linear_victim(), 100),
        watch=lambda _, copy: seen.append(students.predict(copy, images)),
    )
    assert device.of(student) == GPU
    assert np.isfinite(seen).all()
    saved = students.weights_on_cpu(student)
    assert saved.keys() == student.state_dict().keys()
    assert not any(gpu.holds(weight) for weight in saved.values())
    assert device.of(student) == GPU


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("recover", {"pairs": 600, "epochs": 1, "hidden": [16]}),
        ("invert", {"prior": "student"}),
    ],
)
def test_modifiers_with_networks_do_too(name, params, gpu):
    student = students.make("small_cnn", SHAPE, LABELS, seed=0)
    oracle = make(name, **params)(FunctionOracle(linear_victim(), 100), student)
    assert np.isfinite(oracle(noise_pool(20).images)).all()
