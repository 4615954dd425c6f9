"""Configuration of every Fathom model: a DeepSeek generation is a choice on three independent axes.

    token mixing      `token_mixers`      mha (multi-head / grouped-query attention), mla (multi-head latent attention),
                                          dsa (mla over the keys that an indexer selects), swa (sliding window),
                                          csa and hca (window and compressed past)
    channel mixing    `channel_mixers`    dense (feed-forward network), moe (DeepSeekMoE), hash (routed by token id)
    residual          `hc_mult`           1 = plain residual stream, n > 1 = hyper-connections between n streams

Field names are those of DeepSeek's and transformers' own config.json files, so that an official `config.json`
(DeepSeekMoE, V2, V3, V3.2, V4) reads unchanged. `FathomConfig.preset("v3", size="nano")` derives a whole model from
one dial; the numbers stand in `presets`.

Sources: DeepSeekMoE (arXiv 2401.06066), DeepSeek-V2 (arXiv 2405.04434) for MLA and routing within groups, DeepSeek-V3
(arXiv 2412.19437) for sigmoid routing, the routing bias and multi-token prediction, DeepSeek-V3.2 (arXiv 2512.02556)
for sparse attention, the DeepSeek-V4 report for windows, compressed entries and hash routing, Vaswani et al. (arXiv
1706.03762) for `classic`.
"""

from dataclasses import fields
from difflib import get_close_matches

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .config_limits import check_names, check_numbers, check_rope_numbers
from .official_config import read_official
from .presets import GENERATIONS, OFFICIAL, SIZES

COMPRESSED_MIXERS = ("swa", "csa", "hca")
TOKEN_MIXERS = ("mha", "mla", "dsa", *COMPRESSED_MIXERS)
CHANNEL_MIXERS = ("dense", "moe", "hash")

# transformers' names in its DeepSeek-V4 configuration.
V4_LAYER_TYPES = {
    "sliding_attention": "swa",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}

# What a config of transformers holds about how a model is run, and not about what it is.
RUN_BY_CALLER = {
    *("use_cache", "attn_implementation", "experts_implementation", "return_dict", "output_attentions"),
    *("output_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder"),
}

# What transformers takes in a config's constructor besides its fields.
TRANSFORMERS_ARGUMENTS = ("attn_implementation", "experts_implementation", "num_labels", "output_attentions")


@strict
class FathomConfig(PreTrainedConfig):
    """Configuration of a Fathom model. The defaults are DeepSeek-V3 671B, as in transformers' `DeepseekV3Config`.

    Args:
        generation: name of the DeepSeek generation, for people; the model is built from the fields below alone.
        token_mixers: one kind for every layer, or a list with one entry per layer (MTP layers last). `None`: V4's
            schedule, two `swa` layers, then `csa` and `hca` in turn, `swa` in MTP layers.
        channel_mixers: `dense`, `moe` or `hash` for every layer, or such a list. `None`: the first `num_hash_layers`
            layers are `hash`, those of the first `first_k_dense_replace` that are not are dense, the others `moe`.
        hc_mult: number of residual streams; 1 is the plain residual connection.
        hc_sinkhorn_iters, hc_eps: steps and numerical floor of the projection on doubly stochastic matrices.
        position_embedding_type: `rope` (rotary) or `sinusoidal` (added to the embeddings; `mha` only).
        hidden_size, intermediate_size: width of the residual stream and of a dense feed-forward network.
        swiglu_limit: bound on the gate (from above) and on the other input (both sides) of gated networks.
        mlp_gated: dense networks are SwiGLU-like `down(act(gate x) * up x)`; `False`: `down(act(up x))`.
        num_hidden_layers: main layers, without MTP layers.
        num_attention_heads, num_key_value_heads, head_dim: heads; the last two do not matter to `mla` and `dsa` (there
            `head_dim` is the rotary width, which is what transformers' rotary code expects).
        q_lora_rank, kv_lora_rank: widths of the compressed queries (`None`: not compressed) and keys/values.
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: per-head widths of MLA.
        sliding_window: newest tokens that a query of a `swa`, `csa` or `hca` layer sees one by one, itself included;
            `None` without such layers.
        compress_rate_csa, compress_rate_hca: older tokens per compressed entry.
        compress_rope_theta: rotary base of `csa` and `hca` layers. YaRN and the like apply to them only, without a
            factor on cosines and sines; `swa` layers have plain RoPE of base `rope_theta`.
        o_groups, o_lora_rank: output projection of these layers: groups of heads, width per group.
        index_n_heads, index_head_dim, index_topk: heads of the indexer of `dsa` and `csa`, their width, and how many
            keys (`dsa`) or entries (`csa`) it selects for a query.
        index_dense: attend to all keys (entries) though there is an indexer, as while it warms up.
        indexer_loss_coef: weight of the loss that indexers learn by, mean over layers; 0 freezes them.
        rope_interleave: rotary pairs are neighbours `(x0, x1)`, as in DeepSeek's checkpoints; `False`: halves.
        rope_parameters: transformers' rotary settings (`rope_type`, `rope_theta`, YaRN keys).
        n_routed_experts, n_shared_experts, num_experts_per_tok, moe_intermediate_size: DeepSeekMoE.
        moe_layer_freq: 1; other schedules are written as a list in `channel_mixers`.
        scoring_func: affinity of a token to the experts: `softmax`, `sigmoid` or `sqrtsoftplus`, `sqrt(softplus(x))`.
        topk_method: `greedy`, `group_limited_greedy` (a group counts by its best expert) or `noaux_tc` (by its best
            two, and with a routing bias).
        n_group, topk_group: experts are routed within the best `topk_group` of `n_group` groups; not with `greedy`.
            Where these have fewer than `num_experts_per_tok`, the others fill up, as in DeepSeek's code.
        norm_topk_prob, routed_scaling_factor: normalisation and scale of the chosen experts' weights. As in DeepSeek's
            code, the greedy methods scale only weights that they have not normalised.
        router_bias_update_speed: step of the routing bias of `noaux_tc` per optimizer step.
        router_bias_recenter: keep the mean of the biases as it is.
        seq_aux_loss_coef: weight of the sequence-wise balance loss (V3 eq. 17).
        aux_loss_alpha, seq_aux: weight of the expert-level balance loss (DeepSeekMoE eq. 12), and whether it is taken
            per sequence or over all tokens of the batch.
        num_nextn_predict_layers: multi-token-prediction layers, stored as `model.layers.{num_hidden_layers + k}`.
        mtp_loss_weight: weight of their mean loss in training (V3 section 2.2: 0.3, later 0.1).

    Raises:
        ValueError: the combination cannot work; the message says how to mend it.
    """

    model_type = "fathom"
    keys_to_ignore_at_inference = ["cache", "mtp_loss", "indexer_figures", "balance_loss", "expert_counts"]
    attribute_map = {"num_local_experts": "n_routed_experts"}
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

    token_mixers: str | list[str] | None = "mla"
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    index_dense: bool = False
    indexer_loss_coef: float | int = 1.0
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    position_embedding_type: str = "rope"
    rope_parameters: dict | None = None
    rope_interleave: bool = True
    sliding_window: int | None = None
    compress_rate_csa: int = 4
    compress_rate_hca: int = 128
    compress_rope_theta: float | int = 160000.0
    o_groups: int = 8
    o_lora_rank: int = 1024

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
    moe_layer_freq: int = 1
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 2.5
    router_bias_update_speed: float | int = 0.001
    router_bias_recenter: bool = False
    seq_aux_loss_coef: float | int = 0.0001
    aux_loss_alpha: float | int = 0.0
    seq_aux: bool = True
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
        check_numbers({**self.__dict__, **kwargs})
        kwargs = self._read_v4_names(kwargs)
        check_names(kwargs, type(self))
        if self.token_mixers is None:
            main = max(self.num_hidden_layers, 0)
            schedule = ["swa", "swa", *(["csa", "hca"] * main)][:main]
            self.token_mixers = schedule + ["swa"] * max(self.num_nextn_predict_layers, 0)
        self._check_layers()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = 1 if self.compresses else self.num_attention_heads
        if self.uses("mla") or self.uses("dsa"):
            self.head_dim = self.qk_rope_head_dim
        elif self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if not self.compresses:
            # transformers' caches would forget all older tokens, which these layers look at.
            self.sliding_window = None
        super().__post_init__(**kwargs)
        self._check()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers; reads the config.json of a DeepSeek model, too, by its `model_type`.

        Fields among `kwargs` replace stored ones before the config is made, so that they are checked and what depends
        on them is derived. With another `num_hidden_layers`, lists of kinds per layer keep their first ones and those
        of the MTP layers.

        How a model is run is left out of what is stored (`RUN_BY_CALLER`, private names): callers say it, and
        `use_cache` is turned off by training (`save_pretrained`).
        """
        content = {name: value for name, value in config_dict.items() if not _says_how_to_run(name)}
        content = read_official(content)
        check_numbers(content)
        known = {field.name for field in fields(cls)} | set(cls.attribute_map)
        changes = {name: kwargs.pop(name) for name in list(kwargs) if name in known and name != "dtype"}
        return super().from_dict({**_cut_schedules(content, changes), **changes}, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        """As in transformers. `use_cache` is written as true.

        transformers' Trainer turns it off in the config of the model that it trains, and leaves it so: whoever loads
        the model later would get no cache.
        """
        use_cache, self.use_cache = self.use_cache, True
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.use_cache = use_cache

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict, dict]:
        """As in transformers, which would warn of a DeepSeek `model_type` if it saw it."""
        config_dict, rest = super().get_config_dict(*args, **kwargs)
        return read_official(config_dict), rest

    @classmethod
    def preset(cls, generation: str, size: str = "nano", **overrides) -> "FathomConfig":
        """The configuration of a generation at a size, e.g. `preset("v3")` or `preset("v3", size="671b")`.

        Args:
            generation: one of `GENERATIONS` (`classic`, `moe`, `v2`, `v3`, `v3.2`, `v4`), or an official model by its
                full name (`v2-lite`).
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
        derived = OFFICIAL[official] if official in OFFICIAL else _derived(generation, size, overrides)
        config = cls(**{**derived, **overrides})
        window = overrides.get("sliding_window")
        if window is not None and not config.compresses:
            raise ValueError(f"sliding_window={window} is for swa, csa and hca layers; without them set it to None")
        return config

    def token_mixer(self, layer_idx: int) -> str:
        """Kind of token mixing of `model.layers.{layer_idx}`, MTP layers included."""
        assert self.token_mixers is not None  # the constructor replaces None by the schedule
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

    def drop_mtp_layers(self) -> None:
        """Describes the same model without its MTP layers."""
        for field in ("token_mixers", "channel_mixers"):
            value = getattr(self, field)
            if isinstance(value, list):
                setattr(self, field, value[: self.num_hidden_layers])
        self.num_nextn_predict_layers = 0

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How transformers' tensor parallelism splits the modules that this model has. Attention is replicated."""
        plan = {"embed_tokens": "embedding_rowwise"}
        if self.uses("dense"):
            plan |= _split_network("layers.*.mlp", self.mlp_gated)
        if self.uses("moe") or self.uses("hash"):
            plan |= {
                "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
                "layers.*.mlp.experts.down_proj": "rowwise",
                "layers.*.mlp.experts": "moe_tp_experts",
            }
            if self.n_shared_experts:
                plan |= _split_network("layers.*.mlp.shared_experts", gated=True)
        return plan

    @property
    def compresses(self) -> bool:
        """Whether tokens are mixed by windows and compressed entries (`swa`, `csa`, `hca`)."""
        mixers = self.token_mixers
        return not set(COMPRESSED_MIXERS).isdisjoint([mixers] if isinstance(mixers, str) else mixers or ())

    @property
    def layer_types(self) -> list[str]:
        """What transformers makes caches by, if there is a `sliding_window`; the other generations have none.

        For windows it would make a static cache that is no longer than they are, and could not be told how many
        entries to make room for. What the layers get in the end is said by `cache.adopt_cache`.
        """
        if not self.compresses:
            raise AttributeError("only configurations with a sliding_window have layer_types")
        return ["full_attention"] * self.num_hidden_layers

    def _read_v4_names(self, kwargs: dict) -> dict:
        """Takes what DeepSeek-V4's config.json, DeepSeek's or transformers', calls otherwise out of `kwargs`.

        DeepSeek's has one `compress_ratios` for every layer, MTP layers included: 0 is a window alone. transformers'
        has `layer_types`, `mlp_layer_types`, `compress_rates` and one set of rotary parameters per base.
        """
        ratios, rates = kwargs.pop("compress_ratios", None), kwargs.pop("compress_rates", None)
        named = any(kind in V4_LAYER_TYPES for kind in kwargs.get("layer_types") or ())
        if ratios is None and rates is None and not named:
            return kwargs
        for kind, rate in (rates or {}).items():
            setattr(self, f"compress_rate_{V4_LAYER_TYPES[kind]}", rate)
        layer_types, mlp_layer_types = kwargs.pop("layer_types", None), kwargs.pop("mlp_layer_types", None)
        if ratios is not None:
            self.token_mixers = self._mixers_of_ratios(ratios)
        elif layer_types is not None:
            self.token_mixers = [V4_LAYER_TYPES[kind] for kind in layer_types]
        if isinstance(self.token_mixers, list):
            missing = self.num_hidden_layers + self.num_nextn_predict_layers - len(self.token_mixers)
            self.token_mixers = self.token_mixers + ["swa"] * missing
        if mlp_layer_types is not None:
            kinds = ["hash" if kind == "hash_moe" else "moe" for kind in mlp_layer_types]
            self.channel_mixers = kinds + ["moe"] * self.num_nextn_predict_layers
        # V4 routes without groups and has no dense layers; its files do not mention either.
        self.n_group = self.topk_group = 1
        self.first_k_dense_replace = 0

        if (share := kwargs.pop("partial_rotary_factor", None)) is not None:
            self.qk_rope_head_dim = int(self.head_dim * share)
        rope = self.rope_parameters or {}
        if "compress" in rope:
            scaling = {"type", "rope_theta", "partial_rotary_factor", "attention_factor"}
            self.compress_rope_theta = rope["compress"]["rope_theta"]
            self.rope_parameters = {key: value for key, value in rope["compress"].items() if key not in scaling}
            self.rope_parameters["rope_theta"] = rope["main"]["rope_theta"]
        return kwargs

    def _mixers_of_ratios(self, ratios: list[int]) -> list[str]:
        kinds = {0: "swa", self.compress_rate_csa: "csa", self.compress_rate_hca: "hca"}
        for ratio in ratios:
            if ratio not in kinds:
                raise ValueError(
                    f"compress_ratios has {ratio}, which is neither 0 nor compress_rate_csa={self.compress_rate_csa} "
                    f"nor compress_rate_hca={self.compress_rate_hca}; set one of these to it"
                )
        return [kinds[ratio] for ratio in ratios]

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
            ("scoring_func", ("sigmoid", "softmax", "sqrtsoftplus")),
            ("topk_method", ("greedy", "group_limited_greedy", "noaux_tc")),
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
        if self.uses("mla") or self.uses("dsa"):
            self._check_mla()
        if self.uses("mha"):
            self._check_mha()
        if self.compresses:
            self._check_compressed()
        if self.uses("dsa") or self.uses("csa"):
            self._check_indexer()
        if self.uses("dense"):
            self._check_positive("intermediate_size")
        if self.uses("moe") or self.uses("hash"):
            self._check_moe()
        if self.swiglu_limit is not None and self.swiglu_limit <= 0:
            raise ValueError(f"swiglu_limit={self.swiglu_limit} must be above 0, or None: no limit")

    def _check_rope(self) -> None:
        rope = self.rope_parameters or {}
        kind, known = str(rope.get("rope_type", "default")), ("default", *ROPE_INIT_FUNCTIONS)
        if kind not in known:
            raise ValueError(f"rope_type={kind!r} is not known{_nearest(kind, known)}; known: {', '.join(known)}")
        factor = rope.get("factor")
        if kind in ("linear", "dynamic", "yarn", "llama3") and not (isinstance(factor, float | int) and factor >= 1):
            raise ValueError(f"rope_type={kind!r} needs a factor of at least 1 in rope_parameters, not {factor!r}")
        check_rope_numbers(rope)

    def _check_mla(self) -> None:
        if self.position_embedding_type != "rope":
            raise ValueError(
                "token_mixers 'mla' and 'dsa' rotate part of each head; set position_embedding_type='rope'"
            )
        self._check_positive("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"q_lora_rank={self.q_lora_rank} must be at least 1, or None: uncompressed")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: rotary dimensions come in pairs")
        if self.uses("mha"):
            raise ValueError(
                "mha layers beside mla or dsa layers would need two rotary widths; choose mha for all layers, or none"
            )

    def _check_indexer(self) -> None:
        self._check_positive("index_n_heads", "index_head_dim", "index_topk")
        if self.q_lora_rank is None:
            raise ValueError("token_mixers 'dsa' selects by compressed queries; set q_lora_rank, or use 'mla'")
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ValueError(
                f"index_head_dim={self.index_head_dim} must be at least qk_rope_head_dim={self.qk_rope_head_dim}, "
                f"the part of it that is rotated"
            )

    def _check_mha(self) -> None:
        self._check_positive("num_key_value_heads")
        heads, key_heads, width = self.num_attention_heads, self.num_key_value_heads or 1, self.head_dim or 0
        if heads % key_heads:
            raise ValueError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={key_heads}")
        if width < 1:
            raise ValueError(f"hidden_size={self.hidden_size} is below num_attention_heads={heads}; set head_dim")
        if self.position_embedding_type == "rope" and width % 2:
            raise ValueError(f"head_dim={width} must be even: rotary dimensions come in pairs")

    def _check_compressed(self) -> None:
        if self.position_embedding_type != "rope":
            raise ValueError("token_mixers 'swa', 'csa' and 'hca' rotate heads; set position_embedding_type='rope'")
        if self.uses("mha") or self.uses("mla") or self.uses("dsa"):
            raise ValueError("swa, csa and hca layers share no cache with mha, mla and dsa layers; choose one family")
        if self.sliding_window is None:
            raise ValueError("token_mixers 'swa', 'csa' and 'hca' need a sliding_window: a number of tokens, e.g. 128")
        if self.q_lora_rank is None:
            raise ValueError("token_mixers 'swa', 'csa' and 'hca' compress queries; set q_lora_rank")
        self._check_positive("sliding_window", "q_lora_rank", "o_groups", "o_lora_rank")
        self._check_positive("compress_rate_csa", "compress_rate_hca")
        if self.num_key_value_heads != 1:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads}: in swa, csa and hca layers all heads share one key; "
                f"set it to 1"
            )
        if self.num_attention_heads % self.o_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of o_groups={self.o_groups}"
            )
        rotary, width = self.qk_rope_head_dim, self.head_dim or 0
        if rotary % 2 or not 0 < rotary <= width:
            raise ValueError(f"qk_rope_head_dim={rotary} must be even and at most head_dim={width}")
        if (kind := (self.rope_parameters or {}).get("rope_type")) in ("dynamic", "longrope"):
            raise ValueError(
                f"rope_type={kind!r} changes with the length of the text, but compressed "
                f"entries are rotated once; use 'yarn', 'linear', 'llama3' or 'default'"
            )

    def _check_moe(self) -> None:
        self._check_positive("moe_intermediate_size")
        experts, chosen = self.n_routed_experts, self.num_experts_per_tok
        if not 1 <= chosen <= experts:
            raise ValueError(f"num_experts_per_tok={chosen} must be between 1 and n_routed_experts={experts}")
        if self.moe_layer_freq != 1:
            raise ValueError(
                f"moe_layer_freq={self.moe_layer_freq} must be 1; list each layer's kind in channel_mixers instead"
            )
        if self.n_shared_experts < 0:
            raise ValueError(f"n_shared_experts={self.n_shared_experts} must be 0 or more")
        if self.topk_method != "greedy":
            self._check_groups()

    def _check_groups(self) -> None:
        experts, groups, kept = self.n_routed_experts, self.n_group, self.topk_group
        if groups < 1 or experts % groups:
            raise ValueError(f"n_routed_experts={experts} must be a multiple of n_group={groups}")
        if not 1 <= kept <= groups:
            raise ValueError(f"topk_group={kept} must be between 1 and n_group={groups}")
        if self.topk_method == "noaux_tc" and groups > 1 and experts // groups < 2:
            raise ValueError(
                f"n_group={groups} leaves {experts // groups} expert per group, but a group is scored by its best two; "
                f"set n_group to {experts // 2} or less"
            )


def _says_how_to_run(name: str) -> bool:
    return name.startswith("_") or name in RUN_BY_CALLER


def _cut_schedules(content: dict, changes: dict) -> dict:
    """The stored fields with lists of kinds per layer cut to a smaller `num_hidden_layers` among the changes."""
    main, kept = content.get("num_hidden_layers"), changes.get("num_hidden_layers")
    if not (isinstance(main, int) and isinstance(kept, int) and 0 < kept < main):
        return content
    schedules = {
        name: [*content[name][:kept], *content[name][main:]]
        for name in ("token_mixers", "channel_mixers", "layer_types", "mlp_layer_types", "compress_ratios")
        if isinstance(content.get(name), list)
    }
    return {**content, **schedules}


def _derived(generation: str, size: str, overrides: dict) -> dict:
    """The fields of a generation at a size that is none of an official model."""
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
    return {"generation": generation, **shape, **GENERATIONS[generation](width)}


def _split_network(name: str, gated: bool) -> dict[str, str]:
    """The tensor-parallel plan of a feed-forward network: each rank has some of the inner dimensions."""
    plan = {f"{name}.up_proj": "colwise", f"{name}.down_proj": "rowwise"}
    return {f"{name}.gate_proj": "colwise", **plan} if gated else plan


def _nearest(name: str, known) -> str:
    nearest = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""
