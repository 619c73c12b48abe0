"""Composes the stand-in's answers: readable, deterministic, naming the model and the prompt.

A good answer uses the prompt's own words. A bad one is empty, cut off, a refusal, a loop, or fluent and about
something else, which shows only in comparison with the prompt.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from models_backend.chance import chance
from models_backend.models import profile_of
from models_backend.verdicts import verdict_on

CHARACTERS_A_TOKEN = 4
QUOTED_WORDS = 24
_TECHNICAL = re.compile(
    r"(?i)```|\b(code|function|python|java|sql|bug|compile|algorithm|api|regex|equation|integral|prove|calculate"
    r"|server|linux|css|html|class|stack ?trace)\b|[=<>{}]{2}"
)
_CREATIVE = re.compile(
    r"(?i)\b(poem|story|haiku|song|lyrics|novel|character|dialogue|fiction|slogan|limerick|sonnet|screenplay|rhyme"
    r"|imagine|fairy ?tale)\b"
)
_STYLES: Mapping[str, tuple[str, ...]] = {
    "technical": (
        "First fix what goes in and what must come out; every later step can then be checked against that.",
        "Take the simplest version that is right, measure it, and only then make it fast.",
        "The edge cases are the empty input, the single element and the largest size that is allowed.",
    ),
    "creative": (
        "It opens on a small thing that nobody else noticed, and lets the rest of the world arrive slowly.",
        "By the second turn the light has changed, and what looked like an ending is a door left open.",
        "Nothing is explained; the last image answers the first one, and that is enough.",
    ),
    "general": (
        "The short version is that it depends on two things, and both can be found out in a few minutes.",
        "Most sources agree on the main point; where they differ, the difference is one of emphasis.",
        "If in doubt, start with the common case and treat the exceptions one at a time.",
    ),
}
_OFF_TOPIC = (
    "Tides follow the moon because its pull differs between the near and the far side of the Earth.",
    "A sourdough starter needs feeding once a day at room temperature, and once a week in the cold.",
    "The offside rule looks at the moment when the ball is played, not at the moment when it arrives.",
)
_REFUSAL = "I'm sorry, but I can't help with that request."


@dataclass(frozen=True, slots=True)
class Answer:
    """`flaw` is None for a good answer, else its kind."""

    text: str
    prompt_tokens: int
    flaw: str | None


def prompt_digest(prompt: str) -> str:
    """Eight characters that identify a prompt in its answers."""
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()


def token_count(text: str) -> int:
    """The stand-in's tokenizer: one token per four characters, rounded up."""
    return math.ceil(len(text) / CHARACTERS_A_TOKEN)


def guess_category(prompt: str) -> str:
    """Guesses the category of a prompt whose request does not name one."""
    if _TECHNICAL.search(prompt):
        return "technical"
    return "creative" if _CREATIVE.search(prompt) else "general"


def compose_answer(
    model: str,
    prompt: str,
    *,
    category: str | None = None,
    seed: int = 0,
    references: Mapping[str, str] | None = None,
    quality: float | None = None,
    variety: str = "",
) -> Answer:
    """The model's whole answer to the prompt; the same for the same arguments.

    If `references` contains the prompt, a good answer states the reference and a bad one does not. `quality`
    is the probability of a good answer; default: the model's profile.
    """
    category = category or guess_category(prompt)
    flaw = None
    if quality is None:
        quality = profile_of(model).quality_for(category)
    if chance(seed, "quality", model, prompt) >= quality:
        flaw = _flaw(chance(seed, "flaw", model, prompt))
    style = chance(seed, "style", model, prompt, *([variety] if variety else []))
    body = verdict_on(prompt, looks_well=flaw is None)
    if body is None:
        body = _body(prompt, category, flaw, (references or {}).get(prompt), variety=style)
    text = body if flaw == "empty" else f"[{model} {prompt_digest(prompt)}] {body}"
    return Answer(text, token_count(prompt), flaw)


def _flaw(share: float) -> str:
    for flaw, end in (("empty", 0.1), ("cut off", 0.3), ("refusal", 0.5), ("loop", 0.65)):
        if share < end:
            return flaw
    return "off topic"


def _body(prompt: str, category: str, flaw: str | None, reference: str | None, *, variety: float) -> str:
    style = _STYLES.get(category, _STYLES["general"])
    first = int(variety * len(style))
    sentences = [style[(first + step) % len(style)] for step in range(len(style))]
    about = " ".join(prompt.split()[:QUOTED_WORDS])
    good = " ".join(
        [f"About “{about}”:", *([f"the answer is {reference}."] if reference else []), *sentences]
    )
    return {
        None: good,
        "empty": "",
        "cut off": f"About “{about}”: {sentences[0]}"[: 40 + len(about) // 2],
        "refusal": _REFUSAL,
        "loop": " ".join([sentences[0]] * 8),
        "off topic": " ".join(_OFF_TOPIC[first:] + _OFF_TOPIC[:first]),
    }[flaw]
