"""The models that run transformers' mixins: every generation small, as Fathom has it and as transformers has it.

A generation that transformers knows too is described once, in transformers' names; Fathom reads it as it reads an
official config.json. So both are the same network, but for the MTP layers, which only Fathom has.
"""

from typing import Any

import torch
import transformers
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.models.auto import modeling_auto
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from fathom import (
    FathomConfig,
    FathomForCausalLM,
    FathomForSequenceClassification,
    FathomForTokenClassification,
    FathomModel,
)

COMMON: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    **COMMON,
    **EXPERTS,
    "num_key_value_heads": 4,
    "intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# transformers' class names start with the key's name; the values are arguments of its config.
STOCK: dict[str, dict[str, Any]] = {
    "DeepseekV2": {**LATENT, "topk_method": "group_limited_greedy"},
    "DeepseekV3": LATENT,
    "DeepseekV32": {**LATENT, "index_n_heads": 4, "index_head_dim": 32, "index_topk": 4},
    "DeepseekV4": {
        **COMMON,
        **EXPERTS,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "head_dim": 32,
        "partial_rotary_factor": 0.25,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"heavily_compressed_attention": 4, "compressed_sparse_attention": 2},
        "mlp_layer_types": ["moe", "moe"],
        "sliding_window": 8,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 2,
    },
}


class ModelTester:
    """What the mixins ask of a model: a configuration, inputs and classes.

    Args:
        classes: base model, language model, and the classifiers where there are any.
        make_config: makes a new configuration.
    """

    batch_size = 13
    seq_length = 7
    is_training = True
    num_labels = 3

    def __init__(self, classes, make_config):
        self.all_model_classes = tuple(classes)
        self.base_model_class, self.causal_lm_class = classes[:2]
        self.sequence_classification_class = classes[2] if len(classes) > 2 else None
        self.get_config = make_config
        config = make_config()
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads
        self.vocab_size = config.vocab_size
        self.pad_token_id = config.pad_token_id

    def prepare_config_and_inputs_for_common(self):
        input_ids = torch.randint(self.vocab_size, (self.batch_size, self.seq_length))
        # Row i has i + 1 real tokens, then padding on the right.
        return self.get_config(), {"input_ids": input_ids, "attention_mask": input_ids.new_ones(input_ids.shape).tril()}


FATHOM_CLASSES = (FathomModel, FathomForCausalLM, FathomForSequenceClassification, FathomForTokenClassification)


def stock_config(name: str) -> transformers.PreTrainedConfig:
    return getattr(transformers, f"{name}Config")(**STOCK[name])


def stock(name: str) -> ModelTester:
    """transformers' model of a generation."""
    heads = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
    classes = [getattr(transformers, name + head) for head in heads if hasattr(transformers, name + head)]
    return ModelTester(classes, lambda: stock_config(name))


def same_as_stock(name: str, **more) -> ModelTester:
    """Fathom's model of the same generation; `more` are fields that transformers' configuration has not."""
    return ModelTester(FATHOM_CLASSES, lambda: FathomConfig.from_dict({**stock_config(name).to_dict(), **more}))


def preset(generation: str, **fields) -> ModelTester:
    """Fathom's model of a generation that transformers does not have."""
    return ModelTester(FATHOM_CLASSES, lambda: FathomConfig.preset(generation, **{**COMMON, **fields}))


def register_class_names() -> None:
    """The mixins look up by a class's name whether it takes labels and of what shape; unknown names skip silently."""
    for names, model_class in zip(
        (
            modeling_auto.MODEL_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        ),
        FATHOM_CLASSES,
        strict=True,
    ):
        names["fathom"] = model_class.__name__


def evaluate_annotations() -> None:
    """The mixins read from an annotation whether attentions can be asked for. That of transformers' classifiers, of all
    models, is text: the comparison of attentions under eager and SDPA would skip every model that has classifiers."""
    for classifier in (GenericForSequenceClassification, GenericForTokenClassification):
        classifier.forward.__annotations__["kwargs"] = Unpack[TransformersKwargs]
