"""The command line, `python -m fusedres {env,explain,compare,bench}`. The library never imports it.

A command is a file: `env`, `explain`, `compare`, `bench` (which drives fusedres.benchmarks). What `compare` is made of:
`models` and `data` (what is trained), `training` (one model's steps), `experiment` (two of them over the same batches),
`differences` (how far they are apart), `summary` and `record` (medians, tables, JSON), `picture` (the plot).
"""
