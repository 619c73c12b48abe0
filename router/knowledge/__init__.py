"""Retrieval: indexing what the router knows and searching it."""
