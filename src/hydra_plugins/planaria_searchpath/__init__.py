"""Lets the Hydra applications of others use Planaria's configuration groups.

Hydra finds this package by itself, as `hydra_plugins` is a namespace shared by all plug-ins; so
that folder must never have an `__init__.py`.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class PlanariaSearchPath(SearchPathPlugin):
    """Adds `planaria.launch.conf` behind the application's own groups, which thus win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="planaria", path="pkg://planaria.launch.conf")
