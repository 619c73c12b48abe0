"""Environment variables of the router; unknown ones with its prefix are reported."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping

PREFIX = "ROUTER_"
KNOWN = frozenset(
    {
        "ROUTER_AIRFLOW_PASSWORD",
        "ROUTER_AIRFLOW_URL",
        "ROUTER_AIRFLOW_USER",
        "ROUTER_API_KEY",
        "ROUTER_API_KEYS",
        "ROUTER_APP_PASSWORD",
        "ROUTER_CONFIG",
        "ROUTER_DATA",
        "ROUTER_DATABASE_URL",
        "ROUTER_DEMO_STARTED_AT",
        "ROUTER_OWNER_PASSWORD",
        "ROUTER_REDIS_URL",
        "ROUTER_SERVE_AT_ONCE",
        "ROUTER_SERVE_CORS_ORIGINS",
        "ROUTER_SERVE_GRACE",
        "ROUTER_SERVE_HOST",
        "ROUTER_SERVE_KEEP_ALIVE",
        "ROUTER_SERVE_MAX_BODY",
        "ROUTER_SERVE_PORT",
        "ROUTER_SHARED_DATA",
    }
)
# Kubernetes sets these in every container for a service whose name begins with `router`.
_SERVICE_LINK = re.compile(r"ROUTER_(\w+_)?(SERVICE_(HOST|PORT)\w*|PORT(_\d+_\w+)?)")


def unknown_variables(environment: Mapping[str, str] | None = None) -> list[str]:
    """Returns a warning for each variable that begins with the prefix and has no effect."""
    environment = os.environ if environment is None else environment
    warnings = []
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in KNOWN and not _SERVICE_LINK.fullmatch(name):
            close = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.8)
            hint = f" Did you mean {close[0]}?" if close else ""
            warnings.append(f"The environment variable {name} is unknown and has no effect.{hint}")
    return warnings
