"""TRL's SFTTrainer on the model's own loss.

TRL (1.16) runs the layers alone and computes the next-token loss by itself, past the model's forward: its own trainers
leave MTP layers and balance losses out, and move routing biases with `RouterBiasCallback()`, which comes along here.

    pip install 'fathom-lm[trl]'
"""

from transformers import Trainer
from trl import SFTTrainer

from .errors import UserError
from .trainer import RouterBiasCallback


class FathomSFTTrainer(SFTTrainer):
    """Arguments as for TRL's SFTTrainer. Of its metrics, entropy and token accuracy are not logged.

    Raises:
        UserError: the arguments ask for a loss that is not the model's own.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        other = self.label_smoother or self.compute_loss_func  # type: ignore[has-type]
        if self.args.loss_type != "nll" or other is not None:
            raise UserError(
                "FathomSFTTrainer trains by the model's own loss: leave loss_type, label_smoothing_factor and "
                "compute_loss_func as they are, or use TRL's SFTTrainer, which trains no MTP layers"
            )
        self.add_callback(RouterBiasCallback())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            inputs = {**inputs, "skip_logits": True}
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


__all__ = ["FathomSFTTrainer"]
