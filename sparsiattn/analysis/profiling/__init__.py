"""`profile`: multiply-accumulates of a model and of its patch, by part and by site.

`meter` counts, `module_map` says where, `run` runs both passes, `account` puts them together as
`result`, and `notes` says where MACs are not time. The command line and the root import from here.
"""
