"""When two names mean one model. Pure.

Catalogues spell one model in many ways: `meta-llama/Llama-3.3-70B-Instruct`, `llama3.3:70b-instruct`,
`llama-v3p3-70b-instruct`, `Meta-Llama-3.3-70B-Instruct-FP8`. The normal form of a name is what is left when

1. only the part after the last `/` counts: who publishes a model is no part of it;
2. letters are small, and `_`, blanks, `:` and `@` are `-`;
3. `meta-` before `llama` goes, and a version stands apart with points: `llama3.3`, `llama-v3p3`: `llama-3.3`;
4. words that say how the weights are served go: `hf`, `fp8`, `awq`, `gguf`, `4bit`, `free`, `latest`, ...
5. `chat`, `it` and the like are `instruct`, which stands at the end; `turbo` after it goes.

A base model and its tuned form are two models to a catalogue, but the same to the roster, whose names leave
the tuning out: `same_model` does not look at it.
"""

from __future__ import annotations

import re

from router.errors import InputError
from router.settings import MODEL_NAME_PATTERN

MOST_PARTS = 6  # of an id like accounts/host/models/name

_PART = re.compile(r"@?[A-Za-z0-9][A-Za-z0-9._:@ -]*")
_FILE = re.compile(r"\.(?:gguf|ggml|safetensors|bin|pth?|onnx|zip|tar|gz|ya?ml|json)$", re.IGNORECASE)
_SEPARATORS = re.compile(r"[\s_:@-]+")
_POINTED_VERSION = re.compile(r"^v?(\d+)p(\d+)$")
_GLUED_VERSION = re.compile(r"^(llama|qwen|gemma|phi|mistral|hermes|deepseek)v?(\d+(?:\.\d+)?)$")
_WEIGHTS = {
    "fp8",
    "fp16",
    "fp32",
    "bf16",
    "f16",
    "int4",
    "int8",
    "4bit",
    "8bit",
    "awq",
    "gptq",
    "gguf",
    "ggml",
}
_SERVED_AS = frozenset(_WEIGHTS | {"hf", "exl2", "mlx", "quantized", "latest", "free"})
_QUANTISED = re.compile(r"[-_](?:i?q\d(?:_[0-9a-z]+)*|w\d+a\d+)(?=$|[-_:])")  # q4_k_m, iq2_xs, w4a16
_TUNED = frozenset({"instruct", "chat", "it", "versatile", "instant"})
_AFTER_TUNING = frozenset({"turbo"})


def roster_name(model_id: str) -> str:
    """The name for the roster of what a catalogue calls `model_id`; InputError says why there is none.

    It is the last part of the id in small letters; `:`, `@` and blanks are `-`.
    """
    if not model_id.strip():
        raise InputError("it has no name")
    parts = model_id.split("/")
    if len(parts) > MOST_PARTS or ".." in model_id or not all(map(_PART.fullmatch, parts)):
        raise InputError("its name holds a path, or characters that no model name has")
    if _FILE.search(model_id):
        raise InputError("its name is that of a file")
    name = re.sub(r"[:@ ]+", "-", parts[-1].lower()).rstrip("-")
    if not re.fullmatch(MODEL_NAME_PATTERN, name):
        raise InputError("its name holds more than 100 letters, digits, '.', '_' and '-'")
    return name


def normal_name(name: str) -> str:
    """The normal form of a model's name, as the module says; equal for two spellings of one model."""
    words: list[str] = []
    tuned = False
    for word in _words(name):
        if word in _TUNED and words:
            tuned = True
        elif not (words and word in _SERVED_AS) and not (tuned and word in _AFTER_TUNING):
            words.append(word)
    return "-".join([*words, "instruct"] if tuned else words)


def same_model(one: str, other: str) -> bool:
    """Whether two names mean one model, tuned or not: how a catalogue's model is looked for in the roster."""
    return untuned_name(one) == untuned_name(other)


def untuned_name(name: str) -> str:
    """The normal form without the tuning; equal where `same_model` holds."""
    return normal_name(name).removesuffix("-instruct")


def _words(name: str) -> list[str]:
    bare = _QUANTISED.sub("", name.rsplit("/", 1)[-1].lower())
    spelled = [word for word in _SEPARATORS.split(bare) if word]
    if spelled[:1] == ["meta"] and len(spelled) > 1 and spelled[1].startswith("llama"):
        spelled = spelled[1:]
    words: list[str] = []
    for word in spelled:
        glued = _GLUED_VERSION.match(word)
        words.extend(glued.groups() if glued else [_POINTED_VERSION.sub(r"\1.\2", word)])
    return words
