"""The options of the command line: each command offers those that have an effect on it."""

from __future__ import annotations

import pytest

from deploy import __main__ as command_line

COMMANDS = {
    "up": ("up", "org/tiny"),
    "update": ("update", "tiny"),
    "rollback": ("rollback", "tiny"),
    "status": ("status", "tiny"),
    "logs": ("logs", "tiny"),
    "down": ("down", "tiny", "--yes"),
}
OFFERED_BY = {
    ("--dry-run",): {"up", "update", "rollback", "down"},
    ("--timeout", "5"): {"up", "update", "rollback"},
    ("--type", "queue"): {"up"},
    ("--image", "x/y:2"): {"up", "update"},
    ("--env", "A=1"): {"up", "update"},
    ("--unset", "A"): {"update"},
    ("--api-url", "http://127.0.0.1:9"): set(COMMANDS),
}


@pytest.mark.parametrize("option", OFFERED_BY)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_offers_an_option_only_where_it_has_an_effect(
    command: str, option: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    async def run(*_: object) -> None:
        ran.append(command)

    monkeypatch.setattr(command_line, "_run", run)

    if command in OFFERED_BY[option]:
        assert command_line.main([*COMMANDS[command], *option]) == 0
        assert ran == [command]
    else:
        with pytest.raises(SystemExit, match="2"):
            command_line.main([*COMMANDS[command], *option])
        assert f"unrecognized arguments: {' '.join(option)}" in capsys.readouterr().err


def test_an_update_does_not_take_the_image_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(command_line.IMAGE_VARIABLE, "x/y:9")
    parser = command_line._parser()

    assert parser.parse_args(["up", "org/tiny"]).image == "x/y:9"
    assert parser.parse_args(["update", "tiny"]).image is None


@pytest.mark.parametrize(
    ("given", "volumes"),
    [([], None), (["--volume", "a", "--volume", "b"], ("a", "b")), (["--no-volume"], ())],
)
def test_no_volume_is_another_thing_than_none_given(given: list[str], volumes: tuple[str, ...] | None) -> None:
    arguments = command_line._parser().parse_args(["update", "tiny", *given])

    assert command_line._options(arguments).volumes == volumes
