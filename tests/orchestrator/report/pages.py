"""A report as a browser takes it apart."""

import base64
import json
from html.parser import HTMLParser
from typing import Any

import numpy as np


class ParsedPage(HTMLParser):
    """`elements` are all tags in order, `scripts` the raw content of each script, `texts` that of everything else."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._open = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] += data
        elif data.strip():
            self.texts.append(data.strip())

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def unpack(text: str, heads: int, size: int, scale: int) -> np.ndarray:
    """Patterns [head, query, key] from the page's packed lower triangles."""
    entries = np.frombuffer(base64.b64decode(text), "<u2").reshape(heads, -1) / scale
    pattern = np.zeros((heads, size, size))
    position = 0
    for query in range(size):
        for key in range(query + 1):
            pattern[:, query, key] = entries[:, position]
            position += 1
    assert position == entries.shape[1]
    return pattern
