"""The verb `router ask`: one prompt answered now, and shown while it is under way."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.text import Text

from router.answering import Answer, Event, EventKind
from router.cli import terminal
from router.errors import InputError
from router.task import AnswerRank

if TYPE_CHECKING:
    from router.answering import Router

GRACE_SECONDS = 1.0  # for calls that can bring no better answer, so that their cost is known
ASK_HELP = """
Answer one prompt now.

The model that is best for the prompt's category and a fallback are asked at once. What happens is told on
standard error as it happens; the answer goes to standard output. If it is not the best model's, a better one
that comes later is shown too: Ctrl-C ends the waiting. PROMPT - reads standard input.

\b
Examples:
  router ask "Why is the sky blue?"
  router ask --category technical --deadline 10 "Explain this regex: ^a+$"
  router ask --model phi-4 - < prompt.txt
  router ask --json "Why is the sky blue?" | jq -r .answer

\b
--json prints one object: answer, model (null: passages), rank (passages, fallback_model, chosen_model),
provisional, is_fallback, category, confidence, reason, preferred, fallback, seconds, cost_usd, prompt_tokens,
completion_tokens, sources, task_id (null: not logged), calls (call_id, model, role, rank, started_seconds,
sent_seconds, ended_seconds, outcome, error, cost_usd, prompt_tokens, completion_tokens), and late: the better
answer that came within --late, with the same keys, or null.
"""
_STYLES = {EventKind.TROUBLE: "yellow", EventKind.ANSWERED: "green", EventKind.LATE: "green"}


@dataclasses.dataclass(frozen=True)
class _Asked:
    prompt: str
    options: dict[str, Any]
    late_seconds: float | None  # None: as long as the config says
    as_json: bool
    config: Path


def ask(
    prompt: Annotated[str, typer.Argument(help="What is to be answered; - reads standard input.")],
    *,
    category: Annotated[
        Optional[str],  # noqa: UP045 - typer evaluates it at run time, also on 3.10
        typer.Option(help="The prompt's category; left out, the router finds it."),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045 - as above
        typer.Option(help="Ask this model, and no other."),
    ] = None,
    deadline: Annotated[
        Optional[float],  # noqa: UP045 - as above
        typer.Option(metavar="SECONDS", help="When there must be an answer; left out, the category's."),
    ] = None,
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045 - as above
        typer.Option(metavar="N", help="The longest answer, in tokens."),
    ] = None,
    late: Annotated[
        Optional[float],  # noqa: UP045 - as above
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="How long to wait for a better answer after a provisional one; left out, as the config says,"
            " with --json not at all.",
        ),
    ] = None,
    as_json: terminal.Json = False,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
) -> None:
    options = {
        "category": category, "model": model, "deadline_seconds": deadline, "max_tokens": max_tokens
    }  # fmt: skip
    if late is None and as_json:
        late = 0.0
    asyncio.run(_ask(_Asked(prompt, options, late, as_json, config)))


async def _ask(asked: _Asked) -> None:
    # Not at the top: it takes a second, and every other verb would wait for it.
    from router.answering import Router  # noqa: PLC0415

    router = Router.from_config(asked.config)
    prompt = (
        _standard_input(router.config.answering.max_prompt_bytes) if asked.prompt == "-" else asked.prompt
    )
    try:
        answer = await router.answer(prompt, on_event=None if asked.as_json else _tell, **asked.options)
        if not asked.as_json:
            _show(answer)
        better = await _late(router, answer, asked)
        if asked.as_json:
            typer.echo(terminal_json(answer, better))
            sys.stdout.flush()
    finally:
        await router.close(grace_seconds=GRACE_SECONDS)


def _standard_input(most_bytes: int) -> str:
    content = sys.stdin.buffer.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise InputError(
            f"Standard input holds more than {most_bytes} bytes, the longest prompt. Shorten it."
        )
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"Standard input is no UTF-8 text, at byte {error.start + 1}.") from error


async def _late(router: Router, answer: Answer, asked: _Asked) -> Answer | None:
    """The best answer that came later, within the time; each is shown when it comes."""
    seconds = router.config.answering.late_seconds if asked.late_seconds is None else asked.late_seconds
    end = time.monotonic() + seconds
    best: Answer | None = None
    while better := await router.late(best or answer, seconds=end - time.monotonic()):
        best = better
        if not asked.as_json:
            _show(better)
    return best


def _tell(event: Event) -> None:
    line = Text(f"{event.seconds:7.2f} s  ", style="dim")
    line.append(event.text, style=_STYLES.get(event.kind, "default"))
    terminal.err().print(line, soft_wrap=True)


def _show(answer: Answer) -> None:
    giver = answer.model or "knowledge"
    kind = answer.rank.name.lower().replace("_", " ")
    words = [f"{giver} ({kind})", f"{answer.seconds:.2f} s", f"${answer.cost_usd:.6f}"]
    if answer.late:
        words.insert(0, "late")
    words.append("not logged" if answer.task_id is None else f"task {answer.task_id}")
    if answer.sources and answer.rank is AnswerRank.PASSAGES:
        words.append(f"from {', '.join(answer.sources)}")
    if answer.provisional:
        words.append("a better answer may come")
    terminal.err().print(Text(f"{'-' * 9}  {' · '.join(words)}", style="bold"), soft_wrap=True)
    typer.echo(answer.text)


def terminal_json(answer: Answer, late: Answer | None) -> str:
    """The one object of `--json`."""
    return terminal.as_json({**_object(answer), "late": _object(late) if late else None})


def _object(answer: Answer) -> dict[str, Any]:
    found = dataclasses.asdict(answer)
    found.pop("late")
    text = found.pop("text")
    found["rank"] = answer.rank.name.lower()
    found["is_fallback"] = answer.rank is not AnswerRank.CHOSEN_MODEL
    for call, logged in zip(answer.calls, found["calls"], strict=True):
        logged.update(
            call_id=str(call.call_id),
            role=call.role.value,
            rank=call.rank.name.lower(),
            outcome=call.outcome.value if call.outcome else None,
        )
    return {"answer": text, **found}
