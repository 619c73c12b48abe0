"""The task queue in Postgres: tasks in, claimed, settled, and answers out."""

from typing import TYPE_CHECKING

from lazy_loader import attach

if TYPE_CHECKING:
    from router.queue.call_log import MAX_ROWS as MAX_ROWS
    from router.queue.call_log import LoggedCall as LoggedCall
    from router.queue.call_log import read_calls as read_calls
    from router.queue.chat import prompt_of as prompt_of
    from router.queue.export import output_line as output_line
    from router.queue.export import write_lines as write_lines
    from router.queue.ingest import MAX_PRIORITY as MAX_PRIORITY
    from router.queue.ingest import IngestDefaults as IngestDefaults
    from router.queue.ingest import InvalidRow as InvalidRow
    from router.queue.ingest import NewTask as NewTask
    from router.queue.ingest import read_tasks as read_tasks
    from router.queue.prompt_files import Format as Format
    from router.queue.prompt_files import decompressed as decompressed
    from router.queue.prompt_files import detect_format as detect_format
    from router.queue.task_queue import QueueState as QueueState
    from router.queue.task_queue import TaskQueue as TaskQueue
    from router.queue.task_queue import listening as listening
    from router.queue.tasks import Retried as Retried
    from router.queue.tasks import category_names as category_names
    from router.queue.tasks import enqueue as enqueue
    from router.queue.tasks import failed_tasks as failed_tasks
    from router.queue.tasks import finished_tasks as finished_tasks
    from router.queue.tasks import max_prompt_bytes as max_prompt_bytes
    from router.queue.tasks import require_schema as require_schema
    from router.queue.tasks import retry_failed as retry_failed
    from router.queue.tasks import statuses as statuses
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        submod_attrs={
            "call_log": ["LoggedCall", "MAX_ROWS", "read_calls"],
            "chat": ["prompt_of"],
            "export": ["output_line", "write_lines"],
            "ingest": ["IngestDefaults", "InvalidRow", "MAX_PRIORITY", "NewTask", "read_tasks"],
            "prompt_files": ["Format", "decompressed", "detect_format"],
            "task_queue": ["QueueState", "TaskQueue", "listening"],
            "tasks": [
                "Retried",
                "category_names",
                "enqueue",
                "failed_tasks",
                "finished_tasks",
                "max_prompt_bytes",
                "require_schema",
                "retry_failed",
                "statuses",
            ],
        },
    )
