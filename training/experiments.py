"""What `fathom ablate` compares: findings of DeepSeek's papers, and models of a CPU's size that could show them.

A variant is used by as many experiments as ask for it, and run once. Words are given in English and Chinese, side by
side.
"""

import tempfile
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..modeling.experts import MixtureOfExperts
from ..modeling.modeling_fathom import FathomForCausalLM
from .ablation import Spread, Study, Variant, spread, train_and_measure, verdict
from .stages import converted_fields, enter_stage, initial_model, stage_fields
from .unconstrained import release_connections

Words = tuple[str, str]

# DeepSeek-V3 in small: MLA, 15 experts of which 3 are chosen and one shared, balanced by the routing bias alone.
BASE: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "intermediate_size": 256,
    "n_routed_experts": 15,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "seq_aux_loss_coef": 0.0,
    "num_nextn_predict_layers": 0,
}
DEEP: dict[str, Any] = {"num_hidden_layers": 6, "channel_mixers": "dense"}
INDEXER: dict[str, Any] = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 16}


def base(optimizer: str = "adamw", learning_rate: float = 3e-3, **config: Any) -> Variant:
    """The base with some fields changed."""
    return Variant({**BASE, **config}, optimizer, learning_rate)


def heads(key_heads: int, intermediate_size: int) -> Variant:
    """The base with multi-head attention of some key heads."""
    return base(token_mixers="mha", head_dim=24, num_key_value_heads=key_heads, intermediate_size=intermediate_size)


def balanced_by_loss(weight: float) -> Variant:
    """The base with an auxiliary loss over all tokens of a batch in place of the bias."""
    return base(router_bias_update_speed=0.0, aux_loss_alpha=weight, seq_aux=False)


def without_shared_expert(model: FathomForCausalLM, study: Study, seed: int) -> dict[str, float]:
    """Held-out loss with the shared expert switched off and one more routed expert chosen instead."""
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.shared_experts = None
            module.gate.top_k += 1
    measured, _ = train_and_measure(model, study, seed, steps=0)
    return {"bits_per_byte_without_shared": measured["bits_per_byte"]}


def next_stage(model: FathomForCausalLM, stage: str, changes: dict[str, Any]) -> FathomForCausalLM:
    """A copy of the model that enters a stage of training, with some fields of its config changed."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        copied = initial_model(folder, {**changes, **stage_fields(stage)})
    enter_stage(copied, stage)
    return copied


def learn_to_select(model: FathomForCausalLM, study: Study, seed: int) -> dict[str, float]:
    """Makes a V3.2 model of a V3 model: new indexers, warm-up of these alone, training of all while they select."""

    def figures_of(model: FathomForCausalLM, moment: str, steps: int = 0) -> dict[str, float]:
        measured, _ = train_and_measure(model, study, seed, learning_rate=1e-3, steps=steps)
        kept = ("indexer_recall", "indexer_mass", "indexer_recent_recall", "indexer_random", "bits_per_byte")
        return {f"{name}_{moment}": measured[name] for name in kept}

    indexers = {**converted_fields(model.config, "v3.2"), **INDEXER}
    selecting = next_stage(model, "sparse", indexers)
    figures = figures_of(selecting, "new")
    warming = next_stage(selecting, "warmup", {})
    train_and_measure(warming, study, seed, steps=study.steps // 2)
    selecting = next_stage(warming, "sparse", {})
    return figures | figures_of(selecting, "warm") | figures_of(selecting, "sparse", study.steps // 2)


VARIANTS: dict[str, Variant] = {
    "base": Variant(BASE, afterwards=without_shared_expert),
    "unbalanced": base(router_bias_update_speed=0.0),
    "loss-0.001": balanced_by_loss(0.001),
    "loss-0.01": balanced_by_loss(0.01),
    "loss-0.1": balanced_by_loss(0.1),
    "coarse": base(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=96, n_shared_experts=0),
    "coarse-shared": base(n_routed_experts=7, num_experts_per_tok=1, moe_intermediate_size=96),
    "fine": base(n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=0),
    "mha": heads(4, intermediate_size=96),
    "gqa": heads(2, intermediate_size=224),
    "mqa": heads(1, intermediate_size=288),
    "plain": base(**DEEP),
    "hc": Variant({**BASE, **DEEP, "hc_mult": 4}, prepare=release_connections),
    "mhc": base(**DEEP, hc_mult=4),
    "adamw-1.5e-3": base(learning_rate=1.5e-3),
    "adamw-6e-3": base(learning_rate=6e-3),
    "muon-3e-3": base("muon"),
    "muon-6e-3": base("muon", learning_rate=6e-3),
    "mtp": base(num_nextn_predict_layers=1),
    "indexer": Variant(BASE, afterwards=learn_to_select),
}


@dataclass(frozen=True)
class Figure:
    """A figure's unit, what of, and how many digits of it are written."""

    unit: Words
    of: Words | None = None
    digits: int = 3


BITS, RECALL = ("bits per byte", "每字节比特"), ("recall", "召回")

FIGURES: dict[str, Figure] = {
    "bits_per_byte": Figure(BITS),
    "max_vio": Figure(("MaxVio", "MaxVio"), digits=2),
    "max_vio_batch": Figure(("MaxVio", "MaxVio"), ("per batch", "单批"), digits=2),
    "dead_experts": Figure(("dead experts", "死专家"), digits=1),
    "bits_per_byte_without_shared": Figure(BITS, ("shared expert off", "关掉共享专家")),
    "cache_bytes_per_token": Figure(("cache bytes per token", "每词元缓存字节"), digits=0),
    "amax_gain_forward": Figure(("Amax gain", "Amax 增益"), ("forward", "前向"), digits=2),
    "amax_gain_backward": Figure(("Amax gain", "Amax 增益"), ("backward", "反向"), digits=2),
    "off_diagonal_mass": Figure(("off-diagonal mass", "非对角质量")),
    "stream_similarity": Figure(("similarity of streams", "流的相似度")),
    "draft_acceptance": Figure(("drafts accepted", "草稿接受率")),
    "indexer_recall_new": Figure(RECALL, ("new indexers", "新索引器")),
    "indexer_recall_warm": Figure(RECALL, ("after warm-up", "预热后")),
    "indexer_recall_sparse": Figure(RECALL, ("after sparse training", "稀疏训练后")),
    "indexer_recent_recall_warm": Figure(RECALL, ("most recent keys", "最近的键")),
    "indexer_random_warm": Figure(RECALL, ("random keys", "随机的键")),
    "bits_per_byte_new": Figure(BITS, ("new indexers", "新索引器")),
    "bits_per_byte_warm": Figure(BITS, ("after warm-up", "预热后")),
    "bits_per_byte_sparse": Figure(BITS, ("after sparse training", "稀疏训练后")),
}


@dataclass(frozen=True)
class Side:
    """One side of a finding: a figure of a variant; of several, of the one where it is least."""

    figure: str
    variants: tuple[str, ...]


class Source(NamedTuple):
    """A paper on arXiv, and where in it to read."""

    arxiv: str
    where: Words


@dataclass(frozen=True)
class Finding:
    """A published ordering: `smaller` is smaller than `larger`, either of which may be a published number."""

    words: Words
    source: Source
    smaller: Side | float
    larger: Side | float

    def judge(self, results: dict[str, list[dict[str, Any]]]) -> tuple[str, Spread, Spread] | None:
        """What `verdict` says of the results by variant, and the two sides; None where some are missing."""
        sides = [side_of(side, results) for side in (self.smaller, self.larger)]
        if sides[0] is None or sides[1] is None:
            return None
        return verdict(sides[0], sides[1]), sides[0], sides[1]


def side_of(side: Side | float, results: dict[str, list[dict[str, Any]]]) -> Spread | None:
    """The value of a side, None unless all its variants have results."""
    if isinstance(side, float):
        return Spread(side, 0.0, 1)
    spreads = [spread(results.get(name, []), side.figure) for name in side.variants]
    known = [each for each in spreads if each is not None]
    return min(known) if len(known) == len(side.variants) else None


@dataclass(frozen=True)
class Experiment:
    """A question, the variants that answer it with what they are called here, and what was published about it."""

    title: Words
    matched: Words
    variants: dict[str, Words]
    figures: tuple[str, ...]
    findings: tuple[Finding, ...]


SAME_SIZE = ("Total and active parameters are equal.", "总参数与激活参数相等。")
LOSS_FREE = Source("2408.15664", ("table 2", "表 2"))
LOSS_WEIGHTS = Source("2408.15664", ("figure 2", "图 2"))
FINE_EXPERTS = Source("2401.06066", ("figure 3", "图 3"))
FEWER_HEADS = Source("2405.04434", ("table 8", "表 8"))
CONSTRAINED = Source("2512.24880", ("section 5", "第 5 节"))
SPARSE = Source("2512.02556", ("section 2.1.1", "第 2.1.1 节"))
LOSSES = ("loss-0.001", "loss-0.01", "loss-0.1")

EXPERIMENTS: dict[str, Experiment] = {
    "balance": Experiment(
        ("Balance: a routing bias or an auxiliary loss", "均衡：路由偏置与辅助损失"),
        SAME_SIZE,
        {
            "unbalanced": ("not balanced", "不均衡"),
            "loss-0.001": ("auxiliary loss, 0.001", "辅助损失，0.001"),
            "loss-0.01": ("auxiliary loss, 0.01", "辅助损失，0.01"),
            "loss-0.1": ("auxiliary loss, 0.1", "辅助损失，0.1"),
            "base": ("routing bias", "路由偏置"),
        },
        ("bits_per_byte", "max_vio", "max_vio_batch", "dead_experts"),
        (
            Finding(
                ("The bias balances: less MaxVio than without", "偏置能均衡：MaxVio 低于不均衡"),
                LOSS_FREE,
                Side("max_vio", ("base",)),
                Side("max_vio", ("unbalanced",)),
            ),
            Finding(
                ("The bias leaves less MaxVio than a loss of 0.001", "偏置的 MaxVio 低于 0.001 的辅助损失"),
                LOSS_FREE,
                Side("max_vio", ("base",)),
                Side("max_vio", ("loss-0.001",)),
            ),
            Finding(
                ("The bias needs fewer bits per byte than a loss of 0.001", "偏置的比特数低于 0.001 的辅助损失"),
                LOSS_FREE,
                Side("bits_per_byte", ("base",)),
                Side("bits_per_byte", ("loss-0.001",)),
            ),
            Finding(
                ("No weight of the loss leaves as little MaxVio", "任何权重的辅助损失都达不到同样低的 MaxVio"),
                LOSS_WEIGHTS,
                Side("max_vio", ("base",)),
                Side("max_vio", LOSSES),
            ),
            Finding(
                ("No weight of the loss needs as few bits", "任何权重的辅助损失都达不到同样低的比特数"),
                LOSS_WEIGHTS,
                Side("bits_per_byte", ("base",)),
                Side("bits_per_byte", LOSSES),
            ),
            Finding(
                ("A heavier loss costs bits: 0.001 before 0.1", "辅助损失越重代价越大：0.001 优于 0.1"),
                LOSS_WEIGHTS,
                Side("bits_per_byte", ("loss-0.001",)),
                Side("bits_per_byte", ("loss-0.1",)),
            ),
        ),
    ),
    "experts": Experiment(
        ("Experts: fine or coarse, with or without a shared one", "专家：细粒度与粗粒度，有无共享专家"),
        (
            "As in DeepSeekMoE, figure 3: but for the routers total and active parameters are equal, as experts of "
            "half the width are twice as many, and the shared one takes the place of a routed one.",
            "与 DeepSeekMoE 图 3 相同：除路由器外总参数与激活参数相等；专家宽度减半则数目加倍，共享专家占一个路由专家的"
            "位置。",
        ),
        {
            "coarse": ("2 of 8", "8 选 2"),
            "coarse-shared": ("1 shared, 1 of 7", "1 共享，7 选 1"),
            "fine": ("4 of 16", "16 选 4"),
            "base": ("1 shared, 3 of 15", "1 共享，15 选 3"),
        },
        ("bits_per_byte", "bits_per_byte_without_shared", "max_vio"),
        (
            Finding(
                (
                    "Finer experts: 1 shared and 3 of 15 before 1 shared and 1 of 7",
                    "更细的专家：1 共享、15 选 3 优于 1 共享、7 选 1",
                ),
                FINE_EXPERTS,
                Side("bits_per_byte", ("base",)),
                Side("bits_per_byte", ("coarse-shared",)),
            ),
            Finding(
                ("A shared expert: 1 shared and 1 of 7 before 2 of 8", "共享专家：1 共享、7 选 1 优于 8 选 2"),
                FINE_EXPERTS,
                Side("bits_per_byte", ("coarse-shared",)),
                Side("bits_per_byte", ("coarse",)),
            ),
            Finding(
                (
                    "No routed expert replaces the shared one: off after training, with one more routed, costs bits",
                    "共享专家不可由路由专家代替：训练后关掉、多选一个路由专家，比特数上升",
                ),
                Source("2401.06066", ("section 4.5", "第 4.5 节")),
                Side("bits_per_byte", ("base",)),
                Side("bits_per_byte_without_shared", ("base",)),
            ),
        ),
    ),
    "attention": Experiment(
        ("Attention: what a smaller cache costs", "注意力：更小的缓存要付出什么"),
        (
            "Total and active parameters are equal within 0.1 %, by the width of the first layer's dense network. "
            "DeepSeek-V2 matched by the number of layers (MHA, GQA, MQA) and not exactly (MLA). MLA normalises its "
            "latents and the others nothing: in so few steps a lead may be one of learning speed, not of quality.",
            "总参数与激活参数之差在 0.1 % 以内，由首层稠密网络的宽度调节。DeepSeek-V2 用层数对齐（MHA、GQA、MQA），"
            "MLA 则只大致对齐。MLA 对潜向量做归一化，其他的没有：步数这么少，领先可能只是学得快，而不是质量更好。",
        ),
        {
            "mha": ("MHA, 4 heads", "MHA，4 头"),
            "gqa": ("GQA, 2 key heads", "GQA，2 个键头"),
            "mqa": ("MQA, 1 key head", "MQA，1 个键头"),
            "base": ("MLA", "MLA"),
        },
        ("bits_per_byte", "cache_bytes_per_token"),
        (
            Finding(
                ("MHA before GQA", "MHA 优于 GQA"),
                FEWER_HEADS,
                Side("bits_per_byte", ("mha",)),
                Side("bits_per_byte", ("gqa",)),
            ),
            Finding(
                ("GQA before MQA", "GQA 优于 MQA"),
                FEWER_HEADS,
                Side("bits_per_byte", ("gqa",)),
                Side("bits_per_byte", ("mqa",)),
            ),
            Finding(
                ("MLA before MHA", "MLA 优于 MHA"),
                Source("2405.04434", ("table 9", "表 9")),
                Side("bits_per_byte", ("base",)),
                Side("bits_per_byte", ("mha",)),
            ),
        ),
    ),
    "residual": Experiment(
        ("Residual: one stream, HC, mHC", "残差：单流、HC、mHC"),
        (
            "As published, the connections come on top of the same network, here 6 dense layers; that is a good tenth "
            "more parameters at this width, and 1 % or less at the papers'. The weights of HC have no constraint. "
            "Gains are the largest over tokens.",
            "与论文相同，连接加在同一网络之上，此处为 6 个稠密层；在这个宽度上多出一成多参数，在论文的宽度上不到 1 %。"
            "HC 的权重没有约束。增益取各词元中的最大值。",
        ),
        {"plain": ("one stream", "单流"), "hc": ("HC", "HC"), "mhc": ("mHC", "mHC")},
        ("bits_per_byte", "amax_gain_backward", "amax_gain_forward", "off_diagonal_mass", "stream_similarity"),
        (
            Finding(
                ("HC before one stream", "HC 优于单流"),
                Source("2409.19606", ("section 4", "第 4 节")),
                Side("bits_per_byte", ("hc",)),
                Side("bits_per_byte", ("plain",)),
            ),
            Finding(
                ("mHC before one stream", "mHC 优于单流"),
                CONSTRAINED,
                Side("bits_per_byte", ("mhc",)),
                Side("bits_per_byte", ("plain",)),
            ),
            Finding(
                ("mHC before HC", "mHC 优于 HC"),
                Source("2512.24880", ("table 4", "表 4")),
                Side("bits_per_byte", ("mhc",)),
                Side("bits_per_byte", ("hc",)),
            ),
            Finding(
                ("mHC amplifies less than HC, forward", "mHC 的前向增益低于 HC"),
                CONSTRAINED,
                Side("amax_gain_forward", ("mhc",)),
                Side("amax_gain_forward", ("hc",)),
            ),
            Finding(
                ("mHC amplifies less than HC, backward", "mHC 的反向增益低于 HC"),
                CONSTRAINED,
                Side("amax_gain_backward", ("mhc",)),
                Side("amax_gain_backward", ("hc",)),
            ),
            Finding(
                ("The gain of mHC stays below 1.6", "mHC 的增益低于 1.6"),
                CONSTRAINED,
                Side("amax_gain_backward", ("mhc",)),
                1.6,
            ),
        ),
    ),
    "optimizer": Experiment(
        ("Optimizer: AdamW or Muon", "优化器：AdamW 与 Muon"),
        (
            "The same model and the same tokens; each optimizer at the best of its learning rates.",
            "同一模型，同样的词元；每种优化器取其学习率中最好的一个。",
        ),
        {
            "adamw-1.5e-3": ("AdamW, 1.5e-3", "AdamW，1.5e-3"),
            "base": ("AdamW, 3e-3", "AdamW，3e-3"),
            "adamw-6e-3": ("AdamW, 6e-3", "AdamW，6e-3"),
            "muon-3e-3": ("Muon, 3e-3", "Muon，3e-3"),
            "muon-6e-3": ("Muon, 6e-3", "Muon，6e-3"),
        },
        ("bits_per_byte",),
        (
            Finding(
                ("Muon before AdamW after as many tokens", "词元数相同时 Muon 优于 AdamW"),
                Source("2502.16982", ("section 3", "第 3 节")),
                Side("bits_per_byte", ("muon-3e-3", "muon-6e-3")),
                Side("bits_per_byte", ("adamw-1.5e-3", "base", "adamw-6e-3")),
            ),
        ),
    ),
    "drafting": Experiment(
        ("Drafting: what an MTP layer costs, and what its drafts are worth", "起草：MTP 层的代价与草稿的价值"),
        (
            "The same model; the MTP layer comes on top in training and is left away afterwards, as in V3. A draft is "
            "accepted where it is the model's own greedy choice of the token after next, on held-out text.",
            "同一模型；与 V3 相同，MTP 层训练时外加，之后去掉。草稿若等于模型自己对再下一个词元的贪心选择即为接受，"
            "在留出文本上统计。",
        ),
        {"base": ("without an MTP layer", "无 MTP 层"), "mtp": ("with an MTP layer", "带 MTP 层")},
        ("bits_per_byte", "draft_acceptance"),
        (
            Finding(
                (
                    "The next token is predicted no worse with an MTP layer (V3: equal bits per byte)",
                    "带 MTP 层时下一个词元预测不变差（V3：每字节比特相等）",
                ),
                Source("2412.19437", ("table 4", "表 4")),
                Side("bits_per_byte", ("mtp",)),
                Side("bits_per_byte", ("base",)),
            ),
            Finding(
                ("At least 85 % of the drafts are accepted", "草稿接受率至少 85 %"),
                Source("2412.19437", ("section 5.4.3", "第 5.4.3 节")),
                0.85,
                Side("draft_acceptance", ("mtp",)),
            ),
        ),
    ),
    "indexer": Experiment(
        ("Indexer: does it learn which keys matter", "索引器：能否学会哪些键重要"),
        (
            "One model: trained as V3, given new indexers, these warmed up alone by the KL loss for half as many "
            "steps, then all trained with attention to 16 selected keys. Recall is the share of the 16 keys of largest "
            "attention that are selected. DeepSeek has published no recall; these orderings are what the warm-up is "
            "for.",
            "同一个模型：先按 V3 训练，加入新索引器，用 KL 损失单独预热（步数减半），再在只看 16 个选中键的情况下训练"
            "全部。召回是注意力最大的 16 个键中被选中的比例。DeepSeek 没有公布过召回；这些次序正是预热的目的。",
        ),
        {"indexer": ("V3 made V3.2", "由 V3 变成 V3.2")},
        (
            "indexer_recall_new",
            "indexer_recall_warm",
            "indexer_recall_sparse",
            "indexer_recent_recall_warm",
            "indexer_random_warm",
            "bits_per_byte",
            "bits_per_byte_new",
            "bits_per_byte_warm",
            "bits_per_byte_sparse",
        ),
        (
            Finding(
                ("The KL loss raises recall", "KL 损失提高召回"),
                SPARSE,
                Side("indexer_recall_new", ("indexer",)),
                Side("indexer_recall_warm", ("indexer",)),
            ),
            Finding(
                ("A warmed-up indexer finds more than the most recent keys have", "预热后的索引器胜过只取最近的键"),
                SPARSE,
                Side("indexer_recent_recall_warm", ("indexer",)),
                Side("indexer_recall_warm", ("indexer",)),
            ),
            Finding(
                (
                    "Selecting costs fewer bits with a warmed-up indexer than with a new one",
                    "预热后再选键，比特代价小于用新索引器",
                ),
                SPARSE,
                Side("bits_per_byte_warm", ("indexer",)),
                Side("bits_per_byte_new", ("indexer",)),
            ),
        ),
    ),
}
