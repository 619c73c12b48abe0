"""Draining the queue: the engine of a process and one worker per model."""
