"""What is registered under which name: built-ins, plug-ins, and the template of a new plug-in.

Imports `sparsiattn.errors` alone: contracts (`Kernel`, `Backbone`, `Strategy`) stand above it and
say with ``registers_as`` what they are. Every other package but `attention` may import it.
"""
