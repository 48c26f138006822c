"""The names of `ser_ray`, for type checkers: at run time they are imported when they are used."""

from ser_ray.api import Model as Model
from ser_ray.api import Rows as Rows
from ser_ray.api import SearchResults as SearchResults
from ser_ray.api import UserError as UserError
from ser_ray.api import audit_data as audit_data
from ser_ray.api import load as load
from ser_ray.api import prepare_data as prepare_data
from ser_ray.api import read_results as read_results
from ser_ray.api import search as search

__version__: str
