"""Settings of the stand-in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from models_backend.access import MIN_TOKEN_CHARACTERS, Access
from models_backend.latency import parse_shape
from router.errors import ConfigError
from router.settings import TOKEN_VARIABLE, RouterConfig
from router.traffic import TrafficTarget


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model by the name that requests use. Prices in USD per million tokens."""

    name: str
    input_price: float = 0.0
    output_price: float = 0.0
    context_tokens: int = 8192

    def cost_usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Cost of a call, rounded to a billionth of a dollar."""
        return round((prompt_tokens * self.input_price + completion_tokens * self.output_price) / 1e6, 9)


@dataclass(frozen=True, slots=True)
class ProviderSettings:
    """An OpenAI-compatible provider; `models` maps served names to the provider's own."""

    base_url: str
    key: str | None = field(repr=False)
    models: Mapping[str, str]
    timeout_seconds: float = 300.0
    stream: bool = False  # request a stream: proxies may cut off a long silence
    silence_seconds: float = 120.0  # longest silence within a stream


@dataclass(frozen=True, slots=True)
class StandInSettings:
    """Arguments of `create_app`. `time_scale` divides latencies and nothing else."""

    models: Mapping[str, ServedModel]
    time_scale: float = 1.0
    seed: int = 0
    latency: str = "profile"
    quotas: Mapping[str, TrafficTarget] = field(default_factory=dict)
    references: Mapping[str, str] = field(default_factory=dict)  # by prompt
    categories: Mapping[str, str] = field(default_factory=dict)  # by prompt; others are guessed
    arrival_log: Path | None = None
    max_body_bytes: int = 8 * 1024 * 1024
    max_batch: int = 1000
    provider: ProviderSettings | None = None
    access: Access = field(default_factory=Access)

    def __post_init__(self) -> None:
        if not 0 < self.time_scale < float("inf"):
            raise ConfigError(f"time scale: {self.time_scale} is not above 0")
        try:
            parse_shape(self.latency)
        except ValueError as error:
            raise ConfigError(f"latency: {error}") from error
        unknown = sorted(set(self.quotas) - set(self.models))
        if unknown:
            raise ConfigError(
                f"quota: {unknown[0]!r} is not served; served: {', '.join(sorted(self.models))}"
            )


# Models of config/llama_catalog.yaml that the stand-in serves unless told otherwise, so that a search has
# something to try: a better one, one with better benchmark scores only, and one that fails.
NEW_MODELS: Mapping[str, ServedModel] = {
    model.name: model
    for model in (
        ServedModel("llama-4-maverick", 0.20, 0.60, 1_048_576),
        ServedModel("llama-3.1-70b-paragon", 0.20, 0.40, 131_072),
        ServedModel("qwen3-32b", 0.10, 0.30, 40_960),
    )
}


def served_models(config: RouterConfig, also: tuple[str, ...] = ()) -> dict[str, ServedModel]:
    """The models of the router's config by endpoint, and those of `also`.

    `also` holds NAME (free of charge) or NAME=INPUT/OUTPUT with prices in USD per million tokens. Raises
    ConfigError with the line that does not parse."""
    served = {model.name: model for model in map(_also_served, also)}
    for name, model in config.models.items():
        endpoint = model.endpoint or name
        served[endpoint] = ServedModel(endpoint, model.input_price, model.output_price, model.context_tokens)
    return served


def _also_served(line: str) -> ServedModel:
    name, equals, prices = line.partition("=")
    if not equals:
        return ServedModel(name)
    try:
        input_price, output_price = (float(price) for price in prices.split("/"))
    except ValueError:
        input_price, output_price = -1.0, -1.0
    if not (0 <= input_price < math.inf and 0 <= output_price < math.inf):
        raise ConfigError(f"also: {line!r} must read NAME or NAME=INPUT/OUTPUT, e.g. llama-5-8b=0.05/0.08")
    return ServedModel(name, input_price, output_price)


def provider_from_environment(
    environment: Mapping[str, str], served: Mapping[str, ServedModel]
) -> ProviderSettings | None:
    """The provider of LLAMA_API_BASE, or None. Raises ConfigError with the invalid variable.

    LLAMA_MODELS=name=provider-model,... names the real models; without it those whose name starts with
    `llama` are real, under their own names. LLAMA_STREAM=1 requests streams from the provider.
    """
    base_url = environment.get("LLAMA_API_BASE", "").strip()
    if not base_url:
        return None
    stream = environment.get("LLAMA_STREAM", "").strip() or "0"
    if stream not in {"0", "1"}:
        raise ConfigError(f"LLAMA_STREAM={stream!r} must be 0 or 1")
    line = environment.get("LLAMA_MODELS", "").strip()
    pairs = [pair.strip().partition("=") for pair in line.split(",") if pair.strip()]
    if any(not name.strip() for name, _, _ in pairs):
        raise ConfigError(f"LLAMA_MODELS={line!r} must read name=provider-model,name=provider-model")
    names = {name.strip(): (target.strip() or name.strip()) for name, _, target in pairs}
    names = names or {name: name for name in served if name.lower().startswith("llama")}
    key = _key(environment.get("LLAMA_API_KEY", "").strip())
    return ProviderSettings(_base_url(base_url), key, names, stream=stream == "1")


def _base_url(url: str) -> str:
    problem = "LLAMA_API_BASE is not an http(s) URL. Set it to the part before /chat/completions."
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises for an invalid port
    except ValueError as error:
        raise ConfigError(problem) from error
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(problem)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            "LLAMA_API_BASE must not contain a password, ? or #. Put the key into LLAMA_API_KEY."
        )
    return url.rstrip("/").removesuffix("/chat/completions")


def _key(key: str) -> str | None:
    if not key.isascii() or any(character.isspace() or not character.isprintable() for character in key):
        raise ConfigError(
            "LLAMA_API_KEY contains a blank or another character that is not allowed in a header."
        )
    return key or None


def access_from_environment(environment: Mapping[str, str], hosts: Iterable[str]) -> Access:
    """Reads the token that callers must send. Raises ConfigError if it is too short."""
    token = environment.get(TOKEN_VARIABLE, "").strip() or None
    if token is not None and (len(token) < MIN_TOKEN_CHARACTERS or not token.isascii() or " " in token):
        raise ConfigError(
            f"{TOKEN_VARIABLE} must have at least {MIN_TOKEN_CHARACTERS} characters: ASCII, no spaces."
        )
    return Access(token, frozenset(host.lower() for host in hosts))
