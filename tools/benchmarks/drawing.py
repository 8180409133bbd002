"""Draws the reports of the benchmarks; ``drawing.py REPORT.json...`` draws measured ones again.

Lines where budget, batch or size grow, bars elsewhere. A budget has one colour in all pictures.
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# A value that is larger than so many medians leaves no room for the others on a linear axis.
DWARFING = 4
LOG_TICKS = (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


class Quantity(NamedTuple):
    """What grows along a report: its name, its value in a row, and whose line a row is on."""

    name: str
    value: Callable[[dict], float | None]
    line: Callable[[dict], str]


def budget_of(name: str) -> float | None:
    """The budget in the name of a network or config; None for a static one.

    Example:
        >>> budget_of('published kw 0.5x'), budget_of('mask-rcnn_kw1d2x-r50_fpn')
        (0.5, 0.5)
    """
    found = re.search(r'\bkw ?([\d.]+)(?:d(\d+))?x', name.replace('_', ' '))
    return float(found[1]) / int(found[2] or 1) if found else None


def label_of(name: str) -> str:
    """The name of a network as the pictures give it."""
    budget = budget_of(name)
    if budget is None:
        return name
    return f'{"published" if name.startswith("published ") else "mmkw"} {budget:g}x'


def colour_of(name: str) -> str:
    """The colour of a budget; gray for static networks."""
    budget = budget_of(name)
    return 'gray' if budget is None else f'C{round(math.log2(budget)) % 10}'


def growing(rows: Sequence[dict]) -> Quantity | None:
    """What grows in a report: the budget, the batch or the size; None if nothing does.

    Args:
        rows: Of a report.
    """
    shapes = {tuple(map(int, row['setting'].split('x'))) for row in rows}
    batches, sizes = {shape[0] for shape in shapes}, {shape[1:] for shape in shapes}
    budgets = {budget_of(row['name']) for row in rows} - {None}
    if len(budgets) > 3:
        return Quantity('budget', lambda row: budget_of(row['name']), lambda row: row['setting'])
    if len(batches) > 2 and len(sizes) == 1:
        name, place = f'images of {"x".join(map(str, *sizes))} in a batch', 0
    elif len(sizes) > 2 and len(batches) == 1 and all(len(set(size)) == 1 for size in sizes):
        name, place = f'pixels a side, batch of {min(batches)}', 1
    else:
        return None
    return Quantity(
        name, lambda row: int(row['setting'].split('x')[place]), lambda row: row['name']
    )


def draw(report: dict) -> Figure:
    """Draws times relative to the static network, with their limits.

    Args:
        report: With ``title``, ``processor``, ``instructions``, ``threads`` and ``rows``, as the
            benchmarks write it.
    """
    reference = report['rows'][0]['name']
    rows = [row for row in report['rows'] if row['name'] != reference]
    quantity = growing(rows)
    figure = Figure((6.5 if quantity else 3 + 0.45 * len(rows), 4.4), layout='constrained')
    axes = figure.subplots()
    ratios = sorted(row['ratio'] for row in rows)
    if ratios[-1] > DWARFING * ratios[len(ratios) // 2]:
        axes.set_yscale('log')
        axes.set_yticks(LOG_TICKS, [f'{tick:g}' for tick in LOG_TICKS])
        axes.minorticks_off()
        axes.set_ylim(min(0.8, 0.9 * ratios[0]), 1.3 * ratios[-1])
    else:
        axes.set_ylim(0, 1.1 * ratios[-1])
    axes.axhline(1, color='gray', linewidth=1, label='static')
    if quantity:
        draw_lines(axes, rows, quantity)
    else:
        draw_bars(axes, rows)
    axes.grid(axis='y', alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_ylabel('time relative to the static network')
    threads = f'{report["threads"]} thread' + 's' * (report['threads'] > 1)
    machine = f'{threads} of {report["processor"]}, {report["instructions"]}'
    axes.set_title(f'{report["title"]}\n{machine}', fontsize='small')
    figure.legend(loc='outside lower center', ncols=3, fontsize='small')
    return figure


def draw_lines(axes: Axes, rows: Sequence[dict], quantity: Quantity) -> None:
    """A line a network over the quantity, or a line a setting over budgets; limits are dotted."""
    for number, line in enumerate(dict.fromkeys(map(quantity.line, rows))):
        of_line = [row for row in rows if quantity.line(row) == line]
        own = [row for row in of_line if quantity.value(row) is not None]
        own.sort(key=quantity.value)
        over_budgets = line == own[0]['setting']
        # Colours that no usual budget has.
        colour = f'C{4 + number}' if over_budgets else colour_of(line)
        x = [quantity.value(row) for row in own]
        published = line.startswith('published ')
        style = 's--' if published else 'o-'
        label = line if over_budgets else label_of(line)
        axes.plot(x, [row['ratio'] for row in own], style, color=colour, label=label)
        limits = [row['limit'] for row in own]
        if None not in limits and not published:
            axes.plot(x, limits, ':', color=colour, linewidth=2, label=f'limit, {label}')
        # Over budgets a static network is a level.
        for row in of_line:
            if row not in own:
                name = f'{row["name"]}, {label}'
                axes.axhline(row['ratio'], color=colour, linestyle='-.', linewidth=1, label=name)
    ticks = sorted(set(map(quantity.value, rows)) - {None})
    axes.set_xscale('log', base=2)
    axes.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(quantity.name)


def draw_bars(axes: Axes, rows: Sequence[dict]) -> None:
    """A group a setting, a bar a network: hatched in the published form, limits as black lines."""
    names = list(dict.fromkeys(row['name'] for row in rows))
    settings = list(dict.fromkeys(row['setting'] for row in rows))
    # On a logarithmic axis bars start at the static network.
    base = 1 if axes.get_yscale() == 'log' else 0
    width = 0.84 / len(names)
    for number, name in enumerate(names):
        own = [row for row in rows if row['name'] == name]
        x = [
            settings.index(row['setting']) + (number - (len(names) - 1) / 2) * width for row in own
        ]
        bars = axes.bar(
            x,
            [row['ratio'] - base for row in own],
            0.9 * width,
            base,
            label=label_of(name),
            facecolor='white' if name.startswith('published ') else colour_of(name),
            edgecolor=colour_of(name),
            hatch='///' if name.startswith('published ') else None,
        )
        axes.bar_label(bars, [f'{row["ratio"]:.2f}' for row in own], padding=2, fontsize=7)
        limits = [(at, row['limit']) for at, row in zip(x, own) if row['limit'] is not None]
        if limits:
            places, values = zip(*limits)
            ends = [[at + side * 0.45 * width for at in places] for side in (-1, 1)]
            axes.hlines(values, *ends, color='black', linewidth=2, zorder=3)
    axes.plot([], [], color='black', linewidth=2, label='limit')
    axes.set_xticks(range(len(settings)), settings)
    axes.set_xlim(-0.6, len(settings) - 0.4)
    axes.set_xlabel('batch x height x width')


def main() -> None:
    """Draws reports beside their files."""
    parser = argparse.ArgumentParser(description='Draw reports of the benchmarks again')
    parser.add_argument('reports', nargs='+', type=Path, help='JSON files of the benchmarks')
    for path in parser.parse_args().reports:
        draw(json.loads(path.read_text())).savefig(path.with_suffix('.png'), dpi=110)


if __name__ == '__main__':
    main()
