"""The registry of built-ins and plug-ins by name, and the template of a new plug-in.

It imports only `sparsiattn.errors`. The contracts (`Kernel`, `Backbone`, `Strategy`) are above it
and state their kind with ``registers_as``. Every other package except `attention` may import it.
"""

from sparsiattn.registry.deprecated import CallablePackage
from sparsiattn.registry.hookspecs import PLUGIN_API, hookimpl
from sparsiattn.registry.listing import (
    Info,
    list_backbones,
    list_kernels,
    list_plugins,
    list_strategies,
)
from sparsiattn.registry.registry import REGISTRY, PluginInfo, Registry
