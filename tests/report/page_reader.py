"""A reader of pages that refuses what a browser would have to guess at."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input", "col", "source", "base"}
LOADS = {"src", "srcset", "href", "xlink:href", "data", "poster", "action", "formaction", "background", "cite"}


class Page(HTMLParser):
    """Parses a page and raises AssertionError unless it is well-formed and complete in itself.

    Attributes:
        text: all text outside script and style.
        tags: how often each element occurs.
        values: (data-x, data-y, cells) of every row that has a place in a chart.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.uses: list[str] = []
        self.tags: dict[str, int] = {}
        self.text, self.css, self.script = "", "", ""
        self.values: list[tuple[float, float, list[str]]] = []
        assert text.startswith("<!doctype html>")
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        assert len(self.ids) == len(set(self.ids)), "an id occurs twice"
        missing = [use for use in self.uses if use not in self.ids]
        assert not missing, f"no such id: {missing}"
        for found in re.findall(r"@import|url\(([^)]*)\)|src\s*=", self.css):
            assert found.startswith("#"), f"style loads {found}"
        for word in ("fetch(", "XMLHttpRequest", "import(", "WebSocket", "sendBeacon", ".src"):
            assert word not in self.script

    def handle_starttag(self, tag, attributes):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attributes:
            value = value or ""
            assert not name.startswith("on"), f"{tag} runs {value}"
            if name == "id":
                self.ids.append(value)
            elif name in LOADS:
                assert value.startswith(("#", "data:image/png;base64,")), f"{tag} loads {value}"
                self.uses += [value[1:]] * value.startswith("#")
            for use in re.findall(r"url\(([^)]*)\)", value):
                assert use.startswith("#"), f"{tag} loads {use}"
                self.uses.append(use[1:])
        found = dict(attributes)
        if tag == "tr" and "data-x" in found:
            self.values.append((float(found["data-x"]), float(found["data-y"]), []))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "style":
            self.css += data
        elif inside == "script":
            self.script += data
        else:
            self.text += data
            if inside == "td" and "details" in self.open and self.values:
                self.values[-1][2].append(data)
