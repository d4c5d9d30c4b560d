"""What is registered under which name: built-ins, plug-ins, and the template of a new plug-in.

Imports `sparsiattn.errors` alone: contracts (`Kernel`, `Backbone`, `Strategy`) stand above it and
say with ``registers_as`` what they are. Every other package but `attention` may import it.
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
