"""Writes the table of the worker's own settings into the READMEs, made from their declarations.

    python -m tools.settings_table README.md README_zh.md

The table is between the marks `<!-- settings -->` and `<!-- /settings -->` of each file.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from engine.config.settings import Settings, allowed

_MARKED = re.compile(r"(<!-- settings -->\n).*?(<!-- /settings -->)", re.DOTALL)


def markdown_table() -> str:
    """Return all settings as a Markdown table: variable, default, allowed values, meaning."""
    rows = ["| Variable | Default | Allowed | Meaning |", "| --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, frozenset()) else f"`{field.default}`"
        default = default.lower() if isinstance(field.default, bool) else default
        rows.append(f"| `{name.upper()}` | {default} | {allowed(name)} | {field.description} |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    """Return a README's text with the current table between its marks.

    Raises:
        ValueError: the marks are missing.
    """
    if not _MARKED.search(text):
        raise ValueError("there are no <!-- settings --> marks")
    return _MARKED.sub(lambda match: f"{match[1]}{markdown_table()}\n{match[2]}", text)


def main() -> None:
    """Rewrite the files that the command line names."""
    for path in map(Path, sys.argv[1:]):
        path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
