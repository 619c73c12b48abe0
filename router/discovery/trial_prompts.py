"""Prompts for trials. They are used for nothing else, so that no model is tuned to them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router.errors import ConfigError
from router.files import json_lines
from router.settings import own_or_shipped

MAX_FILE_BYTES = 4 * 1024 * 1024
MAX_PROMPT = 20_000  # characters


@dataclass(frozen=True, slots=True)
class TrialPrompt:
    """A prompt, with the right answer if there is one (see `grading.against_reference`)."""

    prompt: str
    reference: str | None


def read_trial_prompts(folder: Path, category: str) -> tuple[TrialPrompt, ...]:
    """Reads `trials/<category>.jsonl` from `folder`, or the shipped file if `folder` has none.

    Raises ConfigError with file and line.
    """
    path = own_or_shipped(folder, f"trials/{category}.jsonl")
    if not path.is_file():
        raise ConfigError(f"{path} does not exist. Write prompts for trials to it, one JSON object per line.")
    prompts: dict[str, TrialPrompt] = {}
    for place, fields in json_lines(path, max_bytes=MAX_FILE_BYTES):
        found = _prompt_of(fields, place)
        if found.prompt in prompts:
            raise ConfigError(f"{place}: the prompt {found.prompt[:60]!r} occurs twice")
        prompts[found.prompt] = found
    if not prompts:
        raise ConfigError(f"{path} contains no prompt; candidates for {category} cannot be tried.")
    return tuple(prompts.values())


def _prompt_of(fields: dict[str, Any], place: str) -> TrialPrompt:
    if not {"prompt"} <= set(fields) <= {"prompt", "reference"}:
        raise ConfigError(f"{place}: must be an object with the keys prompt and, optionally, reference")
    prompt, reference = fields["prompt"], fields.get("reference")
    if not isinstance(prompt, str) or not prompt.strip() or len(prompt) > MAX_PROMPT:
        raise ConfigError(f"{place}: prompt: must be a text of at most {MAX_PROMPT} characters")
    if reference is not None and (not isinstance(reference, str) or not reference.strip()):
        raise ConfigError(f"{place}: reference: must be a text; omit it if no answer is known")
    return TrialPrompt(prompt, reference)
