"""Who owns which matrix: every one once, evenly, the same for everybody."""

import pytest
import torch

from symlm.distributed.ownership import assign_owners


def costs(seed, count):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).square().tolist()


def loads_of(owners, told, world):
    return [sum(cost for owner, cost in zip(owners, told, strict=True) if owner == rank) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("count", [0, 1, 5, 200])
def test_every_matrix_has_one_owner_and_nobody_much_more_than_a_share(world, count):
    told = costs(world, count)
    owners = assign_owners(told, world)
    assert len(owners) == count
    assert set(owners) <= set(range(world))
    assert max(loads_of(owners, told, world)) <= sum(told) / world + max(told, default=0.0)


def test_equal_costs_go_round_and_the_order_is_stable():
    assert assign_owners([1.0] * 6, 3) == [0, 1, 2, 0, 1, 2]
    assert assign_owners([1.0] * 6, 3) == assign_owners((1.0,) * 6, 3)


def test_the_longest_goes_first_and_loads_go_on():
    assert assign_owners([1.0, 5.0, 2.0, 2.0], 2) == [1, 0, 1, 1]
    assert assign_owners([1.0, 1.0], 2, loads=[3.0, 0.0]) == [1, 1]


def test_bad_worlds_are_refused():
    with pytest.raises(ValueError, match="at least one rank"):
        assign_owners([1.0], 0)
    with pytest.raises(ValueError, match="must not be negative"):
        assign_owners([-1.0], 1)
    with pytest.raises(ValueError, match="1 loads for a world of 2"):
        assign_owners([1.0], 2, loads=[0.0])
