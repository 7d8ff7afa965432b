"""iTool in JAX: teaches language models to call tools by learning from their own mistakes.

    model = itool_jax.load("embedded")          # or a model folder, a GGUF file, a hub name, a run
    answer = model.generate("play a song", tools)
    tree = model.search({"messages": messages, "tools": tools, "target": "[play(song=1)]"})

The names exported here are the public API; `python -m itool_jax.main --help` shows the command line. JAX is imported
when one of the names is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from itool_jax.api import Model, Score, SearchTree, load

__all__ = ["Model", "Score", "SearchTree", "__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("itool_jax.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
