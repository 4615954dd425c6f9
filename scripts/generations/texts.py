"""What `docs/generations.md` says about each generation, in English and Chinese; numbers come from the presets.

In the texts {c.FIELD} is a field of the generation's largest release (of the nano preset where there is no release).
"""

from typing import Any, NamedTuple

from ...modeling import (
    attention,
    compressed_attention,
    compressor,
    experts,
    feed_forward,
    hyper_connections,
    indexing,
    multi_token_prediction,
    residual,
    rotary,
    sparse_attention,
)


class Source(NamedTuple):
    """A paper and where in it to read."""

    name: str
    arxiv: str
    sections: str


class Code(NamedTuple):
    """What an object of the code does."""

    what: Any
    english: str
    chinese: str


class Generation(NamedTuple):
    title: tuple[str, str]
    sources: list[Source]
    text: tuple[str, str]
    formulas: list[str]  # LaTeX
    code: list[Code]


GENERATION_TEXTS = {
    "classic": Generation(
        ("Classic: the plain transformer", "经典：原始的 Transformer"),
        [Source("Attention Is All You Need", "1706.03762", "3.2, 3.3, 3.5")],
        (
            "Everything on this page starts here: embeddings, layers of attention and feed-forward network, and a "
            "head that scores the next token. In multi-head attention each token makes a query, a key and a value per "
            "head; the query is compared with all earlier keys, and the result is the average of their values under a "
            "softmax. Positions are sine waves added to the embeddings. The feed-forward network is two matrices with "
            "a ReLU between them. While text is generated, keys and values of all past tokens stay in memory: this "
            "cache is what later generations shrink. Fathom puts a norm before each sub-layer, as all DeepSeek models "
            "do; the paper put it after.",
            "本页的一切从这里开始：嵌入，若干层注意力与前馈网络，最后由输出头给下一个词元打分。多头注意力中，每个词元"
            "在每个头上产生查询、键和值；查询与之前所有的键比较，结果是这些值按 softmax 加权的平均。位置用正弦波加到嵌"
            "入上。前馈网络是两个矩阵，中间一个 ReLU。生成文本时，所有历史词元的键和值都留在内存里：后来各代要压缩的正"
            "是这个缓存。Fathom 与所有 DeepSeek 模型一样把归一化放在子层之前，论文放在之后。",
        ),
        [
            r"o = \mathrm{softmax}\left(\frac{q K^\top}{\sqrt{D}}\right) V",
            r"\mathrm{FFN}(x) = W_2\,\mathrm{ReLU}(W_1 x)",
        ],
        [
            Code(attention.MultiHeadAttention, "multi-head attention", "多头注意力"),
            Code(rotary.sinusoidal_positions, "sine waves for positions", "正弦位置"),
            Code(feed_forward.FeedForward, "feed-forward network", "前馈网络"),
            Code(residual.ResidualConnection, "residual connection", "残差连接"),
        ],
    ),
    "moe": Generation(
        ("DeepSeekMoE: many small experts", "DeepSeekMoE：许多小专家"),
        [Source("DeepSeekMoE", "2401.06066", "3.1, 3.2, 3.3")],
        (
            "The feed-forward half changes. In place of one wide network there are {c.n_routed_experts} narrow ones, "
            "the experts, and a router sends each token to the {c.num_experts_per_tok} with the best scores. Small and "
            "many, they can specialise and be combined in more ways at the same cost; {c.n_shared_experts} shared "
            "experts, which every token uses, hold what all others would have to learn again. So a model has far more "
            "parameters than a token pays for. Left alone, a few experts would take all tokens: a loss on scores and "
            "load keeps them even. Positions are now rotations of queries and keys (RoPE), and a gate replaces the "
            "ReLU (SwiGLU).",
            "变化在前馈这一半。一个宽网络换成 {c.n_routed_experts} 个窄网络，即专家；路由器把每个词元送给得分最高的 "
            "{c.num_experts_per_tok} 个。专家小而多，同样的代价下可以更专门，组合也更多；{c.n_shared_experts} 个共享专"
            "家每个词元都用，装下其他专家否则都要重复学习的东西。于是模型的参数远多于一个词元实际付出的计算。若不加约"
            "束，少数专家会占去所有词元：由得分和负载构成的损失使它们均衡。位置改为旋转查询和键（RoPE），ReLU 换成门控"
            "（SwiGLU）。",
        ),
        [
            r"y = \sum_{\mathrm{shared}} \mathrm{FFN}_i(x) + \sum_{i \in \mathrm{top}K(s)} s_i\,\mathrm{FFN}_i(x), "
            r"\quad s = \mathrm{softmax}(W x)",
            r"L_{\mathrm{balance}} = \alpha \sum_i f_i P_i",
        ],
        [
            Code(experts.MixtureOfExperts, "shared and routed experts of a layer", "一层的共享专家和路由专家"),
            Code(experts.RoutedExperts, "the experts' matrices and products", "专家的矩阵与乘积"),
            Code(experts.TopKRouter, "router of all generations but hash layers", "除哈希层外各代的路由器"),
            Code(experts.expert_balance_loss, "balance loss", "均衡损失"),
            Code(rotary.apply_rotary, "rotation by position", "按位置旋转"),
        ],
    ),
    "v2": Generation(
        ("V2: attention on a compressed memory", "V2：在压缩的记忆上做注意力"),
        [Source("DeepSeek-V2", "2405.04434", "2.1, 2.2, 3.1.4")],
        (
            "Attention changes, because its cache limits how many long texts a machine can serve. Multi-head latent "
            "attention (MLA) keeps one latent vector of {c.kv_lora_rank} numbers per token, from which matrices make "
            "the keys and values of all {c.num_attention_heads} heads. A rotation by position does not pass through "
            "these matrices, so one small key of {c.qk_rope_head_dim} numbers, shared by all heads, carries the "
            "position. When generating, nothing is expanded: the key matrix is multiplied to the query instead, and "
            "attention runs on the latents. Experts stand in {c.n_group} groups, one per device, and a token uses "
            "experts of {c.topk_group} of them, which bounds the communication. YaRN stretches the rotations to texts "
            "much longer than those of the pretraining.",
            "变化在注意力，因为它的缓存限制了一台机器能同时服务多少长文本。多头潜在注意力（MLA）为每个词元只保存一个 "
            "{c.kv_lora_rank} 维的潜向量，全部 {c.num_attention_heads} 个头的键和值都由矩阵从它展开。按位置的旋转无法"
            "穿过这些矩阵，所以另有一个 {c.qk_rope_head_dim} 维的小键，由所有头共用，专门携带位置。生成时什么也不展"
            "开：把键矩阵乘到查询上，注意力直接在潜向量上进行。专家分成 {c.n_group} 组，每台设备一组，一个词元只用其中"
            " {c.topk_group} 组的专家，通信量因此有界。YaRN 把旋转拉伸到远长于预训练的文本。",
        ),
        [
            r"c = \mathrm{norm}(W_{DKV} h), \quad k_h = [W_{UK,h}\, c\,;\, \mathrm{rope}(W_{KR} h)], \quad "
            r"v_h = W_{UV,h}\, c",
            r"q_h^\top (W_{UK,h}\, c) = (W_{UK,h}^\top q_h)^\top c",
        ],
        [
            Code(attention.MultiHeadLatentAttention, "MLA, expanded and absorbed", "MLA，展开与吸收两种计算"),
            Code(experts.TopKRouter._keep_best_groups, "choice of groups", "选组"),
            Code(rotary.yarn_softmax_scale, "YaRN's scale of the softmax", "YaRN 的 softmax 缩放"),
        ],
    ),
    "v3": Generation(
        ("V3: balance without a loss, and a second token", "V3：不靠损失的均衡，与第二个词元"),
        [
            Source("DeepSeek-V3", "2412.19437", "2.1.2, 2.2"),
            Source("Auxiliary-Loss-Free Load Balancing", "2408.15664", "3"),
        ],
        (
            "V2's attention stays; what changes is how experts are kept busy. A loss for balance pulls on weights "
            "that should learn to predict text. V3 adds a bias to each expert's score instead, in the choice alone, "
            "and moves it by a fixed step after every optimizer step: down where there were too many tokens, up where "
            "too few. Scores are sigmoids, which do not compete; those of the {c.num_experts_per_tok} chosen experts "
            "are normalised and scaled by {c.routed_scaling_factor}. A very small loss per sequence remains, against "
            "extremes within one text. A multi-token-prediction (MTP) layer joins each hidden state with the next "
            "token's embedding and predicts the token after: more to learn from each position, and drafts when "
            "generating.",
            "注意力沿用 V2；改变的是怎样让专家都有事做。均衡损失会牵扯那些本应学习预测文本的权重。V3 改为给每个专家的"
            "得分加一个偏置，只在选择时起作用，并在每次优化器更新后移动固定的一步：词元太多就下调，太少就上调。得分改"
            "用 sigmoid，互不竞争；选中的 {c.num_experts_per_tok} 个专家的得分归一化后乘以 {c.routed_scaling_factor}。"
            "仍保留一个很小的序列内损失，防止单个文本中的极端情形。多词元预测（MTP）层把每个隐藏状态与下一个词元的嵌入"
            "合起来，预测再下一个词元：每个位置可学的更多，生成时还能起草。",
        ),
        [
            r"I = \mathrm{top}K(s + b), \quad g_i = \lambda\, s_i \Big/ \sum_{j \in I} s_j, \quad s = \sigma(W x)",
            r"b_i \leftarrow b_i + \gamma\,\mathrm{sign}(\bar c - c_i)",
            r"h'_i = W\,[\mathrm{norm}(\mathrm{emb}(t_{i+1}))\,;\,\mathrm{norm}(h_i)]",
        ],
        [
            Code(experts.TopKRouter.update_bias, "step of the bias", "偏置的移动"),
            Code(experts.ExpertRouter, "scores and weights", "得分与权重"),
            Code(experts.sequence_balance_loss, "loss per sequence", "序列内损失"),
            Code(multi_token_prediction.MultiTokenPredictionLayer, "MTP layer", "MTP 层"),
        ],
    ),
    "v3.2": Generation(
        ("V3.2: read only what matters", "V3.2：只读要紧的"),
        [Source("DeepSeek-V3.2", "2512.02556", "2.1")],
        (
            "In V3 a query still meets every earlier token, so the work grows with the square of the length. V3.2 "
            "gives each layer a second, very small attention, the lightning indexer: {c.index_n_heads} heads for "
            "queries, one key of {c.index_head_dim} numbers per token, and a ReLU in place of the softmax. Its scores "
            "only choose: MLA then reads the best {c.index_topk} tokens, however long the text is; only the indexer "
            "still meets all tokens, at a fraction of the work. A choice has no gradient, so indexers learn from a "
            "loss of their own, to foretell where full attention would have looked. All else is V3, whose weights "
            "were the starting point.",
            "在 V3 中，一个查询仍要面对之前的每个词元，计算量随长度的平方增长。V3.2 给每层加上第二个极小的注意力，即闪"
            "电索引器：查询有 {c.index_n_heads} 个头，每个词元一个 {c.index_head_dim} 维的键，用 ReLU 代替 softmax。它"
            "的得分只用来选择：无论文本多长，MLA 只读得分最高的 {c.index_topk} 个词元；只有索引器仍面对全部词元，代价"
            "小得多。选择没有梯度，所以索引器靠自己的损失学习，预测完整注意力本来会看哪里。其余都与 V3 相同，也正是从 "
            "V3 的权重继续训练而来。",
        ),
        [
            r"I_{t,s} = \sum_j w_{t,j}\,\mathrm{ReLU}(q_{t,j}^\top k_s), \quad S_t = \mathrm{top}K(I_{t,:})",
        ],
        [
            Code(sparse_attention.LightningIndexer, "lightning indexer", "闪电索引器"),
            Code(indexing.index_scores, "its scores", "它的得分"),
            Code(indexing.best_of, "the choice; of equal scores the newest win", "选择；得分相同取最新"),
            Code(sparse_attention.DeepseekSparseAttention, "MLA over the chosen keys", "在选中的键上做 MLA"),
        ],
    ),
    "v4": Generation(
        ("V4: a window, a compressed past, four streams", "V4：窗口、压缩的过去、四条流"),
        [
            Source("DeepSeek-V4", "2606.19348", "2.1, 2.2, 2.3"),
            Source("mHC: Manifold-Constrained Hyper-Connections", "2512.24880", "4"),
        ],
        (
            "All three axes change. Attention: all heads share one key, which is also the value; each layer sees the "
            "newest {c.sliding_window} tokens one by one, and what is older as entries made of whole blocks, of "
            "{c.compress_rate_csa} tokens with an indexer's choice (csa) or of {c.compress_rate_hca} tokens without "
            "one (hca), in turn from layer to layer. A head may also attend to nothing (a sink in the softmax), and "
            "outputs are rotated back, so that values know distances and not positions. Residual: {c.hc_mult} streams "
            "in place of one; a sub-layer reads a weighted sum of them, and its output is added while they are mixed "
            "by a matrix whose rows and columns sum to 1 (mHC). Experts: scored by the square root of a softplus, "
            "which does not saturate, without groups; in the first {c.num_hash_layers} layers a fixed table assigns "
            "them by token id. MTP runs on the streams.",
            "三个轴都变了。注意力：所有头共用一个键，它同时也是值；每层逐个看最新的 {c.sliding_window} 个词元，更早的"
            "则看由整块词元压成的条目：每 {c.compress_rate_csa} 个词元一个条目、由索引器挑选（csa），或每 "
            "{c.compress_rate_hca} 个词元一个条目、全部读取（hca），逐层交替。一个头也可以什么都不看（softmax 里的 "
            "sink）；输出再反向旋转，使值只知道距离而不知道位置。残差：{c.hc_mult} 条流代替一条；子层读取它们的加权"
            "和，写回输出的同时用一个各行各列之和为 1 的矩阵混合它们（mHC）。专家：得分是 softplus 的平方根，不会饱"
            "和，也不分组；前 {c.num_hash_layers} 层按词元编号查固定的表来分配。MTP 在四条流上进行。",
        ),
        [
            r"p_h = \mathrm{softmax}\left([\,q_h^\top k_s / \sqrt{D}\,]_{s}\,,\ \mathrm{sink}_h\right), \quad "
            r"e_i = \mathrm{norm}\Big(\sum_j \mathrm{softmax}_j(Z_j + B_j) \odot C_j\Big)",
            r"u = \sum_j a_j X_j, \quad X'_k = b_k F(\mathrm{norm}(u)) + \sum_j M_{jk} X_j, \quad "
            r"M \mathbf{1} = M^\top \mathbf{1} = \mathbf{1}",
            r"s = \sqrt{\mathrm{softplus}(W x)}",
        ],
        [
            Code(
                compressed_attention.SlidingWindowAttention,
                "window attention, base of all three",
                "窗口注意力，三者之基",
            ),
            Code(compressor.Compressor, "entries from blocks", "由块生成条目"),
            Code(compressed_attention.CompressedSparseAttention, "csa", "csa"),
            Code(compressor.Indexer, "indexer of csa", "csa 的索引器"),
            Code(compressed_attention.HeavilyCompressedAttention, "hca", "hca"),
            Code(hyper_connections.HyperConnection, "mHC", "mHC"),
            Code(hyper_connections.sinkhorn, "rows and columns that sum to 1", "使各行各列之和为 1"),
            Code(experts.HashRouter, "experts by token id", "按词元编号分配专家"),
        ],
    ),
}
