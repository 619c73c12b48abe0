"""The stand-in as a judging model: it compares two answers and names the better one.

It does not know their authors. A good verdict prefers an answer that addresses the request, is complete and
does not repeat itself; a bad verdict prefers the first answer.
"""

from __future__ import annotations

import re

_QUESTION = re.compile(
    r"<request>\n(.*?)\n</request>\s*<answer_1>\n(.*?)\n</answer_1>\s*<answer_2>\n(.*?)\n</answer_2>"
    r".*verdict: tie\s*\Z",
    re.DOTALL,
)
_WORD = re.compile(r"\w+")
LEAST_WORDS = 3
TOPIC_LETTERS = 4
ON_TOPIC = 0.2  # share of the request's words
VARIED = 0.4  # share of distinct words of an answer


def verdict_on(prompt: str, *, looks_well: bool) -> str | None:
    """The verdict for a judging prompt; None for any other prompt."""
    question = _QUESTION.search(prompt)
    if question is None:
        return None
    if not looks_well:
        return "The first one reads better.\nverdict: 1"
    request, *answers = question.groups()
    first, second = (_soundness(request, answer) for answer in answers)
    if first == second:
        return "Neither is better than the other.\nverdict: tie"
    better = 1 if first > second else 2
    return f"Answer {better} serves the request better.\nverdict: {better}"


def _soundness(request: str, answer: str) -> float:
    words = _WORD.findall(answer.lower())
    if len(words) < LEAST_WORDS:
        return 0.0
    topic = {word for word in _WORD.findall(request.lower()) if len(word) >= TOPIC_LETTERS}
    on_topic = len(topic.intersection(words)) >= ON_TOPIC * len(topic)
    whole = answer.rstrip()[-1:] in ".!?"
    varied = len(set(words)) >= VARIED * len(words)
    return 0.5 * on_topic + 0.25 * whole + 0.25 * varied
