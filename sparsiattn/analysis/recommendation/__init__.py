"""`recommend`: the setting of a patch that meets a goal of speed or quality on this machine.

`families` lists the settings to try, `contenders` runs them in turn with the dense model, `plan`
decides what to try next, `choice` picks one, and `result` describes it. The root of the package
imports from here.
"""
