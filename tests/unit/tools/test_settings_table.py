"""The READMEs' table of settings is replaced in place; test_readmes.py checks that it is current."""

from __future__ import annotations

import pytest

from tools import settings_table


def test_the_table_replaces_what_is_between_the_marks_and_nothing_else() -> None:
    text = "before\n<!-- settings -->\nan old table\n<!-- /settings -->\nafter\n"

    written = settings_table.with_table(text)

    assert written == f"before\n<!-- settings -->\n{settings_table.markdown_table()}\n<!-- /settings -->\nafter\n"
    assert settings_table.with_table(written) == written


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="marks"):
        settings_table.with_table("# A README\n")
