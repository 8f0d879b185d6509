"""Pages that open from a file: a template with styles and scripts of its own, and what is written into it.

Texts, keys, labels and settings may be a stranger's. None of them becomes markup: values reach a page escaped, or as
JSON in which no character can end the element and which its script shows as text. A Content-Security-Policy in the page
lets nothing be fetched and no script run but ours, which it names by hash.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any


def read_part(name: str) -> str:
    """A file of this package: a template, a style sheet or a script."""
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def template(name: str) -> str:
    """The template of a page: the head that all share, and a body of its own."""
    return read_part("head.html") + read_part(f"{name}.html")


def json_text(value: Any) -> str:
    """JSON for a script element: with `<`, `>` and `&` as escapes, so that nothing in it ends the element.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def data_element(name: str, content: str, kind: str = "text/plain") -> str:
    """An element that holds text for the page's script, under an id.

    Args:
        name: the id.
        content: base64, or what `json_text` gave: without `<`.
        kind: its type; browsers run none of them.
    """
    return f'<script type="{kind}" id="{name}">{content}</script>\n'


def fill_page(template: str, parts: Mapping[str, str], style: str, script: str = "") -> str:
    """Put parts into the places `{{name}}` of a template, each of which stands there once.

    Args:
        template: with `{{policy}}`, `{{style}}`, `{{script}}` and a place for each part.
        parts: markup that is safe as it is.
        style: the style sheet.
        script: the only one that the page may run.

    Returns:
        The page. What stands in one part is never taken for the place of another.
    """
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; base-uri 'none'; form-action 'none'"
    if script:
        policy += f"; script-src '{_hash(script)}'"
    values = {"policy": policy, "style": style, "script": script, **parts}
    pieces = template.split("{{")
    page = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        page += [values[name], rest]
    return "".join(page)


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
