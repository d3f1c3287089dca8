"""A reader of HTML pages that finds what is not whole."""

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Reader(HTMLParser):
    """Checks that tags close in order, and collects ids, references, attributes and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.references, self.requests, self.text, self.labels = (
            [],
            [],
            [],
            [],
            [],
            [],
        )
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href") and value.startswith("#"):
                self.references.append(value[1:])
            elif name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.requests.append(value)
            if name == "aria-label":
                self.labels.append(value)
            self.references += re.findall(r"url\(#([^)]*)\)", value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)
