"""The prompts that candidates are tried with: written for trials, and held back from all else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from router.errors import ConfigError
from router.settings import DEFAULT_CONFIG_FOLDER

LARGEST_FILE_BYTES = 4 * 1024 * 1024
LONGEST_PROMPT = 20_000  # characters


@dataclass(frozen=True, slots=True)
class TrialPrompt:
    """A prompt, and what a right answer states, where one is known (see `grading.against_reference`)."""

    prompt: str
    reference: str | None


def read_trial_prompts(folder: Path, category: str) -> tuple[TrialPrompt, ...]:
    """The prompts of `trials/<category>.jsonl` in `folder`, or of the shipped file where that has none.

    ConfigError names file and line of what is wrong, or the file that is missing.
    """
    own, shipped = (place / "trials" / f"{category}.jsonl" for place in (folder, DEFAULT_CONFIG_FOLDER))
    path = shipped if not own.exists() and shipped.exists() else own
    lines = _text(path).split("\n")
    prompts = [
        _prompt_of(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not prompts:
        raise ConfigError(f"{path}: holds no prompt; a candidate for {category} cannot be tried.")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.prompt in seen:
            raise ConfigError(f"{path}: the prompt {prompt.prompt[:60]!r} stands twice")
        seen.add(prompt.prompt)
    return tuple(prompts)


def _text(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist. Write prompts for trials into it, one JSON object a line.")
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE_BYTES + 1)
        if len(content) > LARGEST_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {LARGEST_FILE_BYTES // 1024**2} MiB")
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _prompt_of(line: str, where: str) -> TrialPrompt:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not a line of JSON: {error}") from error
    if not isinstance(fields, dict) or not {"prompt"} <= set(fields) <= {"prompt", "reference"}:
        raise ConfigError(f"{where}: must be an object with prompt, and reference where one is known")
    prompt, reference = fields["prompt"], fields.get("reference")
    if not isinstance(prompt, str) or not prompt.strip() or len(prompt) > LONGEST_PROMPT:
        raise ConfigError(f"{where}: prompt: must be a text of at most {LONGEST_PROMPT} characters")
    if reference is not None and (not isinstance(reference, str) or not reference.strip()):
        raise ConfigError(f"{where}: reference: must be a text; leave it out where no answer is known")
    return TrialPrompt(prompt, reference)
