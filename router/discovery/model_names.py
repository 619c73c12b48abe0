"""Recognizes different spellings of one model. Pure.

Catalogs spell one model in many ways: `meta-llama/Llama-3.3-70B-Instruct`, `llama3.3:70b-instruct`,
`llama-v3p3-70b-instruct`, `Meta-Llama-3.3-70B-Instruct-FP8`. A name is normalized in five steps:

1. Keep the part after the last `/`; the publisher is not part of the name.
2. Lower the case; replace `_`, blanks, `:` and `@` by `-`.
3. Drop `meta-` before `llama`, and separate versions: `llama3.3` and `llama-v3p3` become `llama-3.3`.
4. Drop words about the format of the weights: `hf`, `fp8`, `awq`, `gguf`, `4bit`, `free`, `latest`, ...
5. Replace `chat`, `it` and the like by `instruct` at the end, and drop `turbo` after it.

Catalogs list a base model and its tuned form as two models. Names on the roster leave the tuning out, so
`same_model` ignores it.
"""

from __future__ import annotations

import re

from router.settings import MODEL_NAME_PATTERN

MAX_PARTS = 6  # of an id like accounts/host/models/name

_PART = re.compile(r"@?[A-Za-z0-9][A-Za-z0-9._:@ -]*")
_FILE = re.compile(r"\.(?:gguf|ggml|safetensors|bin|pth?|onnx|zip|tar|gz|ya?ml|json)$", re.IGNORECASE)
_SEPARATORS = re.compile(r"[\s_:@-]+")
_POINTED_VERSION = re.compile(r"^v?(\d+)p(\d+)$")
_GLUED_VERSION = re.compile(r"^(llama|qwen|gemma|phi|mistral|hermes|deepseek)v?(\d+(?:\.\d+)?)$")
_WEIGHT_FORMATS = frozenset(
    {"fp8", "fp16", "fp32", "bf16", "f16", "int4", "int8", "4bit", "8bit", "awq", "gptq", "gguf", "ggml",
     "hf", "exl2", "mlx", "quantized", "latest", "free"}
)  # fmt: skip
_QUANTIZED = re.compile(r"[-_](?:i?q\d(?:_[0-9a-z]+)*|w\d+a\d+)(?=$|[-_:])")  # q4_k_m, iq2_xs, w4a16
_TUNED = frozenset({"instruct", "chat", "it", "versatile", "instant"})
_AFTER_TUNING = frozenset({"turbo"})


def roster_name(model_id: str) -> str:
    """Derives the name on the roster from a catalog's id: its last part in lower case, with `-` for `:`, `@`
    and blanks. Raises ValueError if the id is not a model's.
    """
    if not model_id.strip():
        raise ValueError("input should not be empty")
    parts = model_id.split("/")
    if len(parts) > MAX_PARTS or ".." in model_id or not all(map(_PART.fullmatch, parts)):
        raise ValueError("input should be a model name, not a path, without special characters")
    if _FILE.search(model_id):
        raise ValueError("input should be a model name, not the name of a file")
    name = re.sub(r"[:@ ]+", "-", parts[-1].lower()).rstrip("-")
    if not re.fullmatch(MODEL_NAME_PATTERN, name):
        raise ValueError("input should be at most 100 letters, digits, '.', '_' and '-'")
    return name


def normal_name(name: str) -> str:
    """Normalizes a name as described above; two spellings of one model give the same result."""
    words: list[str] = []
    tuned = False
    for word in _words(name):
        if word in _TUNED and words:
            tuned = True
        elif not (words and word in _WEIGHT_FORMATS) and not (tuned and word in _AFTER_TUNING):
            words.append(word)
    return "-".join([*words, "instruct"] if tuned else words)


def same_model(one: str, other: str) -> bool:
    """Compares two names, ignoring the tuning; used between catalogs and the roster."""
    return untuned_name(one) == untuned_name(other)


def untuned_name(name: str) -> str:
    """Normalizes a name and drops the tuning; equal exactly where `same_model` holds."""
    return normal_name(name).removesuffix("-instruct")


def _words(name: str) -> list[str]:
    bare = _QUANTIZED.sub("", name.rsplit("/", 1)[-1].lower())
    spelled = [word for word in _SEPARATORS.split(bare) if word]
    if spelled[:1] == ["meta"] and len(spelled) > 1 and spelled[1].startswith("llama"):
        spelled = spelled[1:]
    words: list[str] = []
    for word in spelled:
        glued = _GLUED_VERSION.match(word)
        words.extend(glued.groups() if glued else [_POINTED_VERSION.sub(r"\1.\2", word)])
    return words
