"""Retrieval over files, added sources and solved tasks."""

from typing import TYPE_CHECKING

from lazy_loader import attach

if TYPE_CHECKING:
    from router.knowledge.evaluation import evaluate_retrieval as evaluate_retrieval
    from router.knowledge.evaluation import read_collection as read_collection
    from router.knowledge.files import KnowledgeFile as KnowledgeFile
    from router.knowledge.files import RejectedFile as RejectedFile
    from router.knowledge.files import files_in as files_in
    from router.knowledge.files import read_file as read_file
    from router.knowledge.knowledge import Knowledge as Knowledge
    from router.knowledge.results import Passage as Passage
    from router.knowledge.results import SearchResult as SearchResult
    from router.knowledge.sources import add_file as add_file
    from router.knowledge.sources import read_sources as read_sources
    from router.knowledge.sources import remove_path as remove_path
    from router.knowledge.sources import source_name as source_name
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        submod_attrs={
            "evaluation": ["evaluate_retrieval", "read_collection"],
            "files": ["KnowledgeFile", "RejectedFile", "files_in", "read_file"],
            "knowledge": ["Knowledge"],
            "results": ["Passage", "SearchResult"],
            "sources": ["add_file", "read_sources", "remove_path", "source_name"],
        },
    )
