"""Whether the host may look at what a tensor holds.

An accelerator works through a queue that the host fills ahead of it. `.item()`, `.tolist()`, `nonzero`, an index of
booleans and `if tensor` ask for numbers that are still to be computed: the host waits until the queue is empty, and
then the accelerator waits for the host. Once per layer, that is most of a decoding step.

On a CPU the numbers are there, and knowing them saves work: no mask where nothing is padding, only as many compressed
entries as there are. So some functions have two ways with the same result, and choose by `host_can_read`: one reads,
the other takes shapes from numbers that Python has (lengths, widths) and masks what is not there.
"""

import torch

# Types of devices whose tensors can be read without waiting.
READABLE = ("cpu",)


def host_can_read(tensor: torch.Tensor) -> bool:
    """Whether Python may read the numbers of a tensor: not those of an accelerator, nor in a graph that is made."""
    return tensor.device.type in READABLE and not torch.compiler.is_compiling()
