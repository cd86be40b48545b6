"""The operators: what `torch.library` knows of, what runs them, and how they stand in autograd.

A file an operator, each with the same parts in the same order: what it computes; schema; forward; backward; the same in
plain PyTorch; shapes; the operators; second derivatives; autograd. What is said once about all of them:

    operator  an operator from its description: schema, devices, fake, vmap rule, plans
    tail      eager calls of a block's tail, straight from a look-up to the launches
    straight  when a call may go past `torch.ops`
    norm      the values that travel together
    graph     second derivatives; masks  one bit an element; skips  a second gradient; batching  vmap
"""

from . import add, batch_norm_act, dual, preactivation, projection, scaled, sync

__all__ = ["add", "batch_norm_act", "dual", "preactivation", "projection", "scaled", "sync"]
