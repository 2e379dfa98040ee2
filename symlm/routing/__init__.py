"""From roles to parameter groups: the default table, presets, a user's overrides, and a description of the result."""

from symlm.routing.describe import describe_routing
from symlm.routing.param_groups import param_groups
from symlm.routing.presets import PRESETS, get_preset
from symlm.routing.table import ROUTES, Route, make_table

__all__ = ["PRESETS", "ROUTES", "Route", "describe_routing", "get_preset", "make_table", "param_groups"]
