"""Animated GIF of a surface with its trajectory, step by step; twins' surfaces side by side."""

from __future__ import annotations

import io

import numpy as np

from skipscope._errors import SkipscopeError
from skipscope.report import _surface_charts
from skipscope.report import _view_surfaces as views
from skipscope.report._charts import Surfaces
from skipscope.surfaces import PairedSurfaces, Surface


def gif(result: Surface | PairedSurfaces, *, dpi: int = 90, seconds: float = 0.35) -> bytes:
    """Animate the contour map: the known weights appear one after another.

    Args:
        result: a surface with points, e.g. over ``trajectory_plane``; or twins' surfaces, drawn on one scale.
        dpi: pixels per inch.
        seconds: duration of a step; the last step lasts four times as long.

    Raises:
        SkipscopeError: the surface has no points on a plane.
    """
    from dataclasses import replace

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    from skipscope.report._figure_style import with_options
    from skipscope.report._matplotlib import new_figure, plain
    from skipscope.report._matplotlib_maps import contours, square

    twins = result.surfaces if isinstance(result, PairedSurfaces) else {result.name: result}
    chart = views.surface_chart(twins)
    path = chart.surfaces[0].path if isinstance(chart, Surfaces) else ()
    if not isinstance(chart, Surfaces) or not path:
        raise SkipscopeError(
            "save",
            "only a surface with known weights on its plane becomes an animation",
            cure="landscape(..., directions=trajectory_plane(...)), or save as .png",
        )
    frames = []
    scale = _surface_charts.heights(chart)
    for step in range(1, len(path) + 1):
        with with_options(to_file=True):
            figure = new_figure(4.6 * len(twins), 4.4)
        for axes, surface in zip(figure.subplots(1, len(twins), squeeze=False)[0], chart.surfaces):
            contours(axes, replace(surface, path=surface.path[:step]), scale)
            lead = f"{surface.label}\n" if len(twins) > 1 else ""
            axes.set_title(plain(lead + surface.path[step - 1][2]), fontsize=8)
            axes.set_xlabel(plain(chart.axes[0]), fontsize=8)
            axes.set_ylabel(plain(chart.axes[1]), fontsize=8)
        canvas = FigureCanvasAgg(figure)
        figure.set_dpi(dpi)
        square(figure)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    buffer = io.BytesIO()
    waits = [int(1000 * seconds)] * (len(frames) - 1) + [int(4000 * seconds)]
    frames[0].save(buffer, format="gif", save_all=True, append_images=frames[1:], duration=waits, loop=0)
    return buffer.getvalue()
