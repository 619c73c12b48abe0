"""`python -m models_backend`: the stand-in on one port, in one process."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import uvicorn

from models_backend.app import create_app
from models_backend.check import check
from models_backend.latency import SHAPES
from models_backend.settings import (
    NEW_MODELS,
    StandInSettings,
    access_from_environment,
    provider_from_environment,
    served_models,
)
from router.discovery import read_trial_prompts
from router.errors import ConfigError, RouterError, printable
from router.settings import DEFAULT_CONFIG_FOLDER, TOKEN_VARIABLE, load_config
from router.traffic import TrafficTarget

KEEPALIVE_SECONDS = 75
GRACE_SECONDS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; Exit status 2 if the command line or the config is invalid."""
    options = _parser().parse_args(arguments)
    try:
        settings = _settings(options, os.environ)
    except (RouterError, OSError) as error:
        print(f"models_backend: {printable(error)}", file=sys.stderr)  # noqa: T201 - for the person who started it
        return 2
    if options.check:
        return asyncio.run(check(settings.provider)) if settings.provider else _nothing_to_check()
    _allow_many_connections()
    config = uvicorn.Config(
        create_app(settings), host=options.host, port=options.port, access_log=False, log_level="warning",
        lifespan="on", ws="none", server_header=False, proxy_headers=False, backlog=4096,
        timeout_keep_alive=KEEPALIVE_SECONDS, timeout_graceful_shutdown=GRACE_SECONDS,
    )  # fmt: skip
    uvicorn.Server(config).run()
    return 0


def _nothing_to_check() -> int:
    print("models_backend: no provider to check: LLAMA_API_BASE is not set", file=sys.stderr)  # noqa: T201 - as above
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models_backend", description=__doc__)
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8100)
    add("--models", type=Path, default=DEFAULT_CONFIG_FOLDER / "models.yaml", help="the router's models.yaml")
    add(
        "--also",
        action="append",
        default=[],
        metavar="NAME[=IN/OUT]",
        help="serve one more model at these USD per million tokens, or free of charge; repeatable",
    )
    add(
        "--new-models",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="serve some new models of config/llama_catalog.yaml, for a search to try; never with a provider",
    )
    add("--time-scale", type=float, default=1.0, metavar="S", help="divide latencies by S")
    add("--latency", default="profile", metavar="SHAPE", help=f"one shape for all models: {SHAPES}")
    add("--seed", type=int, default=0, help="seed of latencies and bad answers")
    add(
        "--quota",
        action="append",
        default=[],
        metavar="MODEL=TARGET",
        help='e.g. "phi-4=120/min, 4/s"; repeatable',
    )
    add(
        "--references",
        type=Path,
        metavar="FILE",
        help='JSON lines {"prompt", "reference", "category"}, one of the last two or both: what good answers'
        " state, and what is not to be guessed",
    )
    add(
        "--check",
        action="store_true",
        help="send each real model one small prompt, print the results and exit",
    )
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="serve requests to this name; else only to addresses and names without a dot, so that no web"
        f" page can call. Repeatable. {TOKEN_VARIABLE} holds a token that callers must send",
    )
    add("--arrival-log", type=Path, metavar="FILE", help="append each ended call as a JSON line")
    return parser


def _settings(options: argparse.Namespace, environment: Mapping[str, str]) -> StandInSettings:
    if options.models.name != "models.yaml":
        raise ConfigError(f"--models {options.models} must name a models.yaml")
    served = served_models(load_config(options.models.parent), tuple(options.also))
    provider = provider_from_environment(environment, served)
    if provider is not None:
        served = served_models(load_config(options.models.parent), (*options.also, *provider.models))
    elif options.new_models:
        served = {**NEW_MODELS, **served}
    references, categories = _known_prompts(options.models.parent, options.references)
    return StandInSettings(
        models=served,
        time_scale=options.time_scale,
        seed=options.seed,
        latency=options.latency,
        quotas=dict(_quota(line) for line in options.quota),
        references=references,
        categories=categories,
        arrival_log=options.arrival_log,
        provider=provider,
        access=access_from_environment(environment, options.allow_host),
    )


def _quota(line: str) -> tuple[str, TrafficTarget]:
    model, equals, target = line.partition("=")
    if not equals:
        raise ConfigError(f'--quota {line!r} must read MODEL=TARGET, e.g. "phi-4=120/min, 4/s"')
    return model.strip(), TrafficTarget.parse(target.strip())


def _known_prompts(folder: Path, path: Path | None) -> tuple[dict[str, str], dict[str, str]]:
    """References and categories of the trial prompts of a search, and of the prompts in `path`."""
    references: dict[str, str] = {}
    categories: dict[str, str] = {}
    for category in load_config(folder).categories:
        with contextlib.suppress(ConfigError):  # the search reports it
            for one in read_trial_prompts(folder, category):
                categories[one.prompt] = category
                if one.reference is not None:
                    references[one.prompt] = one.reference
    own_references, own_categories = _references(path)
    return {**references, **own_references}, {**categories, **own_categories}


def _references(path: Path | None) -> tuple[dict[str, str], dict[str, str]]:
    """References and categories of known prompts."""
    references: dict[str, str] = {}
    categories: dict[str, str] = {}
    try:
        text = "" if path is None else path.read_text(encoding="utf-8")
        for row in (json.loads(line) for line in text.splitlines() if line.strip()):
            if row.get("category") is not None:
                categories[str(row["prompt"])] = str(row["category"])
            if row.get("reference") is not None or row.get("category") is None:
                references[str(row["prompt"])] = str(row["reference"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        example = '{"prompt": ..., "reference": ..., "category": ...}'
        raise ConfigError(f"{path}: each line must read {example}: {error}") from error
    return references, categories


def _allow_many_connections() -> None:
    """Raises the limit of open files: each of thousands of concurrent calls needs one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
