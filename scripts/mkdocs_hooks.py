"""What GitHub and Python-Markdown read differently in the docs, as the latter wants it."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    r"""A ``\|`` in the code of a table: GitHub needs the backslash, here it would be seen."""
    lines = markdown.split("\n")
    return "\n".join(_pipes(line) if line.startswith("|") else line for line in lines)


def _pipes(row: str) -> str:
    return re.sub("`[^`]*`", lambda code: code[0].replace(r"\|", "|"), row)


def on_page_content(html: str, **_: Any) -> str:
    """A flag or a name in a text stays on one line; browsers break at its hyphens."""
    return re.sub("<code>([^<]{1,26})</code>", r'<code class="short">\1</code>', html)
