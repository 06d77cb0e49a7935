"""The Chinese README has the same headings, code, links, tables and lists as the English one.

The first difference is reported with its heading.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import pytest

from tools.settings_table import markdown_table

ROOT = Path(__file__).parents[2]
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README_zh.md").read_text(encoding="utf-8")
OTHER_LANGUAGE = {"README.md", "README_zh.md"}

_BLOCK = re.compile(r"^```\w*\n.*?^```$", re.MULTILINE | re.DOTALL)
_GENERATED = re.compile(r"<!-- settings -->.*?<!-- /settings -->", re.DOTALL)


def sections(text: str) -> list[tuple[str, str]]:
    """Return each heading and its text; a comment in a code block is not a heading."""
    parts = re.split(r"(^```\w*\n.*?^```$|^#+ [^\n]*$)", text, flags=re.MULTILINE | re.DOTALL)
    found: list[tuple[str, str]] = []
    for part in parts:
        if re.match(r"#+ ", part):
            found.append((part, ""))
        elif found:
            found[-1] = (found[-1][0], found[-1][1] + part)
    return found


def levels(section: tuple[str, str]) -> list[str]:
    return [section[0].split(" ")[0]]


def code_blocks(section: tuple[str, str]) -> list[str]:
    return [line for block in _BLOCK.findall(section[1]) for line in block.splitlines()]


def _prose(section: tuple[str, str]) -> str:
    return _GENERATED.sub("", _BLOCK.sub("", section[1]))


def links(section: tuple[str, str]) -> list[str]:
    return sorted(
        link for link in re.findall(r"\]\(([^)]+)\)|<(https?:[^>]+)>", _prose(section)) for link in link if link
    )


def code_spans(section: tuple[str, str]) -> list[str]:
    """Return the variables, routes, commands and values that are named under the heading, once each."""
    return sorted(set(re.findall(r"`([^`\n]+)`", _prose(section))))


def table_rows(section: tuple[str, str]) -> list[str]:
    """Return the first cell of each row."""
    cells = re.findall(r"^\| ([^|]*) \|.*$", _prose(section), re.MULTILINE)
    return [cell if cell.startswith("`") else "(heading)" for cell in cells]


def list_items(section: tuple[str, str]) -> list[str]:
    return re.findall(r"^(?:\d+\.|-) ", _prose(section), re.MULTILINE)


def first_difference(english: str, chinese: str, read: Callable[[tuple[str, str]], list[str]]) -> str:
    """Return a description of the first difference; an empty text if there is none."""
    for one, other in zip_longest(sections(english), sections(chinese), fillvalue=("(nothing)", "")):
        left, right = ([item for item in read(section) if item not in OTHER_LANGUAGE] for section in (one, other))
        if left == right:
            continue
        missing = next((item for item in left if item not in right), None)
        extra = next((item for item in right if item not in left), None)
        return f"{one[0]} / {other[0]}: README_zh.md lacks {missing!r}, and has {extra!r}: {len(left)} / {len(right)}"
    return ""


@pytest.mark.parametrize("read", [levels, code_blocks, links, code_spans, table_rows, list_items])
def test_the_chinese_readme_has_what_the_english_one_has(read: Callable[[tuple[str, str]], list[str]]) -> None:
    assert first_difference(ENGLISH, CHINESE, read) == ""


def test_both_readmes_have_the_generated_table_of_settings() -> None:
    for text in (ENGLISH, CHINESE):
        assert f"<!-- settings -->\n{markdown_table()}\n<!-- /settings -->" in text, "run `make docs`"


def test_each_readme_links_to_the_other_at_its_top() -> None:
    assert "](README_zh.md)" in "".join(ENGLISH.splitlines()[:4])
    assert "](README.md)" in "".join(CHINESE.splitlines()[:4])


LEFT = """\
# Name

## Start

1. See [the guide](docs/guide.md).
2. Set `ONE`.

| Variable | Meaning |
| --- | --- |
| `ONE` | A number. |

```sh
# No heading
make test
```
"""
RIGHT = LEFT.replace("Start", "开始").replace("Variable | Meaning", "变量 | 含义").replace("A number.", "一个数。")


@pytest.mark.parametrize(
    ("read", "change", "difference"),
    [
        (levels, ("## ", "### "), "### Start / ## 开始: README_zh.md lacks '###', and has '##': 1 / 1"),
        (levels, ("## Start", "Start"), "(nothing) / ## 开始: README_zh.md lacks '(nothing)', and has '##'"),
        (code_blocks, ("make test", "make tests"), "lacks 'make tests', and has 'make test': 4 / 4"),
        (links, ("docs/guide.md", "docs/start.md"), "lacks 'docs/start.md', and has 'docs/guide.md': 1 / 1"),
        (code_spans, ("`ONE`", "`TWO`"), "lacks 'TWO', and has None: 2 / 1"),
        (table_rows, ("| `ONE` |", "| `TWO` |"), "lacks '`TWO`', and has '`ONE`'"),
        (list_items, ("\n2. Set", "\nSet"), "lacks None, and has '2. ': 1 / 2"),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_the_first_difference_is_reported(
    read: Callable[[tuple[str, str]], list[str]], change: tuple[str, str], difference: str
) -> None:
    assert first_difference(LEFT, RIGHT, read) == ""
    assert difference in first_difference(LEFT.replace(*change, 1), RIGHT, read)


def test_the_readmes_are_compared_section_by_section() -> None:
    assert len(sections(ENGLISH)) == len(re.findall(r"^#+ ", _BLOCK.sub("", ENGLISH), re.MULTILINE)) > 1
