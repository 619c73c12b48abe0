"""Which models can do what a request needs. No I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from router.errors import echoed
from router.request import ModelRequest, RequestError, check_supported
from router.settings import RouterConfig


def capabilities(config: RouterConfig, model: str) -> frozenset[str]:
    """Returns the capabilities of a model at the configured backend."""
    settings = config.models.get(model) or config.discovered.get(model)
    own = settings.capabilities if settings else None
    return config.backend.capabilities if own is None else config.backend.capabilities & own


def check_request(config: RouterConfig, request: ModelRequest) -> None:
    """Raises RequestError for a parameter that the backend, or the model named, does not support."""
    check_supported(
        request, config.backend.capabilities,
        who="the Models Backend", unsupported=config.backend.on_unsupported,
    )  # fmt: skip
    if request.pin is not None:
        request_for(config, request.pin, request)


def check_queued_request(config: RouterConfig, models: Collection[str], request: ModelRequest) -> None:
    """Raises RequestError for a request that no worker can send with one of these models in use."""
    check_request(config, request)
    if request.pin is not None and request.pin not in models:
        raise RequestError(
            f"the model {echoed(request.pin)} is not in use; name another one, or load with `--model auto`",
            "model",
        )
    if request.pin is None and request.stored() and not capable_models(config, models, request):
        raise RequestError(
            "no model in use can do all that this request needs; see `capabilities` in models.yaml"
        )


def request_for(config: RouterConfig, model: str, request: ModelRequest) -> ModelRequest:
    """Returns the request without what this model may ignore. Raises RequestError if it cannot do it."""
    return request.without(
        check_supported(
            request, capabilities(config, model), who=model, unsupported=config.backend.on_unsupported
        )
    )


def capable_models(config: RouterConfig, models: Iterable[str], request: ModelRequest) -> tuple[str, ...]:
    """Returns those of the models that can do what the request needs; only the one that it names, if any."""
    return tuple(model for model in models if request.pin in {None, model} and _can(config, model, request))


def _can(config: RouterConfig, model: str, request: ModelRequest) -> bool:
    try:
        request_for(config, model, request)
    except RequestError:
        return False
    return True
