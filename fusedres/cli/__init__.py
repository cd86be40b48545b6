"""The command line, `fusedres {env,explain,compare,warm,bench}` or `python -m fusedres ...`. The library never imports
it.

`main` runs a command and turns errors into lines; `arguments` is all that may be said to one, and imports nothing
heavy, so that `--help` and mistakes are answered at once. A command is a file: `env`, `explain`, `compare`, `warm`
(with `ahead` and `shapes`), `bench` (which drives fusedres.benchmarks). What `compare` is made of: `models` and `data`
(what is trained), `training` (one model's steps), `experiment` (two of them over the same batches), `differences` (how
far they are apart), `summary` and `record` (medians, tables, JSON), `picture` (the plot).
"""
