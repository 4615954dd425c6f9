"""TRL's SFTTrainer on the model's own loss.

TRL (1.16) runs the layers alone and computes the next-token loss by itself, past the model's forward: MTP layers and
balance losses would be left out. `RouterBiasCallback` comes along.

    pip install 'fathom-lm[trl]'
"""

from transformers import Trainer
from trl import SFTTrainer

from .trainer import RouterBiasCallback


class FathomSFTTrainer(SFTTrainer):
    """Arguments as for TRL's SFTTrainer. Of its metrics, entropy and token accuracy are not logged."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(RouterBiasCallback())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            inputs = {**inputs, "skip_logits": True}
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


__all__ = ["FathomSFTTrainer"]
