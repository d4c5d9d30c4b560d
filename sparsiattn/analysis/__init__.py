"""What a patch does and costs: `inspect`, `profile`, `bench`, `tune`, `search`, `show`.

May import training, patching and what stands below them; `testing`, the command line and the root
of the package import from here.
"""
