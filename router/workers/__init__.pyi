from .deadlines import DeadlineJob as DeadlineJob
from .engine import Engine as Engine
from .runs import begin_run as begin_run
from .runs import run_report as run_report
from .worker import Worker as Worker
from .worker import wait_for_work as wait_for_work
