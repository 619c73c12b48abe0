"""Text of models, files, clients and Variables cannot control a terminal or forge a line of a log."""

from __future__ import annotations

import ast
import io
import json
import logging
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.live import Live
from rich.table import Table
from rich.text import Text

from router.cli.output import SafeConsole, SafeStream
from router.errors import MAX_ECHOED, PrintableRecords, echoed, printable, printable_json

ROOT = Path(__file__).parents[2]
OSC_52 = "\x1b]52;c;ZXZpbA==\x07"  # would write the clipboard
LINK = "\x1b]8;;https://evil.example\x07click\x1b]8;;\x07"
HOSTILE = {
    "OSC 52": OSC_52,
    "OSC 52 in C1": "\x9d52;c;ZXZpbA==\x9c",
    "a link": LINK,
    "CSI": "\x1b[2J\x1b[1;1H",
    "CSI in C1": "\x9b2J",
    "DCS": "\x1bP$q\x1b\\",
    "a return over the line": "refused\rallowed",
    "backspaces": "no\b\byes",
    "reversed text": "\u202eexe.txt\u202c",
    "isolates": "\u2066a\u2069",
    "invisible letters": "ad\u200bmin\ufeff\u2060",
    "a tag": "a\U000e0041",
    "other lines": "a\u2028b\u2029c\x0bd\x0ce\x85f",
    "half a character": "\udc9b",
}
CONTROLS = ("Cc", "Cf", "Zl", "Zp", "Cs")
VISIBLE = {"ARABIC", "SYRIAC", "KAITHI", "EGYPTIAN"}  # marks of format that are drawn


def is_control(character: str) -> bool:
    if character in "\n\t" or unicodedata.category(character) not in CONTROLS:
        return False
    return unicodedata.name(character, "").split(" ")[0] not in VISIBLE


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_nothing_that_controls_a_terminal_is_left(text: str):
    assert not any(map(is_control, printable(text)))


def test_every_control_and_format_character_of_unicode_is_replaced_and_no_letter():
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        name = unicodedata.name(character, "")
        if is_control(character) or name == "ARABIC LETTER MARK":
            assert printable(f"a{character}") == "a\N{REPLACEMENT CHARACTER}", hex(code)
        elif unicodedata.category(character)[0] in "LMNPS":
            assert printable(character) == character, hex(code)


@pytest.mark.parametrize(
    "text",
    ["plain\n\ttext", "\u0645\u06cc\u200c\u0631\u0648\u0645", "\U0001f468\u200d\U0001f469", "naïve 日本語"],
)
def test_texts_of_people_stay_as_they_are(text: str):
    assert printable(text) == text


@given(st.text())
def test_once_printable_stays_printable(text: str):
    assert printable(printable(text)) == printable(text)
    assert "\n" not in printable(text, one_line=True)


@given(st.text(alphabet=st.characters(codec=None), max_size=2000))
def test_an_error_repeats_at_most_300_printable_characters(text: str):
    shown = echoed(text)
    assert not any(map(is_control, shown))
    assert len(shown) <= MAX_ECHOED + len("...'\"")


@given(st.text())
def test_json_loses_nothing_and_controls_nothing(text: str):
    written = printable_json({"answer": text})
    assert json.loads(written) == {"answer": text}
    assert not any(map(is_control, written))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_console_lets_no_text_control_it(text: str):
    file = io.StringIO()
    console = SafeConsole(file=file, force_terminal=True, width=200, _environ={"TERM": "xterm-256color"})
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text, Text(text, style="bold red"))
    for shown in (text, Text(text), table, f"[link=https://evil.example]{text}[/link]"):
        console.print(shown)
        with Live(shown, console=console, auto_refresh=False) as live:
            print(text)  # noqa: T201 - which a live display reads as styled text
            live.refresh()
    written = file.getvalue()
    for sequence in ("\x1b]", "\x1bP", "\x9d", "\x9b", "\b", "\u202e", "\u200b", "\udc9b"):
        assert sequence not in written
    assert "\x1b[2J" not in written
    assert "[link=" in written, "texts are not markup"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_guarded_stream_lets_no_text_control_it(text: str):
    file = io.StringIO()
    print(text, file=SafeStream(file))
    assert not any(map(is_control, file.getvalue()))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_line_of_the_log_is_one_printable_line(text: str):
    log = logging.getLogger("router.test_printable")
    file = io.StringIO()
    handler = logging.StreamHandler(file)
    logging.root.addHandler(handler)
    try:
        log.warning("rejected: %s", f"{text}\n2026-01-01 INFO forged")
        try:
            raise ValueError(text)  # noqa: TRY301
        except ValueError:
            log.exception("failed")
    finally:
        logging.root.removeHandler(handler)
    written = file.getvalue()
    assert not any(map(is_control, written))
    assert written.splitlines()[0].endswith("2026-01-01 INFO forged")


def test_the_logger_of_the_router_has_the_handler():
    assert any(isinstance(one, PrintableRecords) for one in logging.getLogger("router").handlers)


# Programs that speak to the router over a pipe, and data that is written into a file or pipe.
WRITERS = {
    "router/classification/process.py", "router/knowledge/indexer.py", "router/queue/export.py",
    "router/cli/output.py", "local/process_guard.py",
}  # fmt: skip


AROUND = ("print(", "Console(", "sys.stdout.", "sys.stderr.", "sys.__std", "os.write(1", "os.write(2")


def writes(source: str) -> list[str]:
    """Returns the calls that may write a variable text to a terminal without `printable`."""
    around = AROUND if "from rich" in source else tuple(text for text in AROUND if text != "Console(")
    harmless = ("sys.stdout.isatty(", "sys.stderr.isatty(", "sys.stdout.flush(", "print('")
    calls = [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    around = (*around, "_unguarded(")
    return [
        call for call in calls
        if call.startswith(around) and not call.startswith(harmless) and "printable(" not in call
    ]  # fmt: skip


@pytest.mark.parametrize("folder", ["router", "plugins", "dags", "models_backend", "local"])
def test_nothing_writes_around_the_guarded_streams(folder: str):
    found = {
        str(path.relative_to(ROOT)): written
        for path in (ROOT / folder).rglob("*.py")
        if (written := writes(path.read_text()))
    }
    assert {name: lines for name, lines in found.items() if name not in WRITERS} == {}
