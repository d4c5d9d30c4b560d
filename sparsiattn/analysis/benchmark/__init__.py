"""Time, in paired runs: `bench` of whole models, `measure_sites` of each site, `tune` of kernels.

`tuning` fits the prices that kernels are chosen by. `profile`, the command line and the root of the
package import from here.
"""
