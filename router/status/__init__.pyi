from .report import ModelStatus as ModelStatus
from .report import Status as Status
from .report import read_status as read_status
from .why_not import Reason as Reason
from .why_not import redis_reason as redis_reason
