"""Configuration of every Fathom model: a DeepSeek generation is a choice on three independent axes.

    token mixing      `token_mixers`      mha (multi-head / grouped-query attention), mla (multi-head latent attention)
    channel mixing    `channel_mixers`    dense (feed-forward network), moe (DeepSeekMoE), hash (routed by token id)
    residual          `hc_mult`           1 = plain residual stream, n > 1 = hyper-connections between n streams

Field names are those of DeepSeek's and transformers' own config.json files, so that an official DeepSeek-V3
`config.json` reads unchanged. `FathomConfig.preset("v3", size="nano")` derives a whole model from one dial.

Sources: DeepSeek-V2 (arXiv 2405.04434) for MLA, DeepSeekMoE (arXiv 2401.06066), DeepSeek-V3 (arXiv 2412.19437)
for sigmoid routing, the routing bias and multi-token prediction, Vaswani et al. (arXiv 1706.03762) for `classic`.
"""

from dataclasses import fields
from difflib import get_close_matches

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

TOKEN_MIXERS = ("mha", "mla")
CHANNEL_MIXERS = ("dense", "moe", "hash")

# What transformers takes in a config's constructor besides its fields.
TRANSFORMERS_ARGUMENTS = ("attn_implementation", "experts_implementation", "num_labels", "output_attentions")

# Width, depth, vocabulary and context of the sizes that are derived; every other number follows from the width.
SIZES = {
    "nano": {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 4096, "max_position_embeddings": 1024},
    "micro": {"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 8192, "max_position_embeddings": 2048},
    "small": {"hidden_size": 768, "num_hidden_layers": 16, "vocab_size": 16384, "max_position_embeddings": 4096},
}


def _classic(width: int) -> dict:
    """The plain transformer decoder: multi-head attention, ReLU feed-forward network, sinusoidal positions."""
    return {
        "token_mixers": "mha",
        "channel_mixers": "dense",
        "position_embedding_type": "sinusoidal",
        "num_attention_heads": width // 64,
        "head_dim": 64,
        "intermediate_size": 4 * width,
        "hidden_act": "relu",
        "mlp_gated": False,
        "num_nextn_predict_layers": 0,
    }


def _v3(width: int) -> dict:
    """DeepSeek-V3: MLA, fine-grained experts with one shared, sigmoid routing with a bias, one MTP layer."""
    return {
        "token_mixers": "mla",
        "num_attention_heads": width // 64,
        "q_lora_rank": 3 * width // 8,
        "kv_lora_rank": width // 4,
        "qk_nope_head_dim": 48,
        "qk_rope_head_dim": 16,
        "v_head_dim": 64,
        "intermediate_size": 5 * width // 2,
        "first_k_dense_replace": 1,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": width // 2,
        "n_group": 1,
        "topk_group": 1,
        # DeepSeek's 0.001 is for hundreds of thousands of steps; in a thousand it moves a bias by 1 at most.
        "router_bias_update_speed": 0.01,
        "num_nextn_predict_layers": 1,
    }


GENERATIONS = {"classic": _classic, "v3": _v3}

# DeepSeek-V3 section 4.2 and the release's config.json. The defaults of `FathomConfig` are its other fields.
OFFICIAL = {
    "v3-671b": {
        "generation": "v3",
        "max_position_embeddings": 163840,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    },
}


@strict
class FathomConfig(PreTrainedConfig):
    """Configuration of a Fathom model. The defaults are DeepSeek-V3 671B, as in transformers' `DeepseekV3Config`.

    Args:
        generation: name of the DeepSeek generation, for people; the model is built from the fields below alone.
        token_mixers: `mha` or `mla` for every layer, or a list with one entry per layer (MTP layers last).
        channel_mixers: `dense`, `moe` or `hash` for every layer, or such a list. `None`: the first `num_hash_layers`
            layers are `hash`, those of the first `first_k_dense_replace` that are not are dense, the others `moe`.
        hc_mult: number of residual streams; 1 is the plain residual connection.
        hc_sinkhorn_iters, hc_eps: steps and numerical floor of the projection on doubly stochastic matrices.
        position_embedding_type: `rope` (rotary) or `sinusoidal` (added to the embeddings; `mha` only).
        hidden_size, intermediate_size: width of the residual stream and of a dense feed-forward network.
        swiglu_limit: bound on the gate (from above) and on the other input (both sides) of gated networks.
        mlp_gated: dense networks are SwiGLU-like `down(act(gate x) * up x)`; `False`: `down(act(up x))`.
        num_hidden_layers: main layers, without MTP layers.
        num_attention_heads, num_key_value_heads, head_dim: heads; the last two matter to `mha` only (for `mla`
            `head_dim` is the rotary width, which is what transformers' rotary code expects).
        q_lora_rank, kv_lora_rank: widths of the compressed queries (`None`: not compressed) and keys/values.
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: per-head widths of MLA.
        rope_interleave: rotary pairs are neighbours `(x0, x1)`, as in DeepSeek's checkpoints; `False`: halves.
        rope_parameters: transformers' rotary settings (`rope_type`, `rope_theta`, YaRN keys).
        n_routed_experts, n_shared_experts, num_experts_per_tok, moe_intermediate_size: DeepSeekMoE.
        scoring_func: affinity of a token to an expert: `sigmoid`, or `sqrtsoftplus`, `sqrt(softplus(x))`.
        n_group, topk_group: experts are routed within the best `topk_group` of `n_group` groups.
        norm_topk_prob, routed_scaling_factor: normalisation and scale of the chosen experts' weights.
        router_bias_update_speed: step of the routing bias per optimizer step (auxiliary-loss-free balancing).
        seq_aux_loss_coef: weight of the sequence-wise balance loss (V3 eq. 17).
        num_nextn_predict_layers: multi-token-prediction layers, stored as `model.layers.{num_hidden_layers + k}`.
        mtp_loss_weight: weight of their mean loss in training (V3 section 2.2: 0.3, later 0.1).

    Raises:
        ValueError: the combination cannot work; the message says how to mend it.
    """

    model_type = "fathom"
    keys_to_ignore_at_inference = ["past_key_values", "mtp_loss", "balance_loss", "expert_counts"]
    attribute_map = {"num_local_experts": "n_routed_experts"}
    base_model_tp_plan = {
        "embed_tokens": "embedding_rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    generation: str = "v3"
    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    hc_mult: int = 1
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    max_position_embeddings: int = 4096

    token_mixers: str | list[str] = "mla"
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    position_embedding_type: str = "rope"
    rope_parameters: dict | None = None
    rope_interleave: bool = True

    channel_mixers: str | list[str] | None = None
    num_hash_layers: int = 0
    first_k_dense_replace: int = 3
    intermediate_size: int = 18432
    hidden_act: str = "silu"
    mlp_gated: bool = True
    swiglu_limit: float | int | None = None
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 2048
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 2.5
    router_bias_update_speed: float | int = 0.001
    seq_aux_loss_coef: float | int = 0.0001
    output_router_logits: bool = False

    num_nextn_predict_layers: int = 1
    mtp_loss_weight: float | int = 0.3

    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    pad_token_id: int | None = 2

    def __post_init__(self, **kwargs):
        self._check_layers()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.uses("mla"):
            self.head_dim = self.qk_rope_head_dim
        elif self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        self._check()

    @classmethod
    def preset(cls, generation: str, size: str = "nano", **overrides) -> "FathomConfig":
        """The configuration of a generation at a size, e.g. `preset("v3")` or `preset("v3", size="671b")`.

        Args:
            generation: `classic` or `v3`, or an official model by its full name (`v3-671b`).
            size: `nano` (seconds on a CPU), `micro`, `small`, or an official size of that generation.
            **overrides: any field of `FathomConfig`.

        Raises:
            ValueError: unknown generation, size or field (with the nearest names), or an impossible combination.
        """
        known = {field.name for field in fields(cls)} | set(cls.attribute_map) | set(TRANSFORMERS_ARGUMENTS)
        for name in overrides:
            if name not in known:
                raise ValueError(f"FathomConfig has no field {name!r}{_nearest(name, known)}")

        official = generation if generation in OFFICIAL else f"{generation}-{size}"
        if official in OFFICIAL:
            return cls(**{**OFFICIAL[official], **overrides})
        if generation not in GENERATIONS:
            names = [*GENERATIONS, *OFFICIAL]
            raise ValueError(f"unknown preset {generation!r}{_nearest(generation, names)}; known: {', '.join(names)}")
        if size not in SIZES:
            names = [*SIZES, *(name.split("-", 1)[1] for name in OFFICIAL if name.startswith(f"{generation}-"))]
            raise ValueError(f"unknown size {size!r} of {generation}{_nearest(size, names)}; known: {', '.join(names)}")
        shape = dict(SIZES[size])
        width = overrides.get("hidden_size", shape["hidden_size"])
        if not isinstance(width, int):
            raise ValueError(f"hidden_size={width!r} must be a whole number")
        derived = GENERATIONS[generation](width)
        return cls(**{"generation": generation, **shape, **derived, **overrides})

    def token_mixer(self, layer_idx: int) -> str:
        """Kind of token mixing of `model.layers.{layer_idx}`, MTP layers included."""
        return self.token_mixers if isinstance(self.token_mixers, str) else self.token_mixers[layer_idx]

    def channel_mixer(self, layer_idx: int) -> str:
        """Kind of channel mixing of `model.layers.{layer_idx}`, MTP layers included."""
        if self.channel_mixers is None:
            if layer_idx < self.num_hash_layers:
                return "hash"
            return "dense" if layer_idx < self.first_k_dense_replace else "moe"
        return self.channel_mixers if isinstance(self.channel_mixers, str) else self.channel_mixers[layer_idx]

    def uses(self, kind: str) -> bool:
        """Whether any layer, MTP layers included, mixes tokens or channels by `kind`."""
        layers = range(self.num_hidden_layers + self.num_nextn_predict_layers)
        return any(kind in (self.token_mixer(i), self.channel_mixer(i)) for i in layers)

    def _check_layers(self) -> None:
        self._check_positive(
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "hc_mult",
        )
        if self.num_nextn_predict_layers < 0:
            raise ValueError(f"num_nextn_predict_layers={self.num_nextn_predict_layers} must be 0 or more")
        layers = self.num_hidden_layers + self.num_nextn_predict_layers
        for field, kinds in (("token_mixers", TOKEN_MIXERS), ("channel_mixers", CHANNEL_MIXERS)):
            value = getattr(self, field)
            if isinstance(value, list) and len(value) != layers:
                raise ValueError(
                    f"{field} has {len(value)} entries for {self.num_hidden_layers} layers and "
                    f"{self.num_nextn_predict_layers} MTP layers; give one kind, or {layers} of them"
                )
            for kind in [value] if isinstance(value, str) else value or []:
                if kind not in kinds:
                    known = ", ".join(kinds)
                    raise ValueError(f"unknown kind {kind!r} in {field}{_nearest(kind, kinds)}; known: {known}")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def _check(self) -> None:
        """Raises on what cannot work, before a model is built from it."""
        for field, known in (
            ("position_embedding_type", ("rope", "sinusoidal")),
            ("scoring_func", ("sigmoid", "sqrtsoftplus")),
            ("topk_method", ("noaux_tc",)),
            ("hidden_act", tuple(ACT2FN)),
        ):
            value = getattr(self, field)
            if value not in known:
                raise ValueError(f"{field}={value!r} is not known{_nearest(value, known)}; known: {', '.join(known)}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id={self.pad_token_id} must be below vocab_size={self.vocab_size}; "
                f"raise vocab_size, or set pad_token_id to such a token or None"
            )
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout={self.attention_dropout} must be at least 0 and below 1")
        if self.position_embedding_type == "rope":
            self._check_rope()
        if self.hc_mult > 1:
            self._check_positive("hc_sinkhorn_iters")
            if self.hc_eps <= 0:
                raise ValueError(f"hc_eps={self.hc_eps} must be above 0")
        if self.uses("mla"):
            self._check_mla()
        if self.uses("mha"):
            self._check_mha()
        if self.uses("dense"):
            self._check_positive("intermediate_size")
        if self.uses("moe") or self.uses("hash"):
            self._check_moe()
        if self.swiglu_limit is not None and self.swiglu_limit <= 0:
            raise ValueError(f"swiglu_limit={self.swiglu_limit} must be above 0, or None: no limit")

    def _check_rope(self) -> None:
        rope = self.rope_parameters or {}
        kind, known = rope.get("rope_type", "default"), ("default", *ROPE_INIT_FUNCTIONS)
        if kind not in known:
            raise ValueError(f"rope_type={kind!r} is not known{_nearest(kind, known)}; known: {', '.join(known)}")
        factor = rope.get("factor")
        if kind in ("linear", "dynamic", "yarn", "llama3") and not (isinstance(factor, float | int) and factor >= 1):
            raise ValueError(f"rope_type={kind!r} needs a factor of at least 1 in rope_parameters, not {factor!r}")

    def _check_mla(self) -> None:
        if self.position_embedding_type != "rope":
            raise ValueError("token_mixers 'mla' rotates part of each head; set position_embedding_type='rope'")
        self._check_positive("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"q_lora_rank={self.q_lora_rank} must be at least 1, or None: uncompressed")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: rotary dimensions come in pairs")
        if self.uses("mha"):
            raise ValueError("mha and mla layers in one model would need two rotary widths; choose one for all layers")

    def _check_mha(self) -> None:
        self._check_positive("num_key_value_heads")
        heads, key_heads, width = self.num_attention_heads, self.num_key_value_heads or 1, self.head_dim or 0
        if heads % key_heads:
            raise ValueError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={key_heads}")
        if width < 1:
            raise ValueError(f"hidden_size={self.hidden_size} is below num_attention_heads={heads}; set head_dim")
        if self.position_embedding_type == "rope" and width % 2:
            raise ValueError(f"head_dim={width} must be even: rotary dimensions come in pairs")

    def _check_moe(self) -> None:
        self._check_positive("moe_intermediate_size")
        experts, groups, kept, chosen = self.n_routed_experts, self.n_group, self.topk_group, self.num_experts_per_tok
        if not 1 <= chosen <= experts:
            raise ValueError(f"num_experts_per_tok={chosen} must be between 1 and n_routed_experts={experts}")
        if groups < 1 or experts % groups:
            raise ValueError(f"n_routed_experts={experts} must be a multiple of n_group={groups}")
        if not 1 <= kept <= groups:
            raise ValueError(f"topk_group={kept} must be between 1 and n_group={groups}")
        if groups > 1 and experts // groups < 2:
            raise ValueError(
                f"n_group={groups} leaves {experts // groups} expert per group, but a group is scored by its best two; "
                f"set n_group to {experts // 2} or less"
            )
        if chosen > kept * (experts // groups):
            raise ValueError(
                f"num_experts_per_tok={chosen} does not fit topk_group={kept} groups of {experts // groups} experts; "
                f"raise topk_group or lower num_experts_per_tok"
            )
        if self.n_shared_experts < 0:
            raise ValueError(f"n_shared_experts={self.n_shared_experts} must be 0 or more")


def _nearest(name: str, known) -> str:
    nearest = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""
