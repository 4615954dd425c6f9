"""The pictures of `docs/generations.md`: one per axis of the model, and one for drafting.

Numbers in them (bytes, experts, groups) come from the presets of the releases, the mixing matrix from the model's own
code; which tokens and experts are chosen is an example. Every word is given in English and Chinese, side by side.
"""

import random
from collections.abc import Callable

import torch

from ...modeling.cache_size import released_layer_bytes
from ...modeling.configuration_fathom import FathomConfig
from ...modeling.hyper_connections import sinkhorn
from .svg import WIDTH, Picture

Say = Callable[[str, str], str]
LEFT, RIGHT = 28, WIDTH - 28


def speaker(chinese: bool) -> Say:
    """A function that takes the same words in English and Chinese and gives those of the reader."""
    return lambda english, other: other if chinese else english


def _start(title: str, description: str) -> Picture:
    picture = Picture(title, description)
    picture.text(LEFT, 40, title, size=21, bold=True)
    return picture


def _head(picture: Picture, top: float, name: str, figure: str = "", words: str = "") -> None:
    """Begins a row at `top` with a line, its name, a figure at the right and a sentence below."""
    picture.line(LEFT, top, RIGHT, top, "edge", width=1)
    picture.text(LEFT, top + 27, name, size=18, bold=True)
    picture.text(RIGHT, top + 27, figure, fill="value", anchor="end", bold=True)
    picture.text(LEFT, top + 50, words, fill="soft")


def _width(words: str) -> float:
    """Roughly, in this size of text."""
    return 8.4 * sum(2.1 if ord(letter) > 255 else 1 for letter in words)


# Tokens of the past in the picture, the newest of them in the window, and tokens per entry as drawn.
PAST, WINDOW, BLOCKS = 24, 4, {"csa": 4, "hca": 10}
_STEP = (RIGHT - LEFT - 40) / (PAST - 1)


def token_mixing(say: Say) -> Picture:
    """What a query reads, and what the cache keeps for it, per kind of attention."""
    picture = _start(
        say("What a query reads, and what is kept for it", "一个查询读什么，为它保存什么"),
        say(
            "For each kind of attention a row of past tokens. Bars below them are the bytes that one layer keeps.",
            "每种注意力一行历史词元；下方的竖条是一层为它保存的字节数。",
        ),
    )
    legend = [
        ("read", say("read now", "本次读取")),
        ("pale", say("kept, not read now", "保存着，本次不读")),
        ("faint", say("not kept", "不再保存")),
    ]
    x = LEFT + 6.0
    for fill, words in legend:
        picture.circle(x, 65, 6, fill if fill != "faint" else None, "faint" if fill == "faint" else None)
        picture.text(x + 13, 70.5, words, fill="soft")
        x += 46 + _width(words)
    picture.circle(x, 65, 6, "warm")
    picture.text(x + 13, 70.5, say("query", "查询"), fill="soft")

    top = 92.0
    for kind, preset, name, words in (
        (
            "mha",
            "moe-16b",
            say("mha · classic, DeepSeekMoE", "mha · 经典、DeepSeekMoE"),
            say("Keys and values of all heads, for every token.", "每个词元保存所有头的键和值。"),
        ),
        (
            "mla",
            "v3-671b",
            say("mla · V2, V3", "mla · V2、V3"),
            say(
                "One latent per token; all heads' keys and values come from it.",
                "每个词元一个潜向量，所有头的键和值都由它展开。",
            ),
        ),
        (
            "dsa",
            "v3.2-671b",
            say("dsa · V3.2", "dsa · V3.2"),
            say(
                "An indexer scores all tokens, attention reads the best.",
                "索引器给所有词元打分，注意力只读最高的那些。",
            ),
        ),
        (
            "swa",
            "v4-flash",
            say("swa · V4", "swa · V4"),
            say("The window alone. What leaves it is forgotten here.", "只有窗口；离开窗口的在这一层被遗忘。"),
        ),
        (
            "csa",
            "v4-flash",
            say("csa · V4", "csa · V4"),
            say(
                "Beside the window: one entry per {c.compress_rate_csa} tokens, the best are read.",
                "窗口之外：每 {c.compress_rate_csa} 个词元一个条目，读最好的。",
            ),
        ),
        (
            "hca",
            "v4-flash",
            say("hca · V4", "hca · V4"),
            say(
                "Beside the window: one entry per {c.compress_rate_hca} tokens (10 drawn), all read.",
                "窗口之外：每 {c.compress_rate_hca} 个词元一个条目（图中画 10 个），全读。",
            ),
        ),
    ):
        config = FathomConfig.preset(preset)
        layer = [config.token_mixer(i) for i in range(config.num_hidden_layers)].index(kind)
        per_token = released_layer_bytes(config, layer)
        number = f"{float(per_token):,.0f}" if per_token >= 10 or not per_token else f"{float(per_token):.1f}"
        figure = say(f"{number} bytes per token", f"每词元 {number} 字节")
        _head(picture, top, name, figure, words.format(c=config))
        rate = {"csa": config.compress_rate_csa, "hca": config.compress_rate_hca}.get(kind, 1)
        window_bytes = released_layer_bytes(config, 3) * config.compress_rate_hca if config.compresses else 0
        top = _strip(picture, top + 108, kind, float(per_token * rate), float(window_bytes)) + 16
    picture.line(LEFT, top, RIGHT, top, "edge", width=1)
    window = FathomConfig.preset("v4-flash").sliding_window
    for line in (
        say(
            "Bars: bytes that one layer keeps, to scale, in the number formats",
            "竖条：一层保存的字节数，按比例绘制，采用发布版本的数值格式",
        ),
        say(
            f"of the releases (16B, 671B, V4-Flash). A window is full after {window}",
            f"（16B、671B、V4-Flash）。窗口满 {window} 个词元后不再增长，",
        ),
        say("tokens and grows no more: it is not in the bytes per token.", "所以不计入每词元字节数。"),
    ):
        top += 22
        picture.text(LEFT, top + 4, line, fill="soft")
    picture.height = top + 24
    return picture


def _strip(picture: Picture, y: float, kind: str, nbytes: float, window_bytes: float) -> float:
    """Draws the past, the query and who reads whom at height `y`; gives the lower end."""
    query = RIGHT - 8

    def place(token: float) -> float:
        return LEFT + 8 + token * _STEP

    def bar(x: float, height: float, fill: str) -> None:
        picture.rect(x - 6, y + 12, 12, height, fill, radius=1.5)

    def arc(x: float) -> None:
        lift = 12 + 24 * (query - x) / (query - LEFT)
        middle = (x + query) / 2
        picture.path(
            f"M{query:.1f} {y - 8:.1f}Q{middle:.1f} {y - 10 - 2 * lift + 8:.1f} {x:.1f} {y - 8:.1f}", "read", 1.2, 0.45
        )

    scale = 56 / 8192  # units per byte
    height = max(nbytes, window_bytes) * scale
    in_window = range(PAST - WINDOW, PAST) if window_bytes else range(0)
    if window_bytes:
        old = PAST - WINDOW
        block = BLOCKS.get(kind, old + 1)
        entries = [(start, start + block - 1) for start in range(0, old - block + 1, block)]
        chosen = {"csa": (1, 3, 4)}.get(kind, range(len(entries)))
        for n, (first, last) in enumerate(entries):
            fill, middle = ("read" if n in chosen else "pale"), place((first + last) / 2)
            picture.rect(place(first) - 8, y - 8, place(last) - place(first) + 16, 16, fill, radius=8)
            bar(middle, nbytes * scale, fill)
            if n in chosen:
                arc(middle)
        for token in range(old):
            if entries:
                picture.circle(place(token), y, 2.5, "card")
            else:
                picture.circle(place(token), y, 5, None, "faint")
        for token in in_window:
            picture.circle(place(token), y, 6.5, "read")
            bar(place(token), window_bytes * scale, "read")
            arc(place(token))
    else:
        generator = random.Random(4)
        chosen_tokens = {*generator.sample(range(PAST - 3), 6), PAST - 1} if kind == "dsa" else set(range(PAST))
        for token in range(PAST):
            read = token in chosen_tokens
            picture.circle(place(token), y, 6.5, "read" if read else "pale")
            bar(place(token), height, "read" if read else "pale")
            if read:
                arc(place(token))
    picture.circle(query, y, 8, "warm")
    return y + 12 + height


def channel_mixing(say: Say) -> Picture:
    """Which experts a token meets, with the releases' own numbers of experts and groups."""
    picture = _start(
        say("Which experts a token meets", "一个词元遇到哪些专家"),
        say(
            "For each generation its shared and routed experts as squares; those that one token uses are filled.",
            "每一代的共享专家和路由专家画成方格，一个词元用到的填色。",
        ),
    )
    x = LEFT + 0.0
    for fill, words in (
        ("read", say("routed, used", "路由专家，用到")),
        ("pale", say("routed, not used", "路由专家，未用")),
        ("value", say("always used", "总是使用")),
    ):
        picture.rect(x, 59, 12, 12, fill)
        picture.text(x + 19, 70.5, words, fill="soft")
        x += 48 + _width(words)

    top = 92.0
    words = say("Every token passes the whole network.", "每个词元都经过整个网络。")
    _head(picture, top, say("classic", "经典"), say("one network", "一个网络"), words)
    picture.rect(LEFT, top + 66, RIGHT - LEFT, 26, "value", radius=3)
    top += 110
    for preset, name, words in (
        (
            "moe-16b",
            "DeepSeekMoE 16B",
            say(
                "Many small experts. s = softmax(W x): the best {c.num_experts_per_tok}.",
                "许多小专家。s = softmax(W x)，取最高的 {c.num_experts_per_tok} 个。",
            ),
        ),
        (
            "v2-236b",
            "V2 236B",
            say(
                "Groups, by their best expert: {c.topk_group} of {c.n_group}. "
                "Within them the best {c.num_experts_per_tok}.",
                "先按组内最高分选组：{c.n_group} 选 {c.topk_group}；再在其中取最高的 {c.num_experts_per_tok} 个。",
            ),
        ),
        (
            "v3-671b",
            "V3, V3.2 671B",
            say(
                "s = sigmoid(W x). A bias that follows the load joins the choice.",
                "s = sigmoid(W x)；随负载移动的偏置参与选择。",
            ),
        ),
        (
            "v4-flash",
            "V4-Flash",
            say("s = sqrt(softplus(W x)), with the bias, without groups.", "s = sqrt(softplus(W x))，有偏置，不分组。"),
        ),
    ):
        top = _experts(picture, say, top, FathomConfig.preset(preset), name, words)
    config = FathomConfig.preset("v4-flash")
    chosen, experts = config.num_experts_per_tok, config.n_routed_experts
    _head(
        picture,
        top,
        say(f"V4, first {config.num_hash_layers} layers: hash", f"V4 前 {config.num_hash_layers} 层：哈希"),
        say(f"{chosen} of {experts}", f"{experts} 选 {chosen}"),
        say("No choice: a fixed table says who serves a token id.", "不做选择：固定的表规定每个词元编号由谁处理。"),
    )
    picture.rect(LEFT, top + 66, 118, 34, "plain", "edge", radius=6)
    picture.text(LEFT + 59, top + 88, say("token 1234", "词元 1234"), anchor="middle")
    picture.line(LEFT + 118, top + 83, LEFT + 170, top + 83, "soft", arrow=True)
    for n, expert in enumerate(sorted(random.Random(11).sample(range(experts), chosen))):
        picture.rect(LEFT + 180 + n * 68, top + 66, 60, 34, "read", radius=6)
        picture.text(LEFT + 210 + n * 68, top + 88, str(expert), fill="card", anchor="middle", bold=True)
    picture.height = top + 122
    return picture


def _experts(picture: Picture, say: Say, top: float, config: FathomConfig, name: str, words: str) -> float:
    """One generation's experts in their groups, four groups to a line; gives the lower end."""
    experts, chosen, shared = config.n_routed_experts, config.num_experts_per_tok, config.n_shared_experts
    limited = config.topk_method != "greedy" and config.n_group > 1
    groups, kept = (config.n_group, config.topk_group) if limited else (1, 1)
    generator = random.Random(experts + chosen)
    open_groups = sorted(generator.sample(range(groups), kept))
    size = experts // groups
    candidates = [group * size + n for group in open_groups for n in range(size)]
    used = set(generator.sample(candidates, chosen))

    figure = say(f"{chosen} of {experts}, and {shared} shared", f"{experts} 选 {chosen}，另 {shared} 个共享")
    _head(picture, top, name, figure, words.format(c=config))
    cell, gap, y = 12.0, 3.4, top + 68
    for n in range(shared):
        picture.rect(LEFT, y + n * (cell + gap), cell, cell, "value")
    start = LEFT + 34.0
    across = 4 if groups > 1 else 1  # groups side by side
    columns = size // (4 if groups > 1 else -(-experts // 34))  # squares side by side in a group
    pad = 7 if groups > 1 else 0
    width = columns * (cell + gap) - gap
    lines = -(-size // columns)
    tall = lines * (cell + gap) - gap
    apart = (RIGHT - start - pad - across * width - pad) / max(across - 1, 1) if groups > 1 else 0
    apart = min(apart, 2 * pad + 8)
    for group in range(groups):
        left = start + pad + (group % across) * (width + apart)
        upper = y + (group // across) * (tall + 2 * pad + 8)
        if groups > 1:
            picture.rect(
                left - pad,
                upper - pad,
                width + 2 * pad,
                tall + 2 * pad,
                None,
                "read" if group in open_groups else "edge",
                5,
            )
        for n in range(size):
            fill = "read" if group * size + n in used else "pale"
            if groups > 1 and group not in open_groups:
                fill = "plain"
            picture.rect(left + n % columns * (cell + gap), upper + n // columns * (cell + gap), cell, cell, fill)
    rows = -(-groups // across)
    return y + rows * (tall + 2 * pad + 8) + 6


def residual(say: Say) -> Picture:
    """The plain residual stream, and V4's four streams that are mixed by doubly stochastic matrices."""
    picture = _start(
        say("How the residual stream is carried", "残差流怎样传递"),
        say(
            "Above, one stream to which every sub-layer adds. Below, four streams that are read, mixed and written.",
            "上：一条残差流，每个子层往上加。下：四条流，被读取、混合、写入。",
        ),
    )
    _head(picture, 60, say("plain · classic to V3.2", "普通 · 经典到 V3.2"), "x′ = x + F(norm(x))")
    y = 176.0
    picture.line(LEFT, y, RIGHT, y, "read", width=4)
    boxes = [(120.0, say("attention", "注意力")), (390.0, say("feed-forward", "前馈网络"))]
    for x, words in boxes:
        picture.path(f"M{x - 50} {y}Q{x - 50} {y - 48} {x - 14} {y - 48}", "soft", 1.6, arrow=True)
        picture.rect(x - 10, y - 68, 140, 40, "plain", "edge", radius=8)
        picture.text(x + 60, y - 42, words, anchor="middle", bold=True)
        picture.path(f"M{x + 130} {y - 48}Q{x + 170} {y - 48} {x + 170} {y - 14}", "soft", 1.6, arrow=True)
        picture.circle(x + 170, y, 11, "card", "read")
        picture.text(x + 170, y + 6, "+", size=18, fill="read", anchor="middle", bold=True)

    top = 216.0
    _head(picture, top, say("hyper-connections (mHC) · V4", "超连接（mHC）· V4"))
    for x, formula in (
        (LEFT, "u = Σ preⱼ Xⱼ"),
        (LEFT + 158, "y = F(norm(u))"),
        (LEFT + 332, "X′ₖ = postₖ y + Σ Mⱼₖ Xⱼ"),
    ):
        picture.text(x, top + 55, formula, fill="value", bold=True)
    mixing = _doubly_stochastic()
    lanes = [top + 150 + 20 * n for n in range(4)]
    reading, writing = (0.9, 0.35, 0.55, 0.2), (0.3, 0.95, 0.25, 0.6)
    picture.line(LEFT, lanes[0], LEFT, lanes[3], "read", width=3)
    picture.text(LEFT, lanes[3] + 26, say("4 copies", "四份"), fill="soft")
    previous = float(LEFT)
    for x, words in ((120.0, boxes[0][1]), (370.0, boxes[1][1])):
        for lane, weight in zip(lanes, reading, strict=True):
            picture.line(previous, lane, x + 20, lane, "read", width=3)
            picture.path(
                f"M{x - 44} {lane}Q{x - 30} {lanes[0] - 44} {x - 12} {lanes[0] - 44}", "warm", 0.8 + 3 * weight, 0.75
            )
        picture.rect(x - 10, lanes[0] - 66, 140, 40, "plain", "edge", radius=8)
        picture.text(x + 60, lanes[0] - 40, words, anchor="middle", bold=True)
        for j, lane in enumerate(lanes):
            for k, other in enumerate(lanes):
                picture.line(
                    x + 20, lane, x + 100, other, "read", width=1 + 4 * mixing[j][k], opacity=0.4 + 0.6 * mixing[j][k]
                )
        for lane, weight in zip(lanes, writing, strict=True):
            picture.path(
                f"M{x + 130} {lanes[0] - 46}Q{x + 150} {lanes[0] - 40} {x + 160} {lane}",
                "value",
                0.8 + 3 * weight,
                0.75,
            )
            picture.line(x + 100, lane, x + 180, lane, "read", width=3)
        picture.text(x + 60, lanes[3] + 26, "M", fill="read", anchor="middle", bold=True)
        previous = x + 180
    for lane in lanes:
        picture.line(previous, lane, RIGHT - 40, (lanes[0] + lanes[3]) / 2, "read", width=1.6)
    picture.line(RIGHT - 40, (lanes[0] + lanes[3]) / 2, RIGHT - 4, (lanes[0] + lanes[3]) / 2, "read", width=4)
    picture.text(RIGHT, lanes[3] + 26, say("sum, head", "求和，输出头"), fill="soft", anchor="end")

    top = lanes[3] + 52
    picture.line(LEFT, top, RIGHT, top, "edge", width=1)
    side, left = 40.0, LEFT + 12.0
    for j, row in enumerate(mixing):
        for k, weight in enumerate(row):
            x, y = left + k * (side + 14), top + 22 + j * (side - 6)
            picture.rect(x, y, side + 10, side - 10, "pale", radius=4)
            picture.rect(x, y, side + 10, side - 10, "read", radius=4, opacity=1 if weight > 0.5 else weight)
            picture.text(
                x + (side + 10) / 2, y + 21, f"{weight:.2f}", anchor="middle", fill="ink" if weight < 0.3 else "card"
            )
        picture.text(left + 4 * (side + 14) + 6, top + 43 + j * (side - 6), f"Σ = {sum(row):.2f}", fill="soft")
    words_at = left + 4 * (side + 14) + 98
    for n, line in enumerate(
        (
            say("Computed from each token's", "由每个词元自己的流算出。"),
            say("own streams. Sinkhorn makes", "Sinkhorn 迭代使 M 的每行、"),
            say("rows and columns sum to 1:", "每列之和为 1，"),
            say("depth neither blows streams", "因此无论多深，流的总量"),
            say("up nor drains them.", "既不爆炸也不枯竭。"),
        )
    ):
        picture.text(words_at, top + 40 + 25 * n, line, fill="soft")
    picture.height = top + 22 + 4 * (side - 6) + 18
    return picture


def _doubly_stochastic() -> list[list[float]]:
    """A mixing matrix as the model makes it, of logits that are largest on the diagonal."""
    logits = torch.tensor([[2.6, 0.4, 1.2, -0.6], [0.1, 2.2, -0.3, 1.0], [0.9, -0.5, 2.4, 0.3], [-0.4, 1.1, 0.2, 2.5]])
    return sinkhorn(logits, iterations=20, eps=1e-6).tolist()


def drafting(say: Say) -> Picture:
    """How MTP layers join a hidden state with the next token's embedding, in V3 and V4."""
    picture = _start(
        say("How one more token is predicted", "怎样多预测一个词元"),
        say(
            "The main model predicts the next token; an MTP layer joins its hidden state with that token's embedding.",
            "主模型预测下一个词元；MTP 层把隐藏状态与那个词元的嵌入合起来，再预测一个。",
        ),
    )
    streams = FathomConfig.preset("v4-flash").hc_mult
    top = 60.0
    for name, formula, count in (
        ("V3", "h′ = W [norm(emb(tᵢ₊₁)) ; norm(hᵢ)]", 1),
        ("V4", "X′ = Wₑ norm(emb(tᵢ₊₁)) + Wₕ norm(Xᵢ)", streams),
    ):
        _head(picture, top, name, formula)
        main, draft, mid = top + 52, top + 142, 250.0
        _box(picture, LEFT, main, 104, say("token i", "词元 i"), "pale")
        _box(picture, 176, main, 148, say("main model", "主模型"), "plain")
        _box(picture, 408, main, 70, say("head", "输出头"), "plain")
        _box(picture, 540, main, 72, "i + 1", "pale")
        _box(picture, LEFT, draft, 104, say("token i+1", "词元 i+1"), "pale")
        _box(picture, 176, draft, 148, say("MTP layer", "MTP 层"), "plain")
        _box(picture, 408, draft, 70, say("head", "输出头"), "plain")
        _box(picture, 540, draft, 72, "i + 2", "warm")
        for y in (main + 22, draft + 22):
            for x1, x2 in ((LEFT + 104, 174), (324, 406), (478, 538)):
                picture.line(x1 + 4, y, x2 - 2, y, "soft", arrow=True)
        for n in range(count):
            x = mid + (n - (count - 1) / 2) * 16
            picture.line(x, main + 47, x, draft - 3, "read", width=2.4, arrow=True)
        picture.text(
            mid + 14 + (count - 1) * 8,
            (main + draft) / 2 + 28,
            say("hidden state", "隐藏状态") if count == 1 else say(f"{count} streams", f"{count} 条流"),
            fill="soft",
        )
        picture.text(443, (main + draft) / 2 + 28, say("same head", "同一个头"), fill="soft", anchor="middle")
        top = draft + 66
    picture.line(LEFT, top, RIGHT, top, "edge", width=1)
    for line in (
        say(
            "It is trained along with the main model, so that each position",
            "与主模型一起训练，每个位置都学着看得更远。",
        ),
        say("learns to look further ahead. When generating, it can draft.", "生成时，它可以起草下一个词元。"),
    ):
        top += 23
        picture.text(LEFT, top + 4, line, fill="soft")
    picture.height = top + 26
    return picture


def _box(picture: Picture, x: float, y: float, width: float, words: str, fill: str) -> None:
    picture.rect(x, y, width, 44, fill, "edge" if fill == "plain" else None, radius=8)
    picture.text(x + width / 2, y + 28, words, anchor="middle", fill="card" if fill == "warm" else "ink", bold=True)


PICTURES: dict[str, Callable[[Say], Picture]] = {
    "token-mixing": token_mixing,
    "channel-mixing": channel_mixing,
    "residual": residual,
    "drafting": drafting,
}
