"""Draws the paper's results against parameters: ``published_results.py OUT.png``.

The numbers are the paper's, from ``published_results.json`` beside this file, not measured here.

Example:
    python tools/analysis_tools/published_results.py published_results.png
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = json.loads(Path(__file__).with_suffix('.json').read_text())
# Title of a panel, and the result that it shows.
PANELS: dict[str, Callable[[dict], float]] = {
    'ImageNet, top-1 accuracy': lambda row: row['imagenet'],
    'COCO, box AP (Mask R-CNN)': lambda row: row['coco'][0],
    'COCO, mask AP (Mask R-CNN)': lambda row: row['coco'][1],
}


def draw_panel(axes: Axes, title: str, key: str, result: Callable[[dict], float]) -> None:
    """A line a network over its budgets, and a cross for the static network.

    Args:
        axes: Where to draw.
        title: Of the panel.
        key: What a row of the data must have to be in it.
        result: The value of a row.
    """
    for number, (network, rows) in enumerate(RESULTS['networks'].items()):
        static, *dynamic = [row for row in rows if key in row] or [None]
        if static is None:
            continue
        colour = f'C{number}'
        places = [row['parameters'] / 1e6 for row in dynamic]
        values = [result(row) for row in dynamic]
        axes.plot(places, values, 'o-', color=colour, label=network)
        axes.plot(static['parameters'] / 1e6, result(static), 'X', color=colour, markersize=8)
        # The first line has another close above it, so its labels are below.
        side = dict(xytext=(0, 6), ha='center') if number else dict(xytext=(2, -13), ha='left')
        for row, place, value in zip(dynamic, places, values):
            at = (place, value)
            axes.annotate(row['budget'], at, textcoords='offset points', fontsize=8, **side)
    axes.set_xscale('log')
    axes.set_xticks([2, 5, 10, 20, 50, 100], ['2', '5', '10', '20', '50', '100'])
    axes.minorticks_off()
    axes.margins(0.1, 0.1)
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize='medium')
    axes.set_xlabel('parameters of the ImageNet classifier, millions')


def draw() -> Figure:
    """All panels."""
    figure = Figure((12, 4.6), layout='constrained')
    panels = figure.subplots(1, len(PANELS))
    for axes, (title, result) in zip(panels, PANELS.items()):
        draw_panel(axes, title, 'coco' if 'COCO' in title else 'imagenet', result)
    panels[0].plot([], [], 'kX', label='static network')
    panels[0].legend(fontsize='small', loc='lower right')
    figure.suptitle(f"The paper's results, not ours: {RESULTS['source']}", fontsize='small')
    return figure


def main() -> None:
    """Reads the command line and draws."""
    parser = argparse.ArgumentParser(description="Draw the paper's results against parameters")
    parser.add_argument('out', type=Path, help='picture to write, such as results.png')
    draw().savefig(parser.parse_args().out, dpi=110)


if __name__ == '__main__':
    main()
