"""Equations as MathML, which browsers show by themselves: no script, no font, nothing from the network.

In: a page on which pymdownx.arithmatex marked the LaTeX between dollars. Out: the page with MathML there.
"""

import html
import re
from typing import Any

MARKED = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """The content of a page, its equations turned into MathML."""
    from latex2mathml.converter import convert

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        mathml = convert(html.unescape(match[3]).strip(), display=display)
        if "\\" in mathml:  # a command that it does not know stays as it is
            raise ValueError(f"equation holds a command that has no MathML here: {match[3].strip()}")
        return mathml

    return MARKED.sub(mathml, content)
