"""The task queue in Postgres: tasks in, claimed, settled, and answers out."""
