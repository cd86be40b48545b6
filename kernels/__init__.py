"""Triton kernels: tensors in, tensors out. No autograd, no modules, no operator registration.

Four passes over memory, a kernel and a launcher each (`stats`, `apply`, `grad_reduce`, `grad_apply`), and the small
steps between them (`finalize`); where maps are small, a direction in one launch (`forward`, `backward`). What is
shared: `tile` (the index map), `moments`, `activation`, `bits`; and on the host `chip` (what the device is), `layout`
(what the strides are), `launch` (which tile it gets), `plan` (what a call allocates and launches, decided once),
`start` and `bind` (a kernel on its way to the driver), `memory`.
"""

if __name__ != "fusedres.kernels":
    raise ImportError(
        f"{__name__!r} is fusedres.kernels: run `pip install -e .` and import it by that name"
    )
