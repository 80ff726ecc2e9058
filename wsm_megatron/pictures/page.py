"""One page that a person opens: everything in one file, nothing from anywhere else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from wsm_megatron.storage.durable import replace_file

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #f4f5f7; margin: 0; }
main { max-width: 1000px; margin: 0 auto; padding: 1.5rem; }
header { border-left: 6px solid #0072B2; padding-left: 1rem; margin-bottom: 1.5rem; }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .6rem; }
section { background: #fff; border-radius: 8px; padding: 1.1rem 1.3rem; margin-bottom: 1.2rem;
  box-shadow: 0 1px 3px rgb(0 0 0 / .12); }
figure { margin: .5rem 0; } figure svg { width: 100%; height: auto; display: block; }
figcaption, .note { color: #555; font-size: .9rem; }
.table { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .92rem; width: 100%; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #e3e5e8;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: #555; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
tr.chosen td { background: #e6f1f8; font-weight: 600; }
pre { background: #f4f5f7; padding: .7rem .9rem; border-radius: 6px; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .88rem; }
.warning { border-left: 5px solid #D55E00; padding: .3rem .8rem; background: #fdf1e9;
  overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
"""


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def picture(svg: str, caption: str) -> str:
    """An ``<svg>`` element with what it shows in words."""
    described = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
    return f"<figure>{described}<figcaption>{escape(caption)}</figcaption></figure>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], chosen: int | None = None) -> str:
    """Text in cells; one row may stand out."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    mark = ' class="chosen"'
    body = "".join(
        f"<tr{mark if n == chosen else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for n, row in enumerate(rows)
    )
    return f'<div class="table"><table><thead><tr>{top}</tr></thead>{body}</table></div>'


def listing(pairs: Iterable[tuple[str, str]]) -> str:
    inside = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs)
    return f"<dl>{inside}</dl>"


def code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def write_page(path: Path, title: str, subtitle: str, sections: Sequence[str]) -> None:
    """Write the page, whole or not at all."""
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        f"<header><h1>{escape(title)}</h1>{paragraph(subtitle)}</header>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page.encode())
