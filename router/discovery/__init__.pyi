from .probation import Decision as Decision
from .probation import promote as promote
from .probation import retire as retire
from .probation import review_probation as review_probation
from .probation import undo_search as undo_search
from .search import SearchReport as SearchReport
from .search import run_search as run_search
