"""Row rules block by block, on rows held whole or cut by other ranks' parts, are the rule on the whole matrix."""

from itertools import pairwise

import pytest
import torch
from numerics import EXACT, relative

from symlm.distributed.layout import AbsentGroup, Layout, cut_rows, rows_held
from symlm.rules import RULES
from symlm.step.rows.blocks import ALL, Block, blocks_of
from symlm.step.rows.row_step import RowStep

ROW_RULES = [rule for rule in RULES.values() if rule.row_map]
SHAPE = (12, 7)


def matrix(seed=0):
    return torch.randn(*SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def settings(rule):
    return {"step": 3, "beta2": 0.95} if rule.state else {}


def first_state(rule):
    M = matrix(5)
    values = {"row_rms": M[:, :1].abs(), "gram": M.mT @ M}
    return {key: values[key] for key in rule.state}


@pytest.mark.parametrize("rule", ROW_RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("elements", [1, 40, 10**6])
def test_blocks_of_rows_are_the_rule(rule, elements):
    M, layout = matrix(), Layout(SHAPE, ((0, 84),))
    state = rule.refreshed(M, first_state(rule), step=3)
    U = rule.direction(M, state, step=3)
    stored = first_state(rule)
    rows = RowStep(
        rule, layout, M, lambda block, out: out.copy_(block.of(M)), stored, settings(rule), 0.05, stored.update
    )
    found = [(block, part.clone(), own) for block, part, own in rows.directions(elements)]
    assert len(found) == {1: 12, 40: 3, 10**6: 1}[elements]
    for block, part, own in found:
        assert relative(part, block.of(U)) < EXACT
        for key, value in own.items():
            assert relative(value, state[key][block.rows]) < EXACT
    for key in set(rule.state) - set(found[0][2]):
        assert relative(stored[key], state[key]) < EXACT


CUTS = [(0, 30, 50, 84), (0, 3, 5, 84), (0, 14, 16, 84), (0, 0, 84), (0, 28, 84), (0, 6, 8, 13, 15, 84)]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("elements", [1, 10, 10**6])
def test_blocks_cover_every_part_once_and_stay_in_their_rows(cuts, elements):
    M, intervals = matrix(), tuple(pairwise(cuts))
    for start, stop in intervals:
        layout = _Part(SHAPE, intervals, AbsentGroup(len(intervals)), own=(start, stop))
        (first, last), cut = rows_held(layout), cut_rows(layout)
        flat = M.flatten()[start:stop]
        part = flat if cut else flat.view(-1, SHAPE[1])
        rebuilt = torch.full((last - first, SHAPE[1]), torch.nan, dtype=M.dtype)
        for block in blocks_of(layout, elements):
            assert rebuilt[block.rows, block.columns].isnan().all()
            rebuilt[block.rows, block.columns] = block.of(part)
        inside = torch.zeros(M.numel(), dtype=torch.bool)
        inside[start:stop] = True
        expected = torch.where(inside.view(SHAPE), M, torch.nan)[first:last]
        torch.testing.assert_close(rebuilt, expected, rtol=0, atol=0, equal_nan=True)


class _Part(Layout):
    """A layout whose rank is told, since no processes are there."""

    def __init__(self, *fields, own):
        super().__init__(*fields)
        object.__setattr__(self, "own", own)

    @property
    def interval(self):
        return self.own


def test_the_whole_block_is_everything():
    x = torch.ones(3)
    assert ALL.of(x).data_ptr() == x.data_ptr()
    assert Block(slice(1, 2)).of(matrix()).shape == (1, 7)
