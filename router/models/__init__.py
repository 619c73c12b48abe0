"""The roster, traffic targets, and calls to models under a permit."""

from typing import TYPE_CHECKING

from lazy_loader import attach

if TYPE_CHECKING:
    from router.models.airflow_api import VARIABLE_PREFIX as VARIABLE_PREFIX
    from router.models.airflow_api import AirflowApi as AirflowApi
    from router.models.backend import NO_CONNECTION as NO_CONNECTION
    from router.models.backend import ModelsBackend as ModelsBackend
    from router.models.call_request import CallRequest as CallRequest
    from router.models.direct_calls import DirectCaller as DirectCaller
    from router.models.direct_calls import DirectResult as DirectResult
    from router.models.dispatch import Availability as Availability
    from router.models.dispatch import availability as availability
    from router.models.dispatch import send_permitted as send_permitted
    from router.models.roster import Roster as Roster
    from router.models.roster import RosterModel as RosterModel
    from router.models.roster import read_roster as read_roster
    from router.models.roster import read_solved as read_solved
    from router.models.roster import record_model_error as record_model_error
    from router.models.roster import roster_version as roster_version
    from router.models.roster import sync_roster as sync_roster
    from router.models.services import open_services as open_services
    from router.models.targets import read_targets as read_targets
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        submod_attrs={
            "airflow_api": ["AirflowApi", "VARIABLE_PREFIX"],
            "backend": ["ModelsBackend", "NO_CONNECTION"],
            "call_request": ["CallRequest"],
            "direct_calls": ["DirectCaller", "DirectResult"],
            "dispatch": ["Availability", "availability", "send_permitted"],
            "roster": [
                "Roster",
                "RosterModel",
                "read_roster",
                "read_solved",
                "record_model_error",
                "roster_version",
                "sync_roster",
            ],
            "services": ["open_services"],
            "targets": ["read_targets"],
        },
    )
