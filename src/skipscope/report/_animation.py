"""A surface with its trajectory, step by step, as a GIF."""

from __future__ import annotations

import io

import numpy as np

from skipscope._errors import SkipscopeError
from skipscope.report import _terrain
from skipscope.report import _view_surfaces as views
from skipscope.report._charts import Surfaces
from skipscope.surfaces import Surface


def gif(result: Surface, *, dpi: int = 90, seconds: float = 0.35) -> bytes:
    """The contour map with the known weights appearing one after another.

    Args:
        result: a surface with points, e.g. over ``trajectory_plane``.
        dpi: pixels an inch.
        seconds: each step is shown so long; the last one four times as long.

    Raises:
        SkipscopeError: the surface has no points on a plane.
    """
    from dataclasses import replace

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    from skipscope.report._matplotlib import hidden, new_figure
    from skipscope.report._matplotlib_maps import contours

    chart = views.surface_chart({result.name: result})
    path = chart.surfaces[0].path if isinstance(chart, Surfaces) else ()
    if not isinstance(chart, Surfaces) or not path:
        raise SkipscopeError(
            "save", "only a surface with known weights on its plane becomes an animation",
            cure="landscape(..., plane=trajectory_plane(...)), or save as .png",
        )  # fmt: skip
    frames = []
    scale = _terrain.heights(chart)
    for step in range(1, len(path) + 1):
        with hidden():
            figure = new_figure(4.6, 4.4)
        axes = figure.subplots()
        contours(axes, replace(chart.surfaces[0], path=path[:step]), scale)
        axes.set_title(path[step - 1][2], fontsize=8)
        canvas = FigureCanvasAgg(figure)
        figure.set_dpi(dpi)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    buffer = io.BytesIO()
    waits = [int(1000 * seconds)] * (len(frames) - 1) + [int(4000 * seconds)]
    frames[0].save(buffer, format="gif", save_all=True, append_images=frames[1:], duration=waits, loop=0)
    return buffer.getvalue()
