"""The page: whole, offline, escaped, small, and read back; checked on its text, without a browser."""

from __future__ import annotations

import base64
import html
import json
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

import skipscope as ss
from report import samples
from skipscope import SkipscopeError
from skipscope._result import Result, dumps
from skipscope.report import _page, _svg_lines, document
from skipscope.report._page import stress

RESULTS = samples.everything()
NAMES = [type(r).__name__ for r in RESULTS]


class Parts(HTMLParser):
    """Which elements and attributes a page has, and the text outside scripts and styles."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self.scripts = [], [], [], []
        self._inside: str | None = None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._inside = tag if tag in {"script", "style"} else self._inside
        if tag == "script":
            self.scripts.append((dict(attrs).get("type", "run"), ""))

    def handle_endtag(self, tag):
        if tag == self._inside:
            self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        elif self._inside is None:
            self.text.append(data)


def loads_from(parts: Parts) -> list[tuple[str, str, str]]:
    """Attributes that would fetch something."""
    fetching = {"src", "href", "srcset", "action", "data", "poster", "background", "formaction", "xlink:href"}
    return [a for a in parts.attributes if a[1] in fetching and not a[2].startswith(("#", "data:"))]


@pytest.mark.parametrize("result", RESULTS, ids=NAMES)
def test_a_page_is_whole_small_offline_and_loads_back(result: Result, tmp_path):
    path = result.save(tmp_path / "page.html")
    page = path.read_text(encoding="utf-8")
    parts = Parts(page)
    assert path.stat().st_size < 8_000_000
    assert loads_from(parts) == []
    assert not re.search(r"@import|url\(", (_page.asset("chart.css") + _page.asset("page.css")))
    text = " ".join("".join(parts.text).split())
    for sentence in document(result).answer:
        assert " ".join(sentence.split()) in text
    for panel in document(result).panels:
        assert panel.heading in text
        assert panel.chart is not None or panel.tables
        for table in panel.tables:
            assert table.title in text
    again = ss.load(path)
    assert type(again) is type(result)
    assert json.dumps(again.to_dict()) == json.dumps(result.to_dict())  # NaN is equal to itself as text


def test_the_check_for_addresses_can_fail():
    assert loads_from(Parts('<img src="https://example.org/x.png"><a href="#s1">')) == [
        ("img", "src", "https://example.org/x.png")
    ]


def test_the_policy_names_exactly_the_scripts_that_are_there(tmp_path):
    import base64
    import hashlib

    page = samples.pair().save(tmp_path / "x.html").read_text()
    parts = Parts(page)
    policy = next(
        value
        for tag, name, value in parts.attributes
        if tag == "meta" and name == "content" and "default-src" in value
    )
    runs = [text for kind, text in parts.scripts if kind == "run"]
    hashes = {"'sha256-" + base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() + "'" for t in runs}
    assert set(re.findall(r"'sha256-[^']+'", policy)) == hashes
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert sum("const Surface3D" in t for t in runs) == 1


def test_only_pages_that_turn_something_carry_the_renderer(tmp_path):
    flow, surface = samples.flow().save(tmp_path / "f.html"), samples.surface().save(tmp_path / "s.html")
    assert "const Surface3D" not in flow.read_text(encoding="utf-8")
    assert "const Surface3D" in surface.read_text(encoding="utf-8")


def test_a_page_stays_small(tmp_path):
    assert samples.flow().save(tmp_path / "f.html").stat().st_size < 200_000
    assert samples.surface().save(tmp_path / "s.html").stat().st_size < 500_000
    assert samples.comparison(points=31).save(tmp_path / "c.html").stat().st_size < 2_000_000


@pytest.mark.parametrize(
    "text",
    [
        "</script><script>alert(1)</script>",
        "<!--<script>",
        "\\u003c/script>",
        "\\",
        '"',
        "\u2028",
        "\x00",
        "\ud800",
    ],
)
def test_hostile_text_in_the_data_comes_back_as_it_was(text, tmp_path):
    result = samples.flow(3, text=lambda s: s + text)
    assert ss.load(result.save(tmp_path / "x.html")).to_dict() == result.to_dict()


@pytest.mark.parametrize(
    "result",
    samples.everything(lambda s: f"{s}\"><img src=x onerror=bad()><script>bad()</script>'{{{{7*7}}}}"),
    ids=NAMES,
)
def test_no_text_of_a_result_becomes_an_element(result, tmp_path):
    page = result.save(tmp_path / "x.html").read_text(encoding="utf-8")
    parts = Parts(page)
    assert "img" not in parts.tags
    assert not any(name.startswith("on") for _, name, _ in parts.attributes)
    assert not any("bad()" in text for kind, text in parts.scripts if kind == "run")
    assert "{{7*7}}" in html.unescape(page)
    fragment = Parts(result._repr_html_())
    assert "img" not in fragment.tags
    assert "script" not in fragment.tags


def test_a_page_too_large_leaves_its_data_out_or_refuses(monkeypatch, tmp_path):
    result = samples.flow()
    whole = len(result.save(tmp_path / "a.html").read_bytes())
    monkeypatch.setattr(_page, "MOST", whole - 1000)
    page = result.save(tmp_path / "b.html").read_text()
    assert "skipscope-data" not in page
    assert "too large" in page
    monkeypatch.setattr(_page, "MOST", 1000)
    with pytest.raises(SkipscopeError, match="at most"):
        result.save(tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()


def test_a_comparison_on_the_paper_s_grid_fits_with_its_data(tmp_path):
    path = samples.comparison(points=51).save(tmp_path / "x.html")
    assert path.stat().st_size < 8_000_000
    assert ss.load(path).surfaces["trained"].surfaces["shortcuts"].values.shape == (51, 51)


def test_every_chart_has_a_table_on_the_page():
    for result in RESULTS:
        panels = document(result).panels
        assert any(panel.tables for panel in panels)
        for panel in panels:
            if panel.claim:
                assert panel.tables, panel.heading


def test_no_claim_of_the_comparison_is_left_out(tmp_path):
    result = samples.comparison()
    page = result.save(tmp_path / "x.html").read_text()
    text = " ".join("".join(Parts(page).text).split())
    for claim in result.claims:
        assert claim.claim in text
        assert re.sub(r"10\^(\d+)", r"10\1", claim.finding) in text, "the exponent is raised, in a sup"
        assert claim.limits in text
        assert claim.why in text
        assert claim.see in text
    assert [p.verdict for p in document(result).panels if p.claim] == [c.answer for c in result.claims]
    assert result.methods.split(".")[0] in text
    assert "CC BY 4.0" in text


def test_a_comparison_of_which_little_was_measured_still_is_a_page(tmp_path):
    from dataclasses import replace

    bare = replace(
        samples.comparison(),
        found={},
        split={},
        paths={},
        training=None,
        depths=(),
        surfaces={},
        importance={},
        strength={},
    )
    page = bare.save(tmp_path / "x.html").read_text()
    assert "not measured" in page


@pytest.mark.parametrize(
    ("sentence", "stressed"),
    [
        ("it shrinks by 12 decades over 31 boundaries", ["12 decades", "31 boundaries"]),
        ("at most 6, 95 % through 11.", ["6", "95 %", "11"]),
        ("> 200 steps, 1,797 images", ["> 200 steps", "1,797"]),
        ("grows 63-fold at layers.4.0 of resnet20", ["63-fold"]),
        ("1e-07 or 2.5x", ["1e-07", "2.5x"]),
        ("<b>7</b>", ["7"]),
    ],
)  # fmt: skip
def test_numbers_are_stressed_and_names_are_not(sentence, stressed):
    made = str(stress(sentence))
    assert [html.unescape(found) for found in re.findall(r"<b>(.*?)</b>", made)] == stressed
    assert html.unescape(re.sub(r"</?b>", "", made)) == sentence or "<b>" in sentence


def test_fragments_are_small_and_tell_the_answer():
    for result in RESULTS:
        fragment = result._repr_html_()
        assert len(fragment) < 400_000
        told = document(result)
        assert html.escape((told.answer or [told.title])[0], quote=False)[:30] in html.unescape(fragment) or (
            told.answer or [told.title]
        )[0][:30] in html.unescape(fragment)


def test_long_tables_are_cut_and_say_so(tmp_path):
    result = samples.flow(depth=1000, slope=0.001)
    page = result.save(tmp_path / "x.html").read_text()
    assert "600 more rows" in page
    assert np.isclose(
        ss.load(tmp_path / "x.html").boundaries[999].gradient_rms, result.boundaries[999].gradient_rms
    )


def test_a_word_of_the_glossary_carries_its_meaning_once_and_never_inside_a_tag():
    from skipscope.report._glossary import GLOSSARY, with_terms

    made = str(with_terms("Two branches and a branch lose 3 decades; <b>decade</b> by decade-long"))
    assert made.count("<abbr") == 2
    assert GLOSSARY["decade"] in made and "&lt;b&gt;" in made
    assert "decade-long" in made
    marked = str(with_terms(_page.stress("It falls 8.3 decades")))
    assert marked.count("<abbr") == 1 and "<b>8.3 <abbr" in marked


def test_every_meaning_is_short():
    from skipscope.report._glossary import GLOSSARY

    assert len(GLOSSARY) >= 12
    assert all(len(meaning.split()) <= 25 for meaning in GLOSSARY.values())


def test_a_page_carries_its_data_compressed_and_earlier_pages_are_read(tmp_path):
    result = samples.comparison()
    page = result.save(tmp_path / "x.html").read_text()
    kept = page.partition('id="skipscope-data">')[2].partition("</script>")[0]
    text = zlib.decompress(base64.b64decode(kept)).decode()
    assert dumps(ss.load(tmp_path / "x.html")) == text == dumps(result) and len(kept) < 0.6 * len(text)
    plain = text.replace("<", "\\u003c")
    old = page.replace("application/zlib", "application/json").replace(kept, plain)
    (tmp_path / "old.html").write_text(old)
    assert dumps(ss.load(tmp_path / "old.html")) == text
    for broken in (kept[:-40], kept[:100] + "*" + kept[101:], base64.b64encode(b"no").decode()):
        (tmp_path / "broken.html").write_text(page.replace(kept, broken))
        with pytest.raises(SkipscopeError, match="cut short"):
            ss.load(tmp_path / "broken.html")


def test_lines_leave_out_only_what_no_one_sees():
    generator = np.random.default_rng(0)
    points = [(2.0 * i, float(y)) for i, y in enumerate(100 + generator.normal(0, 3, 200).cumsum())]
    numbers = [float(n) for n in re.findall(r"-?(?:\d+\.?\d*|\.\d+)", _svg_lines._path(points))]
    places = np.cumsum(np.array(numbers).reshape(-1, 2), axis=0)
    assert len(places) < len(points)
    drawn = np.interp([x for x, _ in points], *places.T)
    steepest = max(abs(np.diff([y for _, y in points]))) / 2
    assert np.abs(drawn - [y for _, y in points]).max() < 0.6 * (1 + steepest)
