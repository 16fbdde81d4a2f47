"""Promise: the figures for many devices follow from what was measured and from the stated network."""

import pytest

from benchmarks.scale import Measured, Network, shares

NETWORK = Network(bandwidth=1e9, latency=1e-6)
MEASURED = Measured("net", 8, 25_000_000, 161, 419, 741, 0.1, 0.001)


def test_a_ring_sends_every_number_almost_twice_and_waits_in_every_round():
    seconds = NETWORK.all_reduce_seconds(1_000_000, 4, "ring")
    assert seconds == pytest.approx(6 * 1e-6 + 2 * 3 / 4 * 4e6 / 1e9)


def test_a_tree_waits_in_its_levels_only():
    assert NETWORK.all_reduce_seconds(1, 1024, "tree") == pytest.approx(20e-6, rel=1e-2)
    assert NETWORK.all_reduce_seconds(1, 1024, "ring") == pytest.approx(2046e-6, rel=1e-2)


def test_one_device_sends_nothing():
    assert NETWORK.all_reduce_seconds(10, 1, "ring") == NETWORK.all_reduce_seconds(10, 1, "tree") == 0


def test_the_share_is_of_the_whole_step_and_uses_the_larger_message():
    row = next(r for r in shares(MEASURED, NETWORK, [8]) if r.algorithm == "tree")
    gradient = NETWORK.all_reduce_seconds(25_000_000, 8, "tree")
    rates = NETWORK.all_reduce_seconds(741, 8, "tree") + 0.001
    assert row.rates_seconds == pytest.approx(rates)
    assert row.share == pytest.approx(rates / (0.1 + gradient + rates))
    other = next(r for r in shares(MEASURED, NETWORK, [8], step_seconds=0.2) if r.algorithm == "tree")
    assert other.share < row.share
