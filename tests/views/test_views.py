"""Every view and its exact inverse."""

import pytest
import torch

from symlm.views import MatrixView
from symlm.views.storage import STACK, TRANSPOSED, TRANSPOSED_STACK, VECTOR, WHOLE, column_heads, gate_up, row_heads

CASES = [
    (WHOLE, (6, 4), (1, 6, 4)),
    (TRANSPOSED, (6, 4), (1, 4, 6)),
    (VECTOR, (5,), (1, 1, 5)),
    (STACK, (3, 6, 4), (3, 6, 4)),
    (TRANSPOSED_STACK, (3, 6, 4), (3, 4, 6)),
    (row_heads(3), (6, 4), (3, 2, 4)),
    (column_heads(2), (6, 4), (2, 6, 2)),
    (gate_up(False, True, False), (3, 8, 5), (6, 4, 5)),
    (gate_up(False, True, True), (3, 8, 5), (3, 4, 10)),
    (gate_up(True, False, False), (3, 5, 8), (6, 4, 5)),
    (gate_up(True, False, True), (3, 5, 8), (3, 4, 10)),
]


@pytest.mark.parametrize(("view", "stored", "stack"), CASES, ids=lambda value: str(value))
def test_round_trip_is_exact(view, stored, stack):
    W = torch.arange(float(torch.tensor(stored).prod())).reshape(stored)
    assert view.shape(stored) == stack
    assert view.to_matrices(W).shape == stack
    assert torch.equal(view.from_matrices(view.to_matrices(W).clone(), stored), W)
    assert str(MatrixView.parse(str(view))) == str(view)


@pytest.mark.parametrize(("view", "stored", "stack"), CASES, ids=lambda value: str(value))
def test_many_of_one_shape_are_their_stacks_one_behind_the_other(view, stored, stack):
    many = torch.arange(3.0 * torch.tensor(stored).prod()).reshape(3, *stored)
    found = view.to_matrices(many)
    assert torch.equal(found, torch.cat([view.to_matrices(W) for W in many]))
    assert torch.equal(view.from_matrices(found.clone(), tuple(many.shape)), many)
    with pytest.raises(ValueError, match="axes"):
        view.shape((3, *stored))
    with pytest.raises(ValueError, match="many with one in front"):
        view.to_matrices(many[None])


def test_sections_of_many_are_each_ones():
    view = MatrixView("(h m) n -> h m n | 1 (h m) n", {"h": (2, 1)})
    many = torch.arange(72.0).reshape(2, 9, 4)
    for k, (section, blocks) in enumerate(view.sections(many)):
        assert torch.equal(blocks, torch.stack([view.sections(W)[k][1] for W in many]))
        assert torch.equal(section.to_matrices(blocks), torch.cat([section.to_matrices(W) for W in blocks]))


@pytest.mark.parametrize("view", [WHOLE, TRANSPOSED, row_heads(3), column_heads(2)], ids=str)
def test_no_copy_where_a_view_will_do(view):
    W = torch.zeros(6, 4)
    assert view.to_matrices(W).data_ptr() == W.data_ptr()


def test_blocks_are_where_the_models_put_them():
    gate, up = torch.zeros(2, 4, 5), torch.ones(2, 4, 5)
    concatenated = torch.cat([gate, up], dim=1)
    interleaved = torch.stack([gate, up], dim=2).reshape(2, 8, 5).mT
    for view, W in ((gate_up(False, True, False), concatenated), (gate_up(True, False, False), interleaved)):
        assert torch.equal(view.to_matrices(W), torch.stack([gate, up], 1).reshape(4, 4, 5))
    for view, W in ((gate_up(False, True, True), concatenated), (gate_up(True, False, True), interleaved)):
        assert torch.equal(view.to_matrices(W), torch.cat([gate, up], -1))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="does not divide"):
        row_heads(4).shape((6, 4))
    with pytest.raises(ValueError, match="expects a tensor of 2 axes"):
        WHOLE.shape((6,))
    with pytest.raises(ValueError, match="not a rearrangement"):
        MatrixView("m n -> 1 m k").shape((6, 4))
    with pytest.raises(ValueError, match="2 right sides"):
        MatrixView("(h m) n -> h m n | 1 (h m) n", {"h": (3,)}).shape((6, 4))
