"""Builds the page of a report: takes plain values, returns one HTML text that needs no other file.

Texts of models and data are embedded as JSON, which a browser does not run, with every `<` escaped. A content security
policy allows the page's own two scripts and its style, by their hashes, and nothing else.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
SCRIPTS = ("page.js", "charts.js", "examples.js", "trees.js")
"""The page's own scripts, joined into one in this order."""


def assemble(report: Mapping[str, Any], trees: Iterable[str], title: str) -> str:
    """Assembles the page from a report and its trees, each as JSON that the page reads when it is viewed."""
    chart = (FOLDER / "chart.umd.min.js").read_text().partition("//# sourceMappingURL")[0]
    script, style = "\n".join((FOLDER / name).read_text() for name in SCRIPTS), (FOLDER / "page.css").read_text()
    pieces = {
        "title": html.escape(title),
        "policy": policy((chart, script), style),
        "css": style,
        "chart": chart,
        "js": script,
        "report": embedded(as_json(report)),
        "trees": "\n".join(
            f'<script type="application/json" id="tree-{number}">{embedded(tree)}</script>'
            for number, tree in enumerate(trees)
        ),
    }
    # One pass, so that inserted text is not searched for placeholders.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: pieces[match[1]], (FOLDER / "page.html").read_text())


def policy(scripts: Iterable[str], style: str) -> str:
    """Returns what the page may load and run: its own scripts and style, and data from the server it came from."""
    allowed = " ".join(map(_digest, scripts))
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_digest(style)}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def embedded(text: str) -> str:
    """Escapes JSON for an HTML script element, which only `<` could end."""
    return text.replace("<", "\\u003c")


def as_json(value: Any) -> str:
    """Encodes a value as ASCII JSON, with null for numbers that are not finite, which JSON does not have."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
