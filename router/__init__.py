"""The router's library: one noun a file, no Airflow import anywhere.

`ls router/` is the diagram; the floors are listed in docs/architecture.md and enforced in CI.
"""
