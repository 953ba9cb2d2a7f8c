"""Reads the tables of a page."""

from html.parser import HTMLParser


class Tables(HTMLParser):
    """The cells of every table of a page by the table's id, and the addresses that the page links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: dict[str, list[list[str]]] = {}
        self.sources: list[str] = []
        self._rows: list[list[str]] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.sources += [address for name, address in attrs if name in {"src", "href"} and address]
        if tag == "table":
            self._rows = self.cells[known.get("id") or ""] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in {"td", "th"}:
            self._inside = True
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag not in {"td", "th"}

    def handle_data(self, data: str) -> None:
        if self._inside:
            self._rows[-1][-1] += data
