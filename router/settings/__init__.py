"""Configuration: YAML files and environment variables, validated once into frozen values."""

from router.settings.classification import ClassificationSettings, load_categories
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
    Addresses,
    addresses_from_environment,
    classifier_folder,
    config_folder,
    data_folder,
    missing_address,
    own_or_shipped,
)
from router.settings.learning import JudgingSettings, LearningSettings, UtilitySettings, load_learning
from router.settings.models import DISCOVERED, MODEL_NAME_PATTERN, read_discovered
from router.settings.router import BackendSettings, FallbackSettings, RouterConfig, load_config

__all__ = [
    "DEFAULT_CONFIG_FOLDER",
    "DISCOVERED",
    "MEGABYTE",
    "MODEL_NAME_PATTERN",
    "ROOT",
    "Addresses",
    "BackendSettings",
    "ClassificationSettings",
    "CriteriaSettings",
    "DiscoverySettings",
    "FallbackSettings",
    "FileCatalogSettings",
    "JudgingSettings",
    "LearningSettings",
    "ProbationSettings",
    "ProviderCatalogSettings",
    "RouterConfig",
    "TrialSettings",
    "UtilitySettings",
    "addresses_from_environment",
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
]
