"""Rewrites what docstrings share with Sphinx, roles and ``::``, as Markdown for mkdocstrings."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|attr|mod):`([^`]+)`")
_PUBLIC = re.compile(r"vblora(?:\.serving|\.integrations\.\w+)?\.\w+")


def as_markdown(text: str, path: str) -> str:
    """The docstring of the object at ``path`` as Markdown."""

    def link(role: re.Match[str]) -> str:
        name = role[1].lstrip("~")
        if "." not in name:  # relative to the class or module that the docstring is in
            return f"`{name}`"
        return f"[`{name}`][{name}]" if _PUBLIC.match(name) else f"`{name}`"

    text = _ROLE.sub(link, text)
    return re.sub(r"::\n\n", ":\n\n", text)


class MarkdownDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, obj.path)
