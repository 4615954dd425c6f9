"""`FathomTrainer`: transformers' Trainer with what a mixture of experts and an honest report need.

the plain Trainer + RouterBiasCallback()   trains the same weights
FathomTrainer                              adds the callback by itself, logs MTP loss and expert load, evaluates in
                                           bits per byte, saves when a signal comes, never loses a checkpoint to a full
                                           disk or a power cut, and stops before a step that is not finite
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.distributed.fsdp import MixedPrecisionPolicy, StateDictType
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..modeling.multi_token_prediction import targets_ahead
from .checkpoints import TRAINER_STATE, write_run
from .diagnostics import StreamProbe, balance_by_layer, load_ratio, router_layers
from .flops import training_flops_per_token
from .guard import StepGuard
from .interruption import EvaluationStopped, InterruptCallback
from .packing import IGNORED
from .resumable import partial as partial_folder
from .resumable import rotate, whole_or_nothing
from .router_bias import RouterBiasCallback
from .secrecy import public


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
        self.router_bias = RouterBiasCallback(warn=False)
        self.interrupt = InterruptCallback()
        self.add_callback(self.router_bias)
        self.add_callback(self.interrupt)
        self.token_bytes = None if token_bytes is None else torch.tensor(token_bytes)
        self._train_sums: dict[str, Any] = defaultdict(float)
        self._eval_sums: dict[str, Any] = defaultdict(float)
        self._stream_metrics: dict[str, float] = {}
        self._whole: set[Path] = set()  # checkpoints that are known to be
        self._saving = False

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
        if (best := self.state.best_model_checkpoint) and not Path(best).exists():
            # A checkpoint names it without its path.
            self.state.best_model_checkpoint = str(Path(self.args.output_dir) / Path(best).name)
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

    def _evaluate(self, *args, **kwargs) -> dict[str, float]:
        try:
            return super()._evaluate(*args, **kwargs)
        except EvaluationStopped:
            # What the Trainer sets by the end of an evaluation: it asks again after the last step.
            self.control.should_evaluate = False
            self.control.should_save = self.control.should_training_stop = True
            return {}

    def _determine_best_metric(self, metrics, trial) -> bool:
        return bool(metrics) and super()._determine_best_metric(metrics=metrics, trial=trial)

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
        if self.interrupt.depth and self.interrupt.agree(self.args.device):
            raise EvaluationStopped
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

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            # The Trainer's pickle of its arguments: it holds tokens and paths, and nothing reads it.
            Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def save_checkpoint(self) -> None:
        """Saves a checkpoint of the step that was taken last, if there is none yet; call it on all ranks."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if not folder.exists():
            self._save_checkpoint(self.model, trial=None)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial=trial)
        return str(partial_folder(Path(folder) / "checkpoint").parent) if self._saving else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Once it is whole; until then it lies elsewhere.
        if not self._saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial):
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        with whole_or_nothing(folder) if self.args.should_save else nullcontext() as written:
            if self.record is not None and written is not None:
                write_run(written, self.record(self.state))
            self.accelerator.wait_for_everyone()
            self._saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving = False
            if written is not None:
                hide_paths(written / TRAINER_STATE)
            # What is sealed now are the files of all ranks.
            self.accelerator.wait_for_everyone()
        self.accelerator.wait_for_everyone()
        self._after_saving(run_dir, folder)

    def _after_saving(self, run_dir: Path, folder: Path) -> None:
        """What the Trainer does with a checkpoint that is there: name the best one, push, remove old ones."""
        if self.state.best_global_step and (best := run_dir / f"checkpoint-{self.state.best_global_step}").exists():
            self.state.best_model_checkpoint = str(best)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            self._whole.add(folder.absolute())
            best_one = self.state.best_model_checkpoint
            rotate(run_dir, self.args.save_total_limit, {folder, *([Path(best_one)] if best_one else [])}, self._whole)


def hide_paths(file: Path) -> None:
    """Takes secrets and absolute paths out of the Trainer's state, which has one in `best_model_checkpoint`."""
    state = json.loads(file.read_text(encoding="utf-8"))
    if (safe := public(state)) != state:
        file.write_text(json.dumps(safe, indent=2, sort_keys=True) + "\n", encoding="utf-8")


__all__ = ["FathomTrainer", "InterruptCallback", "RouterBiasCallback", "TrainingArguments"]
