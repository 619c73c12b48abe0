"""Prompt classification: which category a prompt belongs to."""
