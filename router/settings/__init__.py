"""Configuration: YAML files and environment variables, validated once into frozen values."""

from router.settings.classification import ClassificationSettings, load_categories
from router.settings.clients import DEFAULT_CLIENT, ClientSettings
from router.settings.discovery import (
    MEGABYTE,
    CriteriaSettings,
    DiscoverySettings,
    FileCatalogSettings,
    ProbationSettings,
    ProviderCatalogSettings,
    TrialSettings,
    load_discovery,
)
from router.settings.environment import (
    DEFAULT_CONFIG_FOLDER,
    ROOT,
    TOKEN_VARIABLE,
    Addresses,
    addresses_from_environment,
    classifier_folder,
    config_folder,
    data_folder,
    missing_address,
    own_or_shipped,
)
from router.settings.http import AIRFLOW_SOURCE, HttpAddress, backend_address
from router.settings.knowledge import KnowledgeSettings, TaskKnowledge
from router.settings.learning import JudgingSettings, LearningSettings, UtilitySettings, load_learning
from router.settings.models import (
    DISCOVERED,
    MODEL_NAME_PATTERN,
    NO_PRICE,
    InteractiveShare,
    read_discovered,
)
from router.settings.postgres import PostgresAddress
from router.settings.redis import RedisAddress
from router.settings.router import BackendSettings, FallbackSettings, RouterConfig, load_config
from router.settings.variables import unknown_variables

__all__ = [
    "AIRFLOW_SOURCE",
    "DEFAULT_CLIENT",
    "DEFAULT_CONFIG_FOLDER",
    "DISCOVERED",
    "MEGABYTE",
    "MODEL_NAME_PATTERN",
    "NO_PRICE",
    "ROOT",
    "TOKEN_VARIABLE",
    "Addresses",
    "BackendSettings",
    "ClassificationSettings",
    "ClientSettings",
    "CriteriaSettings",
    "DiscoverySettings",
    "FallbackSettings",
    "FileCatalogSettings",
    "HttpAddress",
    "InteractiveShare",
    "JudgingSettings",
    "KnowledgeSettings",
    "LearningSettings",
    "PostgresAddress",
    "ProbationSettings",
    "ProviderCatalogSettings",
    "RedisAddress",
    "RouterConfig",
    "TaskKnowledge",
    "TrialSettings",
    "UtilitySettings",
    "addresses_from_environment",
    "backend_address",
    "classifier_folder",
    "config_folder",
    "data_folder",
    "load_categories",
    "load_config",
    "load_discovery",
    "load_learning",
    "missing_address",
    "own_or_shipped",
    "read_discovered",
    "unknown_variables",
]
