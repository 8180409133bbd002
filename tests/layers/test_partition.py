"""Cells, counts and the one-to-one start; and every refusal."""

import plain_reference as plain
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkw.layers import KernelShape, PlanError, WarehouseOptions, partition_warehouse


def kernel(name, out=64, into=64, size=(3, 3)):
    return KernelShape(name, out, into, size)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    widths=st.lists(st.sampled_from([(8, 8), (8, 16), (16, 8)]), min_size=1, max_size=5),
    budget=st.sampled_from([0.25, 0.5, 1, 2, 3.0, 4]),
)
def test_one_to_one_start_covers_every_cell_once(widths, budget):
    kernels = [kernel(f'conv{i}', out, into) for i, (out, into) in enumerate(widths)]
    ratio = min(budget, 1) / 2
    options = WarehouseOptions(
        cell_num_ratio=budget, cell_inplane_ratio=ratio, cell_outplane_ratio=ratio
    )
    partition = partition_warehouse('w', kernels, options)
    start, picked = 0, []
    for share in partition.layers:
        expected, end = plain.one_to_one(start, share.num_mixtures, budget)
        assert [-1 if cell is None else cell for cell in share.assigned] == expected
        assert (share.start, share.own_cells) == (start, end - start)
        picked += [cell for cell in expected if cell >= 0]
        start = end
    assert start == partition.num_cells
    step = max(int(budget), 1)
    assert picked == list(range(0, partition.num_cells, step))


def test_cells_take_the_common_divisor_of_the_channels():
    kernels = [kernel('a', 96, 64), kernel('b', 64, 32, (1, 1))]
    partition = partition_warehouse('w', kernels, WarehouseOptions())
    assert partition.cell_shape == (32, 32, 1, 1)
    assert [share.grid for share in partition.layers] == [(3, 3, 3, 2), (1, 1, 2, 1)]
    assert partition.num_cells == 54 + 2


def test_without_spatial_partition_cells_keep_the_kernel():
    options = WarehouseOptions(spatial_partition=False, cell_num_ratio=2)
    partition = partition_warehouse('w', [kernel('a'), kernel('b', 128)], options)
    assert partition.cell_shape == (64, 64, 3, 3)
    assert partition.num_cells == 6


@pytest.mark.parametrize(
    'kernels, options, message',
    [
        (
            [kernel('a', 64, 64, (3,)), kernel('b')],
            {},
            r"Warehouse 'w': kernels of different dimension.*a \(64, 64, 3\), b \(64, 64, 3x3\)",
        ),
        (
            [kernel('a'), kernel('b', 64, 64, (1, 1))],
            dict(spatial_partition=False),
            r"Warehouse 'w': without spatial_partition all kernels need one size, got "
            r'\[\(1, 1\), \(3, 3\)\]: a \(64, 64, 3x3\), b \(64, 64, 1x1\)',
        ),
        (
            [kernel('a')],
            dict(cell_num_ratio=0.5),
            r"Warehouse 'w': cell_num_ratio=0.5 gives 4 cells for 9 mixtures.*walks over 5 "
            r'\(a \(64, 64, 3x3\): 9\)',
        ),
        ([kernel('a')], dict(cell_num_ratio=1.5), 'gives 13 cells for 9 mixtures.*walks over 9'),
        (
            [kernel('a', 9, 9)],
            dict(cell_outplane_ratio=0.5),
            r"Warehouse 'w': cells of \(4, 9\) channels do not divide a \(9, 9, 3x3\).*"
            'cell_outplane_ratio=0.5',
        ),
    ],
)
def test_impossible_warehouses_are_refused(kernels, options, message):
    with pytest.raises(PlanError, match=message):
        partition_warehouse('w', kernels, WarehouseOptions(**options))


@pytest.mark.parametrize(
    'option, value',
    [
        ('cell_num_ratio', 0),
        ('cell_num_ratio', -1),
        ('cell_num_ratio', float('nan')),
        ('cell_num_ratio', '4x'),
        ('cell_inplane_ratio', 1.5),
        ('cell_outplane_ratio', 0),
        ('reduction', -0.1),
        ('nonlocal_basis_ratio', 2),
        ('spatial_partition', 'yes'),
    ],
)
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(PlanError, match=f'{option} must be .*, got {value!r}'):
        WarehouseOptions(**{option: value})
