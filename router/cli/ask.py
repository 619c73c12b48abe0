"""`router ask`: answers one prompt now and shows the progress."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from router.answering import Answer, Event, EventKind
from router.cli import terminal
from router.cli.output import write_data
from router.errors import InputError
from router.task import AnswerRank

if TYPE_CHECKING:
    from router.answering import Router

GRACE_SECONDS = 1.0  # lets calls that are no longer needed end, so that their cost is known
ASK_HELP = """
Answer one prompt now.

Calls the best model for the prompt's category and a fallback in parallel. Progress goes to standard error,
the answer to standard output. After a provisional answer the command waits for a better one and shows it;
Ctrl-C stops the wait. If no model answered, the exit code is 1, and the output is retrieved passages or
nothing.

\b
Examples:
  router ask "Why is the sky blue?"
  router ask --category technical --deadline 10 "Explain this regex: ^a+$"
  router ask --model phi-4 - < prompt.txt
  router ask --json "Why is the sky blue?" | jq -r .answer

\b
Keys of --json:
  answer, category, confidence, reason, preferred, fallback, seconds,
  cost_usd, prompt_tokens, completion_tokens, sources, provisional,
  is_fallback
  model    null if no model answered: the answer is passages, or says that
           none were found
  rank     passages, fallback_model or chosen_model
  task_id  null if the request was not logged
  calls    call_id, model, role, rank, started_seconds, sent_seconds,
           ended_seconds, outcome, error, cost_usd, prompt_tokens,
           completion_tokens; the times are seconds since the request began
  late     a better answer that arrived within --late, with the same keys,
           or null
"""
_STYLES = {EventKind.TROUBLE: "yellow", EventKind.ANSWERED: "green", EventKind.LATE: "green"}


@dataclasses.dataclass(frozen=True)
class _Command:
    prompt: str
    options: dict[str, Any]
    late_seconds: float | None  # None: answering.late_seconds of the config
    as_json: bool
    config: Path


def ask(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Prompt to answer; - reads standard input.")
    ],
    *,
    category: Annotated[
        str | None, typer.Option(metavar="CATEGORY", help="Category of the prompt. Default: classified.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Use this model only.")] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="Time limit for the first answer. Default: the category's deadline."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Maximum length of the answer, in tokens.")
    ] = None,
    client: Annotated[
        str, typer.Option(metavar="NAME", help="Client for whom it is asked. Default: the empty client.")
    ] = "",
    late: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="Wait this long for a better answer after a provisional one. Default: the config's"
            " answering.late_seconds; 0 with --json.",
        ),
    ] = None,
    as_json: terminal.Json = False,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
) -> None:
    options = {
        "category": category, "model": model, "deadline_seconds": deadline, "max_tokens": max_tokens,
        "client": client,
    }  # fmt: skip
    if late is None and as_json:
        late = 0.0
    asyncio.run(_answer(_Command(prompt, options, late, as_json, config)))


async def _answer(command: _Command) -> None:
    from router.answering import Router  # noqa: PLC0415 - takes a second, which other commands need not wait

    router = Router.from_config(command.config)
    prompt = command.prompt
    if prompt == "-":
        prompt = _standard_input(router.config.answering.max_prompt_bytes)
    try:
        on_event = None if command.as_json else _print_event
        answer = await router.answer(prompt, on_event=on_event, **command.options)
        await asyncio.to_thread(_audit, answer, router.addresses.database_url)
        if not command.as_json:
            _print_answer(answer)
        better = await _late_answer(router, answer, command)
        if command.as_json:
            typer.echo(_json(answer, better))
    finally:
        await router.close(grace_seconds=GRACE_SECONDS)
    if (better or answer).model is None:
        terminal.complain(_no_model(answer))
        raise typer.Exit(terminal.EXIT_FAILED)


def _audit(answer: Answer, database_url: str) -> None:
    if answer.task_id is not None:  # else nothing was sent
        terminal.audit(database_url, "ask", f"task {answer.task_id}")


def _standard_input(max_bytes: int) -> str:
    content = sys.stdin.buffer.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise InputError(
            f"Standard input is longer than {max_bytes} bytes, the maximum for a prompt. Shorten it."
        )
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"Standard input is not valid UTF-8 at byte {error.start + 1}.") from error


async def _late_answer(router: Router, answer: Answer, command: _Command) -> Answer | None:
    """Waits for better answers, shows each and returns the last; None if there was none."""
    seconds = router.config.answering.late_seconds if command.late_seconds is None else command.late_seconds
    end = time.monotonic() + seconds
    best: Answer | None = None
    while better := await router.late(best or answer, seconds=end - time.monotonic()):
        best = better
        if not command.as_json:
            _print_answer(better)
    return best


def _print_event(event: Event) -> None:
    line = Text(f"{event.seconds:7.2f} s  ", style="dim")
    line.append(event.text, style=_STYLES.get(event.kind, "default"))
    terminal.err().print(line, soft_wrap=True)


def _print_answer(answer: Answer) -> None:
    source = answer.model or "knowledge"
    kind = answer.rank.name.lower().replace("_", " ")
    words = [f"{source} ({kind})", f"{answer.seconds:.2f} s", f"${answer.cost_usd:.6f}"]
    if answer.late:
        words.insert(0, "late")
    words.append("not logged" if answer.task_id is None else f"task {answer.task_id}")
    if answer.sources and answer.rank is AnswerRank.PASSAGES:
        words.append(f"from {', '.join(answer.sources)}")
    if answer.provisional:
        words.append("provisional, waiting for a better answer")
    terminal.err().print(Text(f"{'-' * 9}  {' · '.join(words)}", style="bold"), soft_wrap=True)
    if answer.model or answer.sources:
        write_data(answer.text)


def _no_model(answer: Answer) -> str:
    found = "the text is retrieved passages" if answer.sources else "no relevant passages were found"
    retry = "Retry with a longer --deadline or --late." if answer.calls else "Retry later."
    return f"No model answered in time, and {found}. {retry} `router status` shows what holds the models."


def _json(answer: Answer, late: Answer | None) -> str:
    """Formats the output of `--json`."""
    return terminal.as_json({**_object(answer), "late": _object(late) if late else None})


def _object(answer: Answer) -> dict[str, Any]:
    printed = dataclasses.asdict(answer)
    printed.pop("late")
    text = printed.pop("text")
    printed["rank"] = answer.rank.name.lower()
    printed["is_fallback"] = answer.rank is not AnswerRank.CHOSEN_MODEL
    for call, logged in zip(answer.calls, printed["calls"], strict=True):
        logged.update(
            call_id=str(call.call_id),
            role=call.role.value,
            rank=call.rank.name.lower(),
            outcome=call.outcome.value if call.outcome else None,
        )
    return {"answer": text, **printed}
