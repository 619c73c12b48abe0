"""Configuration: YAML files and environment variables, validated once into frozen values."""
