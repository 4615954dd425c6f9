"""Numbers that must stay in fp32 whatever dtype the model is cast to."""

from torch import nn


class KeepsFloat32Buffers(nn.Module):
    """A module whose own fp32 buffers stay fp32 under `.to(bf16)`, `.half()` and the like.

    bf16 has 8 bits: steps of 0.001 on a routing bias of 5 vanish, and the rotary angle of position 1000 is off by
    radians. `from_pretrained(dtype=...)` is no danger to them, `Module.to` is.
    """

    def _apply(self, fn, recurse=True):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype != buffer.dtype:
                setattr(self, name, buffer.to(after.device))
        return self
