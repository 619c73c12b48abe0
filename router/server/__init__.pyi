from .api_keys import ENVIRONMENT_CLIENT as ENVIRONMENT_CLIENT
from .api_keys import ApiKeys as ApiKeys
from .api_keys import add_key as add_key
from .api_keys import read_keys as read_keys
from .api_keys import remove_key as remove_key
from .middleware import Limits as Limits
from .server import ServeOptions as ServeOptions
from .server import run_server as run_server
