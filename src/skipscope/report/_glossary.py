"""Glossary: words of a page that a reader may not know, each explained in a sentence or two."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

from skipscope.report._markup import clean

GLOSSARY = {
    "boundary": (
        "A place where the gradient is read: the input, each sum of a shortcut and its branch, or a layer's"
        " output."
    ),
    "branch": "The side of a shortcut connection that holds weights: F in x + F(x).",
    "chaotic": "Here: a roughness of 5 % or more, or a convex share below one half.",
    "convex share": (
        "The share of the surface's points that curve up in both directions, as a bowl does everywhere."
    ),
    "decade": "A factor of ten. Losing 3 decades means that one part in 1,000 arrives.",
    "detached": "The forward pass is the same to the last bit; no gradient goes back through the shortcuts.",
    "exploding": "The gradient grows on its way back, over many layers.",
    "factor": (
        "The gradient's size at one place over its size at the next: below 1 it shrinks on its way back."
    ),
    "fall": "How many powers of ten the gradient loses between the last layer and the first.",
    "filter-normalised": (
        "A random direction in weight space, scaled so that each filter has the length of the weights' own"
        " filter."
    ),
    "fork": "Where a shortcut and its branch part.",
    "lesion": "The branch is taken out and the shortcut left: the opposite of removing the shortcut.",
    "merge": "Where a shortcut and its branch join again, mostly by a sum.",
    "momentum": "Each step also continues a part of the step before.",
    "path": "One route back through the network: at each sum it takes either the shortcut or the branch.",
    "rank collapse": (
        "The activations of different samples become copies of each other, so no layer can separate them."
    ),
    "removed": "The shortcuts are taken out of these weights, as they are; nothing is trained again.",
    "RMS": "Root mean square: the typical size of many numbers.",
    "roughness": "How much a surface goes up and down beyond what a single valley would; 0 for a bowl.",
    "seed": "The number that fixes everything drawn at random: the first weights and the order of the data.",
    "strength": "A factor on every shortcut: 0 takes it out, 1 leaves it as built.",
    "vanishing": "The gradient shrinks on its way back until the first layers get next to nothing.",
}
# "falls" is also a verb, so only the singular of the noun is explained.
_PLURALS = {"boundary": "boundaries", "branch": "branches", "fall": "fall"}
_FORMS = {form: word for word in GLOSSARY for form in (word, _PLURALS.get(word, word + "s"))}
_WORDS = re.compile(
    r"(?<![\w-])(" + "|".join(sorted(map(re.escape, _FORMS), key=len, reverse=True)) + r")(?![\w-])"
)


def with_terms(sentence: str | Markup) -> Markup:
    """Mark the first use of each glossary word in a sentence with its explanation.

    Example:
        >>> with_terms("It loses 3 decades")
        Markup('It loses 3 <abbr class="term" tabindex="0" title="A factor of ten. Losing 3 decades means that
        one part in 1,000 arrives.">decades</abbr>')
    """
    seen: set[str] = set()

    def explained(found: re.Match[str]) -> str:
        word = _FORMS[found[1]]
        if word in seen:
            return found[1]
        seen.add(word)
        return f'<abbr class="term" tabindex="0" title="{escape(GLOSSARY[word])}">{found[1]}</abbr>'

    # Only text between tags is marked, never an attribute.
    text = escape(sentence if isinstance(sentence, Markup) else clean(sentence))
    parts = re.split(r"(<[^>]*>)", str(text))
    return Markup("".join(part if part.startswith("<") else _WORDS.sub(explained, part) for part in parts))
