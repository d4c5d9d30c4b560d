"""`recommend`: the setting of a patch that meets a goal of speed or quality on this machine.

`families` says what there is to try, `contenders` runs it beside the dense model, `plan` decides
what to try next, `choice` picks, `result` says it. The root of the package imports from here.
"""
