"""`FathomTrainer`: transformers' Trainer with what a mixture of experts and an honest report need.

the plain Trainer + RouterBiasCallback()   trains the same weights
FathomTrainer                              adds the callback by itself, logs MTP loss and expert load, evaluates in
                                           bits per byte, saves on Ctrl-C, never loses a checkpoint to a full disk,
                                           and stops before a step that is not finite
"""

import math
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch.distributed.fsdp import MixedPrecisionPolicy, StateDictType
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..modeling.multi_token_prediction import targets_ahead
from .checkpoints import whole_or_nothing, write_run
from .diagnostics import StreamProbe, balance_by_layer, load_ratio, router_layers
from .flops import training_flops_per_token
from .guard import StepGuard
from .packing import IGNORED


class RouterBiasCallback(TrainerCallback):
    """Moves the routing biases once per optimizer step, whatever the gradient accumulation.

    With the plain Trainer: `Trainer(..., callbacks=[RouterBiasCallback()])`.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begins the sums for the log anew."""
        self.load: torch.Tensor | None = None  # [routers, E]
        self.max_vio: torch.Tensor | float = 0.0  # mean over routers, summed over optimizer steps
        self.steps = 0

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        load = model.update_router_bias() if hasattr(model, "update_router_bias") else None
        if load is not None:
            self.load = load if self.load is None else self.load + load
            self.max_vio = self.max_vio + load_ratio(load).mean() - 1
            self.steps += 1


class InterruptCallback(TrainerCallback):
    """Ctrl-C (SIGINT) or SIGTERM ends training at the next step boundary, with a checkpoint; a second one at once.

    Attributes:
        asked: whether this process had a signal. torchrun sends one to each, now and then some steps apart.
        interrupted: whether any process had, and all know it.
    """

    def __init__(self) -> None:
        self.asked = self.interrupted = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the two signals over for the duration of the block; Python allows that in the main thread alone."""
        self.asked = self.interrupted = False
        previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\ninterrupted: saving after this step (once more to stop at once)", flush=True)

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.interrupted = self.asked
        if dist.is_available() and dist.is_initialized():
            # A signal reaches the processes at different steps, or only one of them; they must stop at the same.
            anyone = torch.tensor(float(self.asked), device=args.device)
            dist.all_reduce(anyone, dist.ReduceOp.MAX)
            self.interrupted = bool(anyone)
        if self.interrupted:
            control.should_save = control.should_training_stop = True


def multistep_factor(step: int, warmup: int, steps: int) -> float:
    """Share of the peak learning rate that DeepSeek LLM's multi-step schedule has at a step, counted from 0."""
    if step < warmup:
        return step / warmup
    return 1.0 if step < 0.8 * steps else 0.316 if step < 0.9 * steps else 0.1


class FathomTrainer(Trainer):
    """Trains a Fathom model.

    Args:
        token_bytes: UTF-8 bytes that each token id stands for (`tokenizer.token_byte_lengths`). With it, evaluation
            reports `eval_bits_per_byte`.
        multistep: after the warm-up a constant learning rate, 0.316 of it from 80 % of the steps on and 0.1 from 90 %
            (DeepSeek LLM, arXiv 2401.02954, section 2.3), in place of `lr_scheduler_type`.
        spike_factor: a loss above so many times its recent median ends training (`guard.StepGuard`); 0: none does.
        record: gives the content of the run.json that every checkpoint gets, for the Trainer's state.
        *args, **kwargs: as for transformers' Trainer.

    Logged besides the Trainer's own, whose `loss` is the whole training loss, as means over all that was seen since
    the last log:

        mtp_loss          nats per target of the MTP layers
        indexer_loss      nats per target, mean over the indexers
        balance_loss      per sequence
        expert_load       busiest expert over mean, averaged over layers
        max_vio_batch     the same minus 1, of every optimizer step by itself
        ..._layer_N       balance of each layer (`diagnostics.balance_by_layer`)

    In evaluation of a language model `loss` is the next token's cross-entropy in nats per target, exact over the whole
    set; besides it there are `targets`, `perplexity`, `bits_per_byte`, `expert_load_worst_layer`, all of the above, and

        indexer_recall, indexer_mass, ...   shares of the attention that indexers, the most recent and random keys
                                            capture, where there is a choice (`indexing.REPORT`)
        amax_gain_forward, ...              what `diagnostics.StreamProbe` sees in the first batch
    """

    def __init__(
        self,
        *args,
        token_bytes: list[int] | None = None,
        multistep: bool = False,
        spike_factor: float = 0.0,
        record: Callable[[TrainerState], dict[str, Any]] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.multistep = multistep
        self.record = record
        self.guard = StepGuard(spike_factor)
        self.router_bias = RouterBiasCallback()
        self.interrupt = InterruptCallback()
        self.add_callback(self.router_bias)
        self.add_callback(self.interrupt)
        self.token_bytes = None if token_bytes is None else torch.tensor(token_bytes)
        self._train_sums: dict[str, Any] = defaultdict(float)
        self._eval_sums: dict[str, Any] = defaultdict(float)
        self._stream_metrics: dict[str, float] = {}

    @property
    def is_language_model(self) -> bool:
        """Whether the model is Fathom's language model: of its models that alone drafts."""
        return hasattr(self.model, "drafts")

    @property
    def interrupted(self) -> bool:
        """Whether the last `train()` was ended by a signal."""
        return self.interrupt.interrupted

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        with self.interrupt.listening():
            return super().train(resume_from_checkpoint, **kwargs)

    def _run_epoch(self, *args, **kwargs) -> None:
        # The Trainer looks at the number of steps after a step: resumed at its end, a run would take one too many.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled and self.args.bf16:
            # accelerate's own policy also adds up gradients in bf16, and casts to it what modules return: the loss, and
            # expert counts, which above 256 would be wrong.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.note(inputs, loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        # What the Trainer does last before the optimizer's step, on all ranks.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.guard.check(self, grad_norm)
        return grad_norm

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Taken now: with label smoothing, the Trainer takes the labels out of the inputs.
        labels, position_ids = inputs.get("labels"), inputs.get("position_ids")
        needs_logits = self.label_smoother is not None or self.compute_loss_func is not None
        if model.training and self.is_language_model and not needs_logits:
            inputs = {**inputs, "skip_logits": True}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.label_smoother is not None and labels is not None:
            # The Trainer's smoothed loss is a mean over targets, NaN where there are none.
            targets = labels[:, 1:] if self.is_language_model else labels
            loss = torch.where((targets != IGNORED).any(), loss, 0.0)
        if model.training and (mtp_loss := getattr(outputs, "mtp_loss", None)) is not None:
            targets = self._mtp_targets(labels, position_ids)
            # A mean, unless the number of targets of the whole optimizer step was given to divide the sum by.
            divisor = targets if num_items_in_batch is None else num_items_in_batch
            self._train_sums["mtp_nats"] += mtp_loss.detach().float() * divisor
            self._train_sums["mtp_targets"] += targets
        if model.training and (figures := getattr(outputs, "indexer_figures", None)) is not None:
            targets = (labels[:, 1:] != IGNORED).sum()
            divisor = targets if num_items_in_batch is None else num_items_in_batch
            self._train_sums["indexer_nats"] += figures["loss"].detach() * divisor
            self._train_sums["indexer_targets"] += targets
        if model.training and (balance_loss := getattr(outputs, "balance_loss", None)) is not None:
            self._train_sums["balance"] += balance_loss.detach().float() * len(labels)
            self._train_sums["rows"] += len(labels)
        return (loss, outputs) if return_outputs else loss

    def _mtp_targets(self, labels: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        """How many targets the MTP layers have in labels [B, T], mean over their depths."""
        if position_ids is None:
            position_ids = torch.arange(labels.shape[1], device=labels.device).unsqueeze(0)
        depths = self.model.config.num_nextn_predict_layers
        targets = [targets_ahead(labels, position_ids, depth) for depth in range(1, depths + 1)]
        return (torch.stack(targets) != IGNORED).sum() / depths

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._training_metrics())
        super().log(logs, start_time)

    def _training_metrics(self) -> dict[str, float]:
        """Means since the last log. All ranks log at the same steps, so collective calls are safe here."""
        metrics = {}
        names = sorted(self._train_sums)
        totals = [torch.as_tensor(self._train_sums[name], device=self.args.device).float() for name in names]
        sums = dict(zip(names, self.accelerator.reduce(torch.stack(totals), "sum"), strict=True)) if names else {}
        self._train_sums.clear()
        for name, total, count in (
            ("mtp_loss", "mtp_nats", "mtp_targets"),
            ("indexer_loss", "indexer_nats", "indexer_targets"),
            ("balance_loss", "balance", "rows"),
        ):
            if count in sums:
                metrics[name] = (sums[total] / sums[count].clamp(min=1)).item()
        load = self.router_bias.load
        if load is not None and load.any():
            metrics["expert_load"] = load_ratio(load).mean().item()
            metrics["max_vio_batch"] = float(self.router_bias.max_vio / self.router_bias.steps)
            metrics |= balance_by_layer(load, router_layers(self.model))
        self.router_bias.reset()
        return metrics

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.multistep and getattr(self, "lr_scheduler", None) is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            factor = partial(multistep_factor, warmup=warmup, steps=num_training_steps)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        ids = inputs["input_ids"]
        return int(training_flops_per_token(self.accelerator.unwrap_model(self.model), ids.shape[1]) * ids.numel())

    def get_decay_parameter_names(self, model) -> list[str]:
        """Matrices alone: no decay of norms, biases and whatever else has fewer than two dimensions."""
        decayed = set(super().get_decay_parameter_names(model))
        return [name for name, parameter in model.named_parameters() if name in decayed and parameter.dim() > 1]

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self._eval_sums.clear()
        self._stream_metrics.clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._eval_metrics().items()}
        return EvalLoopOutput(
            output.predictions, output.label_ids, {**(output.metrics or {}), **metrics}, output.num_samples
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # A classifier is evaluated as the Trainer does it.
        if not prediction_loss_only or "labels" not in inputs or not self.is_language_model:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        rows = self._rows_to_count(len(inputs["labels"]))
        # A rank that has none left runs one all the same: a sharded model needs all ranks.
        inputs = {name: value[: max(rows, 1)] for name, value in inputs.items()}
        probe = StreamProbe(self.model)
        # The first batch speaks for all.
        watching = nullcontext() if self._eval_sums else probe
        with torch.no_grad(), self.compute_loss_context_manager(), watching:
            # Divided by 1, the losses are sums, and sums over batches of any size can be added up.
            outputs = model(**inputs, num_items_in_batch=1, skip_logits=True)
        self._stream_metrics |= probe.metrics()
        if rows == 0:
            return None, None, None
        labels = inputs["labels"]
        targets = labels[:, 1:][labels[:, 1:] != IGNORED]
        sums = {"nats": outputs.loss, "targets": torch.tensor(float(len(targets)))}
        if self.token_bytes is not None:
            sums["bytes"] = self.token_bytes.to(targets.device)[targets].sum()
        if outputs.mtp_loss is not None:
            sums["mtp_nats"] = outputs.mtp_loss
            sums["mtp_targets"] = self._mtp_targets(labels, inputs.get("position_ids"))
        if outputs.indexer_figures is not None:
            sums |= {f"indexer_{name}": value for name, value in outputs.indexer_figures.items()}
        if outputs.expert_counts is not None:
            sums["load"] = outputs.expert_counts
        for name, value in sums.items():
            self._eval_sums[name] += value.detach().cpu().double()
        return None, None, None

    def _rows_to_count(self, rows: int) -> int:
        """How many of this batch's rows come first here, and were not read again to give all ranks equal batches.

        The ranks' last batches, one behind the other, hold `remainder` rows and then repeated ones, as in accelerate's
        `gather_for_metrics`.
        """
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(max(state.remainder - self.args.process_index * rows, 0), rows)

    def _eval_metrics(self) -> dict[str, float]:
        sums: dict[str, Any] = defaultdict(float)
        for of_one_rank in gather_object([dict(self._eval_sums)]):
            for name, value in of_one_rank.items():
                sums[name] += value
        if not sums:
            return {}
        loss = float(sums["nats"] / sums["targets"].clamp(min=1))
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 100.0)), "targets": int(sums["targets"])}
        if "bytes" in sums:
            metrics["bits_per_byte"] = float(sums["nats"] / sums["bytes"].clamp(min=1)) / math.log(2)
        if "mtp_nats" in sums:
            metrics["mtp_loss"] = float(sums["mtp_nats"] / sums["mtp_targets"].clamp(min=1))
        if "indexer_loss" in sums:
            metrics["indexer_loss"] = float(sums["indexer_loss"] / sums["targets"].clamp(min=1))
            for name in ("recall", "mass", "recent_recall", "recent_mass", "random"):
                metrics[f"indexer_{name}"] = float(sums[f"indexer_{name}"] / sums["indexer_chooses"].clamp(min=1e-9))
        if "load" in sums:
            ratio = load_ratio(sums["load"])
            metrics["expert_load"] = ratio.mean().item()
            metrics["expert_load_worst_layer"] = ratio.max().item()
            metrics |= balance_by_layer(sums["load"], router_layers(self.model)[: len(ratio)])
        return metrics | self._stream_metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; with a sharded state dict also a whole model, except in checkpoints."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or plugin.state_dict_type != StateDictType.SHARDED_STATE_DICT:
            super().save_model(output_dir, _internal_call)
        elif not _internal_call:
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        elif self.args.should_save and output_dir is not None:
            self.model.config.save_pretrained(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The file that marks a checkpoint as complete comes next; it must not come before another rank's.
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with whole_or_nothing(folder) if self.args.should_save else nullcontext():
            if self.record is not None and self.args.should_save:
                # First: with its last file the Trainer takes the checkpoint for complete, and removes older ones.
                folder.mkdir(parents=True)
                write_run(folder, self.record(self.state))
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)


__all__ = ["FathomTrainer", "InterruptCallback", "RouterBiasCallback", "TrainingArguments"]
