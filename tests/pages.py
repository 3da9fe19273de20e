"""Reading the pages that minilora writes, strictly."""

from html.parser import HTMLParser

from minilora.utils.html import POLICY

EMPTY = {"meta"}  # elements without an end
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "main", "section", "div", "p", "h1", "h2", "small", "b", "i"),
    *("span", "code", "pre", "mark", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "figure"),
    *("figcaption", "svg", "line", "text", "polyline", "circle"),
}


class Page(HTMLParser):
    """A page's elements; raises AssertionError for one that is not balanced, or that could run or fetch something."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # (element, text)
        self.source = source
        assert source.startswith("<!doctype html>\n")
        assert "url(" not in source
        assert "@import" not in source
        self.feed(source)
        self.close()
        assert not self.open
        assert ("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}) in self.elements

    def handle_starttag(self, tag, attrs):
        attributes = {key: value or "" for key, value in attrs}
        assert tag in ALLOWED, tag
        assert not attributes.keys() & {"src", "href", "srcset", "action", "xlink:href"}, attributes
        assert not [key for key in attributes if key.startswith("on")], attributes
        self.elements.append((tag, attributes))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open:
            self.texts.append((self.open[-1], text))

    @property
    def text(self) -> str:
        """All that can be read."""
        return " ".join(text for element, text in self.texts if element not in ("style", "title"))

    def of(self, *elements: str) -> list[str]:
        """The texts directly inside these elements."""
        return [text for element, text in self.texts if element in elements]

    def attributes(self, element: str) -> list[dict[str, str]]:
        """The attributes of each such element."""
        return [attributes for name, attributes in self.elements if name == element]
