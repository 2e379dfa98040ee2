"""What ZeRO's marks say of a partition, and what cannot run: the layouts themselves are tested with real processes."""

import pytest
import torch
from torch import nn

from symlm.distributed.layout import Layout
from symlm.distributed.partitions import Fragment, fragments_of, is_partition


def test_a_partition_is_what_a_marked_parameter_is_not():
    p, flat = nn.Parameter(torch.ones(3, 2)), torch.ones(6)
    assert not is_partition(flat, p)
    p._hp_mapping = None
    assert is_partition(flat, p)
    assert not is_partition(p, p)


def test_an_offloaded_partition_is_refused_with_the_setting_to_change():
    p = nn.Parameter(torch.ones(3, 2, device="meta"))
    p._hp_mapping = None
    with pytest.raises(RuntimeError, match=r'remove "offload_optimizer" from'):
        fragments_of(torch.ones(6), [("w", p)])


def test_a_part_has_rows_where_no_rank_cuts_one():
    flat = torch.arange(10.0)
    whole_rows = Fragment("w", 2, 6, Layout((4, 2), ((0, 4), (4, 8))))
    assert torch.equal(whole_rows.of(flat), torch.tensor([[2.0, 3.0], [4.0, 5.0]]))
    cut = Fragment("w", 2, 5, Layout((4, 2), ((0, 3), (3, 8))))
    assert torch.equal(cut.of(flat), torch.tensor([2.0, 3.0, 4.0]))
