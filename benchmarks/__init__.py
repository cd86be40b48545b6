"""The benchmark suite, `python -m fusedres bench`. Installed as fusedres.benchmarks; the library never imports it.

`run` decides what is measured: time by `measure` (`cases`, `providers`, `workload`, checked by `parity`, timed by
`timing`, beside the device's `state`), `bytes_level` (`traffic` and `meter` for the kernels, `network` for eager,
`inductor` for torch.compile), `code` (`compile_only`, and `compile_time` for whole steps), `executed` (`ptx`, in a
checkout only), `host` (`stub_driver`). `record` keeps rows in files, `report`, `plots` and `changes` read them.
"""
