"""Links from the documentation to files of the repository, so that the built site has them as a checkout does.

In: Markdown with links such as `[dpo](../itool_jax/training/losses.py#dpo)`, a path and the name of what is defined
there. Out: a page of the site for each file that is linked, and links to the line of the definition in it.
"""

import ast
import functools
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\[(?P<text>[^\]\n]+)\]\((?P<path>[^)#\s:]*)(?:#(?P<name>[^)\s]*))?\)")
CODE = re.compile(r"^(```+).*?^\1$|``.+?``|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", "run": "bash"}
FENCE = "`" * 8


class Link(NamedTuple):
    """A link of a page: the file it goes to, as a path in the repository, and what is named behind the #."""

    path: str
    name: str
    start: int
    end: int
    """Where the target stands in the text."""


def links(text: str, page: str) -> list[Link]:
    """The links of a page to files, those in code and to other sites left out."""
    code = [match.span() for match in CODE.finditer(text)]
    page_links = []
    for match in LINK.finditer(text):
        inside = any(start < match.start("path") < end for start, end in code)
        if match["path"] and not inside:
            path = posixpath.normpath(posixpath.join(posixpath.dirname(page), match["path"]))
            page_links.append(Link(path, match["name"] or "", match.start("path"), match.end() - 1))
    return page_links


@functools.cache
def definitions(path: str) -> dict[str, int]:
    """The line of each function, class, method (`Class.method`) and constant of a Python file."""
    lines: dict[str, int] = {}
    for name, node in _defined(ast.parse((ROOT / path).read_text(encoding="utf-8")), ""):
        lines.setdefault(name, node.lineno)
    return lines


def _defined(tree: Any, head: str) -> Iterator[tuple[str, ast.stmt]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield head + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from _defined(node, f"{head}{node.name}.")
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name):
                yield head + target.id, node


def faults(text: str, page: str) -> list[str]:
    """What is wrong with the links of a page to files of the repository, a line each."""
    messages = []
    for link in links(text, page):
        if not (ROOT / link.path).is_file():
            messages.append(f"{page}: {link.path} is no file")
        elif link.path.endswith(".py") and link.name and link.name not in definitions(link.path):
            messages.append(f"{page}: {link.path} defines no {link.name}")
    return messages


def place(path: str) -> str:
    """Where a file of the repository stands in the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def rewritten(text: str, page: str) -> str:
    """The page with its links as the site needs them."""
    for link in reversed(links(text, page)):
        target = posixpath.relpath(place(link.path), posixpath.dirname(place(page)) or ".")
        name = link.name
        if link.path.endswith(".py") and name:
            name = f"__codelineno-0-{definitions(link.path)[name]}"
        text = text[: link.start] + target + (f"#{name}" if name else "") + text[link.end :]
    return text


def source_page(path: str) -> str:
    """A file of the repository as a page, which the search of the site leaves out."""
    content = (ROOT / path).read_text(encoding="utf-8")
    head = f"---\ntitle: {path}\nsearch:\n  exclude: true\n---\n\n"
    if path.endswith(".md"):
        return head + content
    language = LANGUAGES.get(Path(path).suffix or Path(path).name, "text")
    return f'{head}# {path}\n\n{FENCE}{language} linenums="1"\n{content.rstrip()}\n{FENCE}\n'


def on_files(files: Any, config: Any) -> Any:
    """Adds a page for each file that the pages link to, and for those that these link to."""
    from mkdocs.structure.files import File

    pages = [file for file in files if file.is_documentation_page()]
    waiting = [link.path for page in pages for link in links(page.content_string, f"docs/{page.src_uri}")]
    while waiting:
        path = waiting.pop()
        if path.startswith("docs/") or files.get_file_from_path(place(path)) or not (ROOT / path).is_file():
            continue
        files.append(File.generated(config, place(path), content=source_page(path)))
        if path.endswith(".md"):
            waiting += [link.path for link in links(source_page(path), path)]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites the links of a page; raises ValueError where one goes nowhere."""
    where = page.file.src_uri
    where = f"docs/{where}" if not where.startswith("source/") else where.removeprefix("source/")
    if where.endswith((".py.md", ".sh.md", ".yaml.md", ".toml.md")):
        return markdown
    if bad := faults(markdown, where):
        raise ValueError("; ".join(bad))
    return rewritten(markdown, where)
