"""Answering one prompt now: preferred model and fallback in parallel, within a deadline."""
