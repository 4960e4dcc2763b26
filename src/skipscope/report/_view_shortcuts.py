"""View of a network and its shortcuts: the drawing and the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from skipscope.report._charts import Arc, Document, Network, Panel
from skipscope.report._document import view
from skipscope.shortcuts import Shortcuts


def drawing(found: Shortcuts, shares: Mapping[str, float | None] | None = None) -> Network:
    """Build the drawing of a network, without layers on a shortcut's own path (a projection).

    Args:
        found: the shortcuts.
        shares: shortcut's name -> share of the gradient that it carries.
    """
    aside = {name for s in found for name in s.shortcut} - {name for s in found for name in s.branch}
    place, layers = [], []
    for layer in found.layers:
        place.append(len(layers))
        if layer.name not in aside:
            layers.append(layer.name or layer.type)
    arcs = []
    for s in found:
        first, last = (min(max(i, 0), len(place) - 1) for i in s.span)
        end = place[last] - (found.layers[last].name in aside)
        arcs.append(Arc(place[first], max(end, place[first]), s.name, s.kind, (shares or {}).get(s.name)))
    return Network(layers, arcs)


def found_answer(found: Shortcuts) -> str:
    """Sentence on the number of shortcuts and their kinds."""
    if not len(found):
        return f"{found.model or 'The network'} has no shortcuts."
    kinds = Counter(s.kind for s in found)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return (
        f"{found.model or 'The network'} has {len(found)} shortcut{'s' * (len(found) > 1)} over"
        f" {len(found.layers)} layers: {listed}."
    )


@view.register
def _(result: Shortcuts) -> Document:
    panel = Panel(
        "The network with its shortcuts",
        drawing(result),
        "Layers from left to right; each arc leaves where the shortcut forks and lands where it merges"
        " again.",
        [result.table()],
    )
    return Document(f"The shortcuts of {result.model or 'the network'}", "", [found_answer(result)], [panel])
